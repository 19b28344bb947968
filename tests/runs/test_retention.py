"""P6: nothing is deleted before its successor is there and whole; by step, never by time."""

import os

import pytest

from disk_faults import Failing
from llmtune import durable
from llmtune.runs import checkpoint


def names_in(folder):
    return sorted(one.name for one in folder.iterdir())


def steps(run):
    return [one.step for one in checkpoint.all_checkpoints(run)]


def test_the_newest_are_kept_by_step_and_never_by_time(run, story):
    """P6: the first saved has the latest time."""
    for step in (10, 20, 30, 40):
        path = story.save(step)
        os.utime(path, (10**9 - step, 10**9 - step))
    assert checkpoint.delete_old_checkpoints(run, keep_last=2) == []
    assert steps(run) == [30, 40]


def test_protected_steps_are_kept_whatever_their_age(run, story):
    """P6: best and resumed-from."""
    for step in (1, 2, 3, 4, 5):
        story.save(step)
    checkpoint.delete_old_checkpoints(run, keep_last=1, protected_steps={1, 3})
    assert steps(run) == [1, 3, 5]


def test_zero_keeps_all(run, story):
    for step in (1, 2, 3):
        story.save(step)
    assert checkpoint.delete_old_checkpoints(run, keep_last=0) == []
    assert steps(run) == [1, 2, 3]


def test_a_damaged_successor_deletes_nothing(run, story):
    """P6: the newest is re-read before anything goes."""
    for step in (1, 2):
        path = story.save(step)
    (path / "state.json").write_text("{}")
    warnings = checkpoint.delete_old_checkpoints(run, keep_last=1)
    assert steps(run) == [1, 2]
    assert warnings == [
        "kept 1 older checkpoints, because the newest one is damaged: `state.json` has 2 bytes instead of 38 (step-000002)"  # noqa: E501
    ]


def test_a_damaged_successor_is_deleted_for_by_a_mutant_that_does_not_re_read(run, story, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", lambda one, **_: [])
    with pytest.raises(AssertionError):
        test_a_damaged_successor_deletes_nothing(run, story)


def test_a_failed_delete_is_a_warning(run, story):
    """P6."""
    for step in (1, 2):
        story.save(step)
    with durable.use_backend(Failing(1, 30, for_ever=True)):
        (warning,) = checkpoint.delete_old_checkpoints(run, keep_last=1)
    assert "an old checkpoint stays: cannot delete: Read-only file system (EROFS)" in warning
    assert steps(run) == [1, 2]


def test_other_folders_are_left_alone(run, story):
    for step in (1, 2):
        story.save(step)
    story.save_best(1)
    (run.checkpoints / "step-000000.damaged").mkdir()
    checkpoint.delete_old_checkpoints(run, keep_last=1)
    assert names_in(run.checkpoints) == ["best", "step-000000.damaged", "step-000002"]
