"""`adapter.start_from`: training goes on from the weights of an adapter, exactly, or says why it cannot."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.cli.main import main
from llmtune.config.process_options import Options
from llmtune.errors import AdapterError, CheckpointError, ConfigError
from llmtune.models.read_config import quiet_libraries
from llmtune.prepare import prepare
from llmtune.training import train as training
from llmtune.training.build import build_setup
from training_helpers import weights_of

FAST = ("training.max_steps=2", "evaluation.every_steps=null", "data.test_size=0", "checkpoint.every_steps=1")
EARLIER = ("adapter.method=lora", "adapter.r=4", "adapter.alpha=12", "adapter.target_modules=[q_proj,down_proj]")


@pytest.fixture
def earlier(config_of):
    """Train an adapter with options of its own; returns its folder."""

    def train(*overrides):
        run = training.train(config_of(*FAST, *EARLIER, *overrides, name="earlier")).folder
        return run / "checkpoints" / "final"

    return train


def started(config_of, folder, *overrides):
    return config_of(*FAST, "adapter.method=lora", f"adapter.start_from={folder}", *overrides, name="next")


def built(resolved):
    from llmtune.engine.devices import open_devices
    from llmtune.plan.forecast import Forecaster
    from llmtune.plan.resolve_auto import resolve_rates

    options = Options(no_cuda=True)
    devices, _ = open_devices(resolved.config, options)
    forecaster = Forecaster.for_this_machine(prepare(resolved, options), options, devices)
    return build_setup(resolve_rates(forecaster)[0], options, devices)


def changed(folder, change):
    """Apply `change` to the tensors of the adapter in `folder`."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    (folder / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("adapter.dora=true", "adapter.rslora=true"),
        ("adapter.train_tokens=[<new>,<|im_end|>]", "adapter.modules_to_save=[norm]"),
        ("model.quantization=4bit",),
    ],
)
def test_training_starts_from_the_very_weights_in_their_shape(options, config_of, earlier):
    folder = earlier(*options)
    setup = built(started(config_of, folder))
    from llmtune.adapters.write import adapter_state_and_config

    tensors, _ = adapter_state_and_config(setup.peft_model)
    saved = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    adapter = setup.config.adapter
    assert (adapter.r, adapter.alpha, adapter.target_modules) == (4, 12.0, ("down_proj", "q_proj"))
    assert setup.config.model.quantization == ("4bit" if "4bit" in str(options) else "none")
    said = next(one for one in setup.prepared.decisions if one.key == "adapter.start_from")
    assert "adapter.r=4" in said.reason


def test_the_run_that_starts_from_another_is_resumed_to_the_same_bytes(config_of, earlier, tmp_path):
    folder = earlier("adapter.dropout=0.1")
    whole = training.train(started(config_of, folder, "training.max_steps=4"))
    identity = json.loads((whole.folder / "run.json").read_text())["identity"]
    assert len(identity["digests"]["start"]) == 64
    stopped = tmp_path / "runs" / "stopped"
    shutil.copytree(whole.folder, stopped, symlinks=True)
    for path in ("step-000004", "step-000003", "final"):
        shutil.rmtree(stopped / "checkpoints" / path)
    (stopped / "final").unlink(missing_ok=True)
    assert training.resume(str(stopped)).state == "finished"
    assert weights_of(stopped) == weights_of(whole.folder)
    assert weights_of(stopped) != {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    changed(folder, lambda tensors: tensors.update({name: tensor * 2 for name, tensor in tensors.items()}))
    with pytest.raises(CheckpointError, match=r"digests.start"):
        training.resume(str(stopped))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapter.r=8", r"has `r: 4`, here it is `8`"),
        ("adapter.alpha=32", r"has `alpha: 12.0`, here it is `32.0`"),
        ("adapter.target_modules=all-linear", "has `target_modules: "),
        ("adapter.dora=true", "has `dora: false`"),
        ("adapter.modules_to_save=[norm]", "modules_to_save"),
        ("adapter.train_tokens=[<|im_end|>]", "trains no rows"),
    ],
)
def test_a_given_value_that_is_not_the_adapters_is_refused_with_its_own(override, says, config_of, earlier):
    folder = earlier()
    with pytest.raises(AdapterError, match=says) as refused:
        built(started(config_of, folder, override))
    key = override.partition("=")[0]
    assert refused.value.problems[0].where == key
    assert f"leave {key} out" in refused.value.problems[0].fix


