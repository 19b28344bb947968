"""P1, P4: what a checkpoint holds, and that it comes back bit for bit."""

import json
import os

import pytest
import torch

from llmtune import durable
from llmtune.engine.state import Snapshot
from llmtune.errors import CheckpointError, MachineError
from llmtune.runs import checkpoint
from llmtune.runs.checkpoint import CheckpointFolder


def names_in(folder):
    return sorted(one.name for one in folder.iterdir())


TENSORS = {
    "optimizer": {
        "a//m": torch.randn(3, 5),
        "a//v": torch.randn(3, 5).bfloat16(),
        "a//step": torch.tensor(7.0),
        "q": torch.arange(6).to(torch.uint8),
    },
    "rng": {"torch": torch.get_rng_state(), "none": torch.empty(0, 4)},
}
STATE = {"training": {"step": 7, "epoch": 0.1 + 0.2, "num_loss_tokens": 1e308}, "rng": {"gauss": None}}


def save(run, step=7):
    return checkpoint.save_checkpoint(
        run, step, lambda folder: (folder / "w").write_bytes(b"w"), Snapshot(TENSORS, STATE), {"threads": 2}
    )


def test_a_snapshot_comes_back_bit_for_bit(run):
    """P2, P4."""
    path = save(run)
    loaded = checkpoint.load(CheckpointFolder(7, path))
    assert loaded.snapshot.state == STATE
    for group, tensors in TENSORS.items():
        assert loaded.snapshot.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            back = loaded.snapshot.tensors[group][name]
            assert back.dtype == tensor.dtype
            assert back.shape == tensor.shape
            assert back.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_a_checkpoint_is_safetensors_and_json_and_a_manifest_that_names_each_file(run):
    """P1, P4."""
    path = save(run)
    assert names_in(path) == ["manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json", "w"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["threads"] == 2
    assert manifest["run_id"] == run.run_id
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        one.name: one.stat().st_size for one in path.iterdir() if one.name != "manifest.json"
    }


def test_the_same_step_saved_again_replaces_the_first(run):
    save(run)
    save(run)
    assert names_in(run.checkpoints) == ["step-000007"]


def test_weights_that_cannot_be_written_leave_nothing_and_keep_the_old(run):
    """P1."""
    old = save(run)

    def fail(folder):
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        checkpoint.save_checkpoint(run, 7, fail, Snapshot(TENSORS, STATE))
    assert names_in(run.checkpoints) == ["step-000007"]
    assert durable.verify_manifest(old) == []


def test_a_library_that_fills_the_disk_is_answered_as_the_disk_would_be(run):
    """P7."""

    def fail(folder):
        raise OSError(28, "No space left on device", str(folder / "x"))

    with pytest.raises(MachineError, match=r"cannot save: No space left on device \(ENOSPC\)"):
        checkpoint.save_checkpoint(run, 7, fail, Snapshot(TENSORS, STATE))


def test_checkpoints_are_ordered_by_step_whatever_their_times(run, story):
    """P6: a clock set back changes nothing."""
    for step, time_s in ((5, 3_000_000), (1_000_000, 1_000_000), (40, 2_000_000)):
        os.utime(story.save(step), (time_s, time_s))
    assert [one.step for one in checkpoint.all_checkpoints(run)] == [5, 40, 1_000_000]
    assert checkpoint.newest_valid(run)[0].step == 1_000_000


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(run, story):
    story.save(3)
    assert checkpoint.checkpoint_of(run, 3).step == 3
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4[\s\S]*choose one of: \[3\]"):
        checkpoint.checkpoint_of(run, 4)


def test_a_format_of_the_future_is_named(run):
    path = save(run)
    with durable.commit_folder(path, manifest={"format": 2, "step": 7, "run_id": run.run_id}) as folder:
        (folder / "w").write_bytes(b"w")
    assert "checkpoint format 2; this version reads 1" in str(checkpoint.verify(CheckpointFolder(7, path)))
