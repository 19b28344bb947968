"""What a user takes away: folders that transformers and peft read without us."""

import errno
import json
import resource

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmtune import durable
from llmtune.adapters.attach import attach_adapter
from llmtune.adapters.write import write_adapter
from llmtune.errors import CheckpointError, MachineError
from llmtune.models import save
from llmtune.models.parameters import trained_parameters
from llmtune.models.read_config import translate_save_errors
from llmtune.models.save import restore_weights, write_model, write_tokenizer
from training_helpers import in_child

IDS_BT = torch.arange(4, 28).reshape(2, 12)


def test_a_written_model_loads_in_plain_transformers_with_equal_logits(
    tiny_model_folder, tiny_tokenizer, load, tmp_path
):
    model = load(tiny_model_folder, trained="full").model
    write_model(model, tiny_tokenizer, tmp_path, stop_token_ids=[2, 0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS_BT).logits, model(input_ids=IDS_BT).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny_tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 0]
    assert not list(tmp_path.glob("*.bin"))


def test_large_models_are_cut_into_shards_and_nothing_is_lost(
    tiny_model_folder, tiny_tokenizer, load, tmp_path, monkeypatch
):
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 40_000)
    model = load(tiny_model_folder, trained="full").model
    write_model(model, tiny_tokenizer, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) >= 3
    assert load(tmp_path).base_digest == load(tiny_model_folder).base_digest


def test_a_committed_model_has_the_modes_the_umask_gives(tiny_model_folder, tiny_tokenizer, load, tmp_path):
    with durable.commit_folder(tmp_path / "final") as staging:
        write_model(load(tiny_model_folder, trained="full").model, tiny_tokenizer, staging)
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "final").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    assert durable.verify_manifest(tmp_path / "final") == []


def test_an_adapter_folder_holds_all_that_generation_needs_and_a_record_of_its_base(
    tiny_model_folder, tiny_tokenizer, load, lora, tmp_path
):
    model, _ = attach_adapter(load(tiny_model_folder).model, lora(), seed=0)
    write_adapter(
        model, tmp_path, tokenizer=tiny_tokenizer, stop_token_ids=[2, 0], base_digest="abc", base_name="my-model"
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    record = json.loads((tmp_path / "adapter_base.json").read_text())
    assert (record["base_digest"], record["base_name"], record["base_path"]) == (
        "abc",
        "my-model",
        str(tiny_model_folder),
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model_folder
    )
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 0]


@pytest.mark.parametrize("adapter", [False, True])
def test_p2_trained_weights_come_back_bit_for_bit(tiny_model_folder, load, lora, tmp_path, adapter):
    def fresh():
        model = load(tiny_model_folder, trained="full").model
        return attach_adapter(model, lora(), seed=0)[0] if adapter else model

    model, other = fresh(), fresh()
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    weights = {name: one.detach().contiguous() for name, one in trained_parameters(model).items()}
    durable.write_tensors(tmp_path / "model.safetensors", weights, {})
    tensors, _ = durable.read_tensors(tmp_path / "model.safetensors")
    restore_weights(trained_parameters(other), tensors)
    wanted, found = trained_parameters(model), trained_parameters(other)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, name: w.pop(name), "is missing in the checkpoint"),
        (lambda w, name: w.update({"more": torch.zeros(1)}), "not trained here"),
        (lambda w, name: w.update({name: w[name][:1].clone()}), "in the checkpoint"),
        (lambda w, name: w.update({name: w[name].to(torch.bfloat16)}), "torch.bfloat16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(tiny_model_folder, load, change, words):
    model = load(tiny_model_folder, trained="full").model
    weights = {name: one.detach().clone() + 1 for name, one in trained_parameters(model).items()}
    before = {name: one.detach().clone() for name, one in trained_parameters(model).items()}
    change(weights, "model.norm.weight")
    with pytest.raises(CheckpointError, match=words):
        restore_weights(trained_parameters(model), weights)
    assert all(torch.equal(one, before[name]) for name, one in trained_parameters(model).items())


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_p7_what_the_system_refuses_a_library_is_said_as_what_it_refuses_us(
    what, tiny_model_folder, tiny_tokenizer, load, tmp_path
):
    """safetensors and tokenizers raise kinds of their own; a disk that fills while a library writes must cost a save,
    not the run.
    """
    model = load(tiny_model_folder, trained="full").model
    (tmp_path / "out").mkdir()

    def refused():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_model(model, tiny_tokenizer, tmp_path / "out") if what == "model" else write_tokenizer(
                tiny_tokenizer, tmp_path / "out"
            )
        except MachineError as error:
            (tmp_path / "told").write_text(f"{durable.errno_of(error)} {error}"[:4000])
            raise

    assert in_child(refused) == 6
    told = (tmp_path / "told").read_text()
    assert told.startswith(f"{errno.EFBIG} {tmp_path / 'out'}: cannot save: File too large (EFBIG)"), told


def test_p7_an_error_of_a_library_that_is_not_the_system_s_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError, match="weight"), translate_save_errors(tmp_path):
        raise KeyError("weight")
    with pytest.raises(MachineError, match="ENOSPC") as caught, translate_save_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (
        durable.errno_of(caught.value) == errno.ENOSPC
    )  # one of those that `SaveAttempts` tries again and then passes over