def _missing(tensors):
    tensors.pop(min(tensors))


def _extra(tensors):
    tensors["base_model.model.extra.lora_A.weight"] = torch.zeros(4, 32)


def _other_shape(tensors):
    tensors[min(tensors)] = torch.zeros(3, 32)


def _not_finite(tensors):
    tensors[min(tensors)][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_missing, "lacks the tensor"),
        (_extra, "has no place here"),
        (_other_shape, "has shape"),
        (_not_finite, "finite"),
    ],
)
def test_tensors_that_are_not_exactly_the_adapters_are_refused_by_name(change, says, config_of, earlier):
    folder = earlier()
    changed(folder, change)
    with pytest.raises(AdapterError, match=says):
        built(started(config_of, folder))


def test_another_base_a_whole_model_and_nothing_are_refused(config_of, earlier, tiny_model_folder, tmp_path):
    folder = earlier()
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="trained on other weights"):
        built(started(config_of, folder, f"model.name={other}"))
    with pytest.raises(AdapterError, match="is a whole model") as refused:
        prepare(started(config_of, tiny_model_folder), Options())
    assert f"model.name={tiny_model_folder}" in refused.value.problems[0].fix
    with pytest.raises(AdapterError, match="there is no run or folder `nowhere`"):
        prepare(started(config_of, "nowhere"), Options())
    with pytest.raises(ConfigError, match="does nothing without an adapter"):
        config_of(f"adapter.start_from={folder}")


def test_a_folder_that_peft_wrote_is_started_from(config_of, tiny_model_folder, tmp_path):
    """With patterns of ranks, a part of the layers, and no record of ours."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    options = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1],
        rank_pattern={"up_proj": 2}, init_lora_weights=False,
    )  # fmt: skip
    with quiet_libraries():
        get_peft_model(base, options).save_pretrained(tmp_path / "peft")
    run = training.train(started(config_of, tmp_path / "peft")).folder
    saved, trained = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "peft", run / "checkpoints" / "final")
    )
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: t.shape for name, t in trained.items()}
    assert {tensor.shape[0] for name, tensor in trained.items() if "lora_A" in name} == {4, 2}


@pytest.mark.parametrize("name", ["half", "half/checkpoints/step-000001"])
def test_a_run_that_has_not_finished_is_named_as_such_by_the_short_form(name, tmp_path, capsys):
    step = tmp_path / "half" / "checkpoints" / "step-000001"
    step.mkdir(parents=True)
    (tmp_path / "half" / "run.json").write_text("{}")
    (step / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--from", name, "--output-dir", str(tmp_path), "--dry-run"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "the run `half` has not finished: after step-000001" in told
    assert f"llmtune resume {tmp_path / 'half'}" in " ".join(told.split())


def test_the_short_form_takes_a_run_or_a_whole_model(
    config_of, earlier, rows_file, tmp_path, tiny_model_folder, capsys
):
    folder = earlier()
    words = [f"data.train={rows_file}", "--dry-run", "--no-cuda", "--output-dir", str(tmp_path / "runs")]
    for start, says in (("earlier", "adapter.r=4"), (folder, "adapter.r=4"), (tiny_model_folder, "training.")):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--from", str(start), *words])
        told = capsys.readouterr()
        assert stopped.value.code == 0, told.err
        assert says in told.out
        assert ("adapter.start_from = " in told.out) == (start != tiny_model_folder)
