"""P7: room is forecast before step 1, and a save that fails costs a save, not the run."""

import errno
from dataclasses import replace

import pytest

from disk_faults import Failing
from llmtune import durable
from llmtune.config.layers import load_config
from llmtune.errors import MachineError
from llmtune.runs import checkpoint
from llmtune.runs.disk import SaveAttempts, forecast_disk, free_bytes_at

MARGIN = 64 << 20


def forecast(folder, *, saves, keep_last, weights=0, optimizer=0, best=False, **more):
    """The forecast of a run with `saves` checkpoints of `weights` + `optimizer` bytes."""
    config = load_config(
        None,
        overrides=[
            f"run.output_dir={folder}",
            f"checkpoint.keep_last={keep_last}",
            "checkpoint.every_steps=2",
            f"checkpoint.keep_best={str(best).lower()}",
        ],
        environ={},
    ).config
    return forecast_disk(
        config,
        weights_bytes=weights,
        optimizer_bytes=optimizer,
        total_steps=2 * saves,
        steps_per_epoch=7,
        has_heldout=True,
        **more,
    )


def test_the_forecast_counts_what_is_there_at_the_worst_moment(tmp_path):
    """Four checkpoints, the best model twice, the final one."""
    free = MARGIN + 4 * 1000 + 2 * 10 + 10
    disk = forecast(tmp_path, saves=50, keep_last=3, weights=10, optimizer=990, best=True, free_bytes=free)
    assert disk.needed_bytes == disk.free_bytes == MARGIN + 4030


@pytest.mark.parametrize(("saves", "keep_last", "checkpoints"), [(50, 0, 50), (2, 3, 2), (50, 1, 2), (0, 3, 0)])
def test_the_number_of_checkpoints_is_what_retention_leaves_and_the_one_being_written(
    tmp_path, saves, keep_last, checkpoints
):
    disk = forecast(tmp_path, saves=saves, keep_last=keep_last, optimizer=7)
    assert disk.needed_bytes == MARGIN + 7 * checkpoints


def test_without_a_number_of_steps_a_checkpoint_is_saved_once_an_epoch(tmp_path):
    config = load_config(None, overrides=[f"run.output_dir={tmp_path}", "checkpoint.keep_last=0"], environ={}).config
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=None))
    disk = forecast_disk(
        config, weights_bytes=0, optimizer_bytes=1000, total_steps=15, steps_per_epoch=7, has_heldout=False
    )
    assert disk.parts["3 checkpoints"] == 3000


def test_a_disk_that_is_one_byte_too_small_is_refused_with_the_numbers_and_the_fix(tmp_path):
    with pytest.raises(MachineError) as caught:
        forecast(tmp_path, saves=9, keep_last=3, optimizer=10**9, free_bytes=MARGIN + 4 * 10**9 - 1)
    assert caught.value.exit_code == 6
    (problem,) = caught.value.problems
    assert (
        "the disk is too small for this run: 4.07 GB of 4.07 GB free (4 checkpoints 4.00 GB, logs 67.11 MB)"
        in problem.problem
    )
    assert problem.where == str(tmp_path)
    assert problem.fix == "free 1 B, choose run.output_dir on another disk, or keep less (checkpoint.keep_last=1)"


def test_the_room_of_a_folder_that_is_not_there_yet_is_that_of_the_nearest_above_it(tmp_path):
    assert abs(free_bytes_at(tmp_path / "a" / "b") - free_bytes_at(tmp_path)) < 10**9


def sweeper(run):
    return lambda: durable.remove_leftovers(run.checkpoints, everything=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_save_that_fails_once_is_tried_again_at_once(run, story, number):
    """P7."""
    story.save(1)
    attempts = SaveAttempts(sweeper(run))
    with durable.use_backend(Failing(3, number)):
        path = attempts.save(lambda: story.save(2))
    assert path.name == "step-000002"
    assert attempts.failure is None
    attempts.raise_if_failed()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_save_that_never_works_keeps_the_old_goes_on_and_is_exit_6_at_the_end(run, story, number):
    """P7."""
    story.save(1)
    attempts = SaveAttempts(sweeper(run))
    with durable.use_backend(Failing(3, number, for_ever=True)):
        assert attempts.save(lambda: story.save(2)) is None
    assert checkpoint.newest_valid(run) == (checkpoint.checkpoint_of(run, 1), [])
    with pytest.raises(
        MachineError, match=r"the last save of the checkpoint failed, .*; the one before it stands"
    ) as caught:
        attempts.raise_if_failed()
    assert caught.value.exit_code == 6
    assert durable.errno_of(caught.value) == number


def test_a_later_save_that_works_makes_the_run_safe_again(run, story):
    """P7."""
    attempts = SaveAttempts(sweeper(run))
    with durable.use_backend(Failing(1, errno.ENOSPC, for_ever=True)):
        attempts.save(lambda: story.save(1))
    assert attempts.save(lambda: story.save(2)) is not None
    attempts.raise_if_failed()
    assert [one.name for one in run.checkpoints.iterdir()] == ["step-000002"]


def test_a_best_model_that_is_saved_does_not_make_up_for_a_checkpoint_that_is_not(run, story):
    """P7."""
    attempts = SaveAttempts(sweeper(run))
    with durable.use_backend(Failing(1, errno.ENOSPC, for_ever=True)):
        attempts.save(lambda: story.save(1))
    attempts.save(lambda: story.save_best(1), subject="best model")
    assert attempts.failure is None
    with pytest.raises(MachineError, match="the last save of the checkpoint failed"):
        attempts.raise_if_failed()


def test_what_no_disk_recovers_from_is_raised_at_once(run, story):
    attempts = SaveAttempts(sweeper(run))
    with durable.use_backend(Failing(1, errno.EACCES)), pytest.raises(MachineError, match="EACCES"):
        attempts.save(lambda: story.save(1))
