"""Every operation of a save, a retention, a change of best and a log, one by one: killed, failed, cut off from power.

This is the method of the promises; the laws themselves stand in `Scene` (conftest.py), and `test_mutants.py` shows that
each one bites.
"""

import pytest

from disk_faults import Killed, Killing, Unsynced
from llmtune import durable
from llmtune.runs.folder import RunFolder, create_run, list_runs

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_a_run_killed_at_any_operation_of_a_save_goes_on_and_ends_the_same(scene):
    """P1, P2, P6."""
    assert scene.kill_everywhere() > 50


def test_a_recovery_that_is_killed_itself_can_be_recovered_from(scene):
    """P1: the sweep and the setting aside, at each of their operations, after a save killed at every fifth."""
    assert scene.kill_twice(every=5) > 50


def write_config(folder):
    durable.write_text(folder / "config.yaml", "all of it")


def test_a_run_whose_making_is_killed_exists_whole_or_not_at_all(scene):
    """P1."""
    for at in range(1, 30):
        place = scene.fresh_path()
        try:
            with durable.use_backend(Killing(at, below=Unsynced())), create_run(place, "a", fill=write_config):
                break
        except Killed:
            for run in list_runs(place):
                RunFolder.open(run.path).close()
                assert (run.path / "config.yaml").read_text() == "all of it"
            with create_run(place, "b") as run:
                assert run.state == "running"
            assert [one.name for one in place.iterdir() if one.name.startswith(".")] == []
    assert at > 10


@FORKS
def test_a_process_that_really_dies_leaves_what_the_simulated_kill_leaves(scene):
    """P1: SIGKILL in a forked child, at every ninth operation here and at each one in the campaign."""
    assert scene.kill_for_real(every=9) > 5


@FORKS
@pytest.mark.campaign
def test_a_process_that_really_dies_at_any_operation_leaves_the_old_or_the_new(scene):
    """P1."""
    assert scene.kill_for_real(every=1) > 50


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_a_disk_that_fails_at_any_operation_leaves_the_old_or_the_new(scene, for_ever):
    """P7: the refusal says what, where, why and the fix; what stood stands; the run goes on when the disk is well
    again. The faults take turns over the operations; the campaign tries each at each.
    """
    fired, refused = scene.fail_everywhere("ENOSPC", "EIO", "EROFS", for_ever=for_ever)
    assert fired >= refused > 30


@pytest.mark.campaign
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EROFS"])
def test_a_disk_that_fails_in_every_way_at_any_operation_leaves_the_old_or_the_new(scene, fault, for_ever):
    """P7."""
    fired, refused = scene.fail_everywhere(fault, for_ever=for_ever)
    assert fired >= refused > 30


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_short_writes_are_written_on_and_change_nothing(scene, for_ever):
    """P7."""
    fired, refused = scene.fail_everywhere("short write", for_ever=for_ever)
    assert fired > 5
    assert refused == 0


def test_a_power_loss_at_any_moment_leaves_the_old_or_the_new_never_neither(scene):
    """P1: the disk states that the trace allows, with unsynced data and names dropped, torn and reordered."""
    assert scene.lose_power_everywhere() > 500
