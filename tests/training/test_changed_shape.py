"""Every way in which a run can change the model's shape ends in a result that can be merged, exported and evaluated."""

import json
import subprocess
import sys

import pytest
import torch

from case_helpers import few_of
from llmtune.adapters.attach import attach_adapter
from llmtune.cli.main import main
from llmtune.config.process_options import Options
from llmtune.config.schema import AdapterConfig
from llmtune.deploy.export import export
from llmtune.deploy.merge import merge_lora
from llmtune.errors import AdapterError, TokenizerError
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.prepare import prepare
from llmtune.training import train as training
from training_helpers import FOUR_BIT


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """A tied and an untied model of 400 rows, and tokenizers: grown by three tokens, and of another model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("shapes")
    for name, tied in (("tied", True), ("untied", False)):
        config = LlamaConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=0,
            bos_token_id=None, tie_word_embeddings=tied,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    tiny_tokenizer.save_pretrained(root / "grown")
    grown = type(tiny_tokenizer).from_pretrained(root / "grown")
    grown.add_tokens(["<step>", "<|eot|>", "<note>"], special_tokens=True)
    grown.chat_template = tiny_tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    grown.eos_token = "<|eot|>"
    grown.save_pretrained(root / "grown")
    other = root / "other"
    tiny_tokenizer.save_pretrained(other)
    rules = json.loads((other / "tokenizer.json").read_text())
    words = sorted(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    kept = {token["id"] for token in rules["added_tokens"]}
    moved = [word for word in words if rules["model"]["vocab"][word] not in kept]
    ids = [rules["model"]["vocab"][word] for word in moved]
    rules["model"]["vocab"] |= dict(zip(moved, ids[1:] + ids[:1], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(rules))
    return root


def logits_of(folder, ids):
    with torch.no_grad():
        return load_inference_model(str(folder), no_cuda=True).model(torch.tensor([ids])).logits[0].float()


LORA = ("adapter.method=lora", "adapter.r=4")
GROWN = ("model.tokenizer={folders}/grown",)
WAYS = {
    "grown, LoRA": (*LORA, *GROWN),
    "grown, QLoRA": (*FOUR_BIT, *GROWN),
    "grown, full": (*GROWN, "adapter.train_tokens=[<more>]", "model.pad_token=<note>"),
    "grown, LoRA in bf16": (*LORA, *GROWN, "model.dtype=bfloat16"),
    "grown, with further tokens": (*LORA, *GROWN, "adapter.train_tokens=[<|im_start|>,<more>]"),
    "grown, embedding saved": (*LORA, *GROWN, "adapter.modules_to_save=[embed_tokens]"),
    "grown, embedding and head saved": (*LORA, *GROWN, "adapter.modules_to_save=[embed_tokens,lm_head]"),
    "grown, embedding with LoRA": (*LORA, *GROWN, "adapter.target_modules=[q_proj,embed_tokens]"),
    "grown, DoRA": (*LORA, *GROWN, "adapter.dora=true"),
    "head saved": (*LORA, "adapter.modules_to_save=[lm_head]"),
}
FAST = (
    "training.max_steps=1",
    "training.gradient_accumulation_steps=1",
    "training.learning_rate=0.05",
    "evaluation.every_steps=null",
    "data.test_size=0",
)


CASES = [(way, "tied") for way in WAYS] + [(way, "untied") for way in ("grown, LoRA", "grown, embedding saved")]


FEW = [("grown, LoRA", "tied"), ("grown, QLoRA", "tied"), ("grown, full", "tied"), ("grown, embedding saved", "untied")]


@pytest.mark.parametrize(("way", "tied"), few_of(CASES, FEW))
def test_a_changed_shape_is_merged_exported_and_evaluated_as_it_was_trained(
    way, tied, config_of, folders, tmp_path, rows_file
):
    words = [word.format(folders=folders) for word in WAYS[way]]
    run = training.train(config_of(f"model.name={folders / tied}", *FAST, *words)).folder
    export(str(run), tmp_path / "exported")  # merges an adapter first, and compares logits itself
    ids = [1, 2, *range(300, len(load_inference_model(str(run), no_cuda=True).tokenizer))]
    tuned, exported = logits_of(run, ids), logits_of(tmp_path / "exported", ids)
    bound = 0.2 if "QLoRA" in way or "bf16" in way else 2e-5  # the base is as in training there, and as published here
    assert float((tuned - exported).abs().max()) < bound


def test_the_new_tokens_are_in_the_adapter_and_another_process_reads_the_result(
    config_of, folders, tmp_path, rows_file, capsys
):
    resolved = config_of(f"model.name={folders / 'untied'}", *FAST, *LORA, f"model.tokenizer={folders / 'grown'}")
    run = training.train(resolved).folder
    decision = next(
        one for one in json.loads((run / "run.json").read_text())["decisions"] if "train_tokens" in one["key"]
    )
    assert decision["value"] == "<step>, <|eot|>, <note>"
    written = json.loads((run / "checkpoints" / "final" / "adapter_config.json").read_text())
    rows = [314, 315, 316]
    assert written["trainable_token_indices"] == {"model.embed_tokens": rows, "lm_head": rows}
    merge_lora(run, tmp_path / "merged")
    losses = []
    words = ["evaluate", str(tmp_path / "merged"), "--data", str(rows_file), "--json", "--no-cuda"]
    command = [sys.executable, "-m", "llmtune", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    losses = [json.loads(done.stdout)["eval_mean_nll"]]
    with pytest.raises(SystemExit):
        main([words[0], str(run), *words[2:]])
    losses.append(json.loads(capsys.readouterr().out)["eval_mean_nll"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert training.resume(str(run), overrides=["training.max_steps=2"], allow_changes=True).state == "finished"


def test_another_models_tokenizer_is_refused_where_the_embedding_is_frozen(config_of, folders):
    other = f"model.tokenizer={folders / 'other'}"
    with pytest.raises(TokenizerError) as refused:
        prepare(config_of(f"model.name={folders / 'tied'}", *LORA, other), Options())
    problem = refused.value.problems[0]
    assert "another model's tokenizer" in problem.problem
    assert problem.where == "model.tokenizer"
    assert "adapter.modules_to_save=[embed_tokens,lm_head]" in problem.fix
    for trained in ((), (*LORA, "adapter.modules_to_save=[embed_tokens,lm_head]")):
        prepared = prepare(config_of(f"model.name={folders / 'tied'}", other, *trained), Options())
        assert any("another model's tokenizer" in decision.reason for decision in prepared.decisions)


def test_a_tied_head_trained_apart_from_single_rows_is_refused(config_of, folders):
    words = ("adapter.modules_to_save=[lm_head]", "adapter.train_tokens=[<tool>]")
    with pytest.raises(AdapterError, match="is tied to") as refused:
        training.train(config_of(f"model.name={folders / 'tied'}", *FAST, *LORA, *words))
    assert "adapter.modules_to_save=[embed_tokens,lm_head]" in refused.value.problems[0].fix


@pytest.mark.parametrize("row", ["zero", "equal"])
def test_a_control_token_that_no_training_has_moved_is_named_where_its_row_is_frozen(row, folders, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    def named(**options):
        model = AutoModelForCausalLM.from_pretrained(folders / "tied")
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[2] = 0.0 if row == "zero" else weight[310]
        config = AdapterConfig(method="lora", r=4, **options)
        _, decisions = attach_adapter(model, config, seed=0, tokenizer=tiny_tokenizer, used_ids=[1, 2])
        return [str(decision) for decision in decisions if decision.key == "untrained tokens"]

    (line,) = named()
    assert line.startswith("untrained tokens = <|im_end|>: ")
    assert "adapter.train_tokens=[<|im_end|>]" in line
    assert named(train_tokens=("<|im_end|>",)) == named(modules_to_save=("embed_tokens",)) == []
