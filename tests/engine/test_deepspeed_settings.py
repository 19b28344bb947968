"""DeepSpeed's settings of a run: the user's file around what llmtune decides."""

import json
from importlib import metadata

import pytest

from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.engine.deepspeed_settings import (
    check_deepspeed,
    engine_settings,
    offload_of,
    settings_problems,
    zero_stage_of,
)
from llmtune.engine.devices import open_devices
from llmtune.errors import ConfigError

DEEPSPEED = ("distributed.strategy=deepspeed", "training.precision=fp32", "training.learning_rate=0.001")

PEERS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "overlap_comm": False,
        "reduce_bucket_size": "auto",
        "allgather_bucket_size": 5e8,
        "offload_optimizer": {"device": "cpu"},
    },
    "wall_clock_breakdown": False,
}
"""A file as other toolkits ship it."""


@pytest.fixture
def config_with(tmp_path):
    """The config of a run with that file; further KEY=VALUE on top."""

    def make(settings, *words):
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return load_config(
            None, overrides=[*DEEPSPEED, f"distributed.deepspeed_config={path}", *words], environ={}
        ).config

    return make


def settings_of(config, **sizes):
    return engine_settings(config, **{"world_size": 4, "hidden_size": 64, "page_locked": False} | sizes)


def test_a_peers_file_is_taken_as_it_is_and_what_is_passed_on_is_named(config_with):
    config = config_with(PEERS)
    assert settings_problems(config) == []
    assert (zero_stage_of(config), offload_of(config)) == (2, "optimizer")
    settings, decisions = settings_of(config)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (2, 64 * 64, 5e8)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "auto" not in json.dumps(settings)
    passed = next(one for one in decisions if one.key == "distributed.deepspeed_config").reason
    for key in (
        "wall_clock_breakdown",
        "zero_optimization.allgather_partitions",
        "zero_optimization.reduce_bucket_size",
    ):
        assert key in passed
    assert "fp16" not in passed


def test_windows_are_counted_by_llmtune_alone(config_with):
    """The engine is told of one row a process and of no accumulation: the loss of a window is divided once, by us."""
    settings, _ = settings_of(config_with({}, "training.max_grad_norm=0.5"))
    assert settings["managed_gradient_accumulation"] is False
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (4, 1)
    assert settings["gradient_clipping"] == 0.5
    assert settings_of(config_with({}, "training.max_grad_norm=null"))[0]["gradient_clipping"] == 0.0
    assert settings["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("settings", "named", "fix"),
    [
        ({"gradient_clipping": 0.3}, "`gradient_clipping` is 0.3, but `training.max_grad_norm` makes it 1.0", "auto"),
        (
            {"train_batch_size": 9},
            "`train_batch_size` is 9, but `training.batch_size` makes it 8",
            "training.batch_size",
        ),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` is 2", "auto"),
        ({"bf16": {"enabled": True}}, "`bf16.enabled` is true, but `training.precision` makes it false", "auto"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            "lies on a disk",
            "take it out",
        ),
        ({"optimizer": {"type": "Lamb"}}, '`optimizer.type` is "Lamb"', "training.optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "`optimizer.params.lr` is 0.1", "learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "`training.lr_schedule`", "take it out"),
        ({"managed_gradient_accumulation": True}, "`managed_gradient_accumulation` is true", "auto"),
        ({"checkpoint": {"use_node_local_storage": True}}, "checkpoints are llmtune's own", "take it out"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "change what is trained", "take it out"),
    ],
)
def test_what_contradicts_llmtune_is_named_with_both_values(config_with, settings, named, fix):
    (found, *_) = [one for one in settings_problems(config_with(settings)) if named in one.problem]
    assert fix in found.fix
    assert found.where.endswith("ds.json")


def test_what_agrees_is_no_contradiction(config_with):
    agreed = {
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    }
    assert settings_problems(config_with(agreed, "distributed.zero_stage=1")) == []
    (problem,) = settings_problems(config_with(agreed, "distributed.zero_stage=3"))
    assert "`zero_optimization.stage` is 1, but `distributed.zero_stage` makes it 3" in problem.problem


@pytest.mark.parametrize(
    ("text", "problem"), [("[1]", "no JSON object"), ("{", "is no JSON"), (None, "cannot be read")]
)
def test_a_file_that_is_none_is_refused(config_with, tmp_path, text, problem):
    config = config_with(text or "{}")
    if text is None:
        (tmp_path / "ds.json").unlink()
    assert problem in settings_problems(config)[0].problem


@pytest.mark.parametrize(
    ("version", "problem"), [(None, "`deepspeed` is not installed"), ("0.19.7", "DeepSpeed 0.19.7 is too old")]
)
def test_a_package_that_is_missing_or_old_is_refused_before_anything_is_waited_for(monkeypatch, version, problem):
    def version_of(_name):
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", version_of)
    config = load_config(None, overrides=list(DEEPSPEED), environ={}).config
    with pytest.raises(ConfigError, match=problem) as refused:
        open_devices(config, Options())
    assert "llmtune[deepspeed]" in str(refused.value)
    # A stage is DeepSpeed's, whatever `auto` would have chosen.
    with pytest.raises(ConfigError, match=problem):
        open_devices(load_config(None, overrides=["distributed.zero_stage=2"], environ={}).config, Options())
    monkeypatch.setattr(metadata, "version", lambda _name: "0.19.10")
    check_deepspeed(config)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("training.optimizer=muon",), "only AdamW"),
        (("adapter.method=lora", "model.quantization=4bit"), "quantized weights"),
        (("training.precision=fp16",), "loss scale of fp16"),
        (("training.compile=true",), "compiled blocks"),
        (("training.step_in_backward=true", "training.max_grad_norm=null"), "moves in the backward pass"),
        (("tracking.watch=gradients",), "histograms"),
        (("objective.method=dpo",), "answers that are compared"),
        (("adapter.method=lora", "adapter.modules_to_save=[lm_head]"), "beside its frozen copy"),
        (("adapter.method=lora", "adapter.train_tokens=[a]"), "single rows of a table"),
        (("adapter.method=lora", "adapter.dora=true"), "DoRA reads whole weights"),
        (("distributed.sequence_parallel=2",), "ways of llmtune's own"),
        (("distributed.zero_stage=2", "distributed.offload=all"), "only where they are divided"),
        (("distributed.strategy=fsdp", "distributed.zero_stage=2"), "stages are those of DeepSpeed"),
        (("distributed.strategy=fsdp", "distributed.offload=optimizer"), "fsdp keeps the optimizer's state"),
        (("distributed.strategy=ddp", "distributed.offload=all"), "nothing waits on the host"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(words, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config(None, overrides=[*DEEPSPEED, *words], environ={})
