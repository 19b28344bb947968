"""N15, P2, P10: whole runs whose weights move in the backward pass end as the ordinary run: killed, resumed either way,
diverged.
"""

import pytest
import torch

from llmtune.config.process_options import Options
from llmtune.engine.devices import open_devices
from llmtune.errors import ConfigError, DivergedError
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from training_helpers import in_child, line_count, lines_of, weights_of

UNCLIPPED = ("training.max_grad_norm=null", "training.batch_size=4", "training.gradient_accumulation_steps=1")
EARLY = (*UNCLIPPED, "training.step_in_backward=true")


def optimizer_of(run):
    return (max((run / "checkpoints").glob("step-*")) / "optimizer.safetensors").read_bytes()


def test_a_run_ends_in_the_same_bytes_whichever_way_it_is_stopped_and_gone_on_with(config_of, tmp_path):
    """N15, P2: metrics, weights and optimizer state of the ordinary run; killed in the middle, then gone on with on,
    and off.
    """
    ordinary = training.train(config_of(*UNCLIPPED, name="ordinary")).folder
    enough = line_count(ordinary / "metrics.jsonl") * 2 // 3
    for name, overrides in (("on", ()), ("off", ("training.step_in_backward=false",))):
        killed = tmp_path / "runs" / name
        in_child(
            lambda name=name: training.train(config_of(*EARLY, name=name)),
            kill_when=lambda killed=killed: line_count(killed / "metrics.jsonl") >= enough,
        )
        assert not (killed / "checkpoints" / "final").exists()
        said = []
        training.resume(str(killed), overrides=overrides, print_line=said.append)
        assert lines_of(killed) == lines_of(ordinary)
        assert weights_of(killed) == weights_of(ordinary)
        assert optimizer_of(killed) == optimizer_of(ordinary)
        assert any("training.step_in_backward was True, is now False" in line for line in said) == bool(overrides)


def test_weights_that_moved_with_a_gradient_that_is_not_finite_are_never_saved(config_of, tmp_path):
    """P10: exit 7, the last checkpoint is named and stands, and nothing came after it."""
    with StopRequest() as stop:
        session = training.open_run(
            config_of(*EARLY, "checkpoint.every_steps=2", name="bad"), Options(), stop, print_line=lambda _: None
        )
        weight = next(one for name, one in session.setup.parameters.items() if "layers.0" in name)
        steps = session.steps()
        for _ in range(3):
            next(steps)
        weight.register_hook(lambda gradient: gradient * torch.nan)
        with pytest.raises(DivergedError, match="weights have moved by then") as refused:
            next(steps)
    assert "last good checkpoint is" in refused.value.problems[0].fix
    saved = sorted(
        one.name for one in (tmp_path / "runs" / "bad" / "checkpoints").iterdir() if one.name.startswith("step-")
    )
    assert saved == ["step-000002"]
    finished = training.resume(str(tmp_path / "runs" / "bad"))
    assert finished.state == "finished"
    assert weights_of(finished.folder) == weights_of(
        training.train(config_of(*EARLY, "checkpoint.every_steps=2", name="good")).folder
    )


def test_several_processes_are_refused_before_any_is_waited_for(config_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started") as refused:
        open_devices(config_of(*EARLY).config, Options(no_cuda=True))
    assert refused.value.problems[0].where == "training.step_in_backward"
