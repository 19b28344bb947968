"""P5: whatever happens to a committed checkpoint is found before it is used, and the newest valid one is used instead."""  # noqa: E501

import pytest

from llmtune import durable
from llmtune.errors import CheckpointError
from llmtune.runs import checkpoint
from llmtune.runs.folder import RunFolder


def test_every_corruption_of_a_checkpoint_is_found(scene):
    """P5: 390 of 390 here, 10,000 of 10,000 in the campaign."""
    ways = scene.corrupt(390)
    assert len(ways) == 13
    assert set(ways.values()) == {30}


@pytest.mark.campaign
def test_every_corruption_of_ten_thousand_is_found(scene):
    """P5."""
    assert scene.corrupt(10_000, seed=1).total() == 10_000


def test_every_single_bit_of_every_file_matters(scene):
    """P5: all of them, one at a time, manifest included."""
    with RunFolder.open(scene.copy()) as run:
        folder = run.checkpoints / "step-000001"
        flips = 0
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            for place in range(0, len(data), max(1, len(data) // 60)):
                file.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
                assert durable.verify_manifest(folder) != [], f"{file.name}, byte {place}"
                flips += 1
            file.write_bytes(data)
        assert durable.verify_manifest(folder) == []
        assert flips > 300


def test_a_whole_checkpoint_in_the_wrong_place_is_found(scene):
    """P5: by its step and by its run."""
    scene.exchange()


def damage(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_the_newest_valid_checkpoint_is_used_and_the_bad_ones_are_set_aside_and_named(run, story):
    """P5."""
    for step in (1, 2, 3):
        story.save(step)
    damage(run.checkpoints / "step-000002")
    damage(run.checkpoints / "step-000003")
    newest, problems = checkpoint.newest_valid(run)
    assert newest.step == 1
    told = "\n".join(map(str, problems))
    assert "step-000002: `model.safetensors` was changed: its sha256 does not fit" in told
    assert "step-000003: damaged; set aside as step-000003.damaged" in told
    assert sorted(one.name for one in run.checkpoints.iterdir()) == [
        "step-000001",
        "step-000002.damaged",
        "step-000003.damaged",
    ]
    assert checkpoint.newest_valid(run) == (newest, [])


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(run, story):
    """P5: nothing is deleted."""
    story.save(1)
    for _ in range(2):
        damage(story.save(2))
        checkpoint.newest_valid(run)
    assert {one.name for one in run.checkpoints.iterdir()} == {
        "step-000001",
        "step-000002.damaged",
        "step-000002.damaged-2",
    }


def test_when_all_are_bad_the_answer_is_exit_5_and_nothing_is_touched(run, story):
    """P5: no silent start from zero."""
    for step in (1, 2):
        damage(story.save(step))
    with pytest.raises(
        CheckpointError, match="none of the 2 checkpoints of this run can be used; nothing was deleted"
    ) as caught:
        checkpoint.newest_valid(run)
    assert caught.value.exit_code == 5
    assert len(caught.value.problems) == 3
    assert sorted(one.name for one in run.checkpoints.iterdir()) == ["step-000001", "step-000002"]


def test_checkpoints_set_aside_earlier_are_not_forgotten(run, story):
    """P5: a run whose only checkpoint was set aside has not "never saved"."""
    (run.checkpoints / "step-000001.damaged").mkdir()
    with pytest.raises(CheckpointError, match="set aside earlier"):
        checkpoint.newest_valid(run)


def test_a_run_that_never_saved_says_so(run):
    assert checkpoint.newest_valid(run) == (None, [])


def test_an_empty_newer_folder_does_not_win_over_a_whole_older_one(run, story):
    """P1."""
    story.save(1)
    (run.checkpoints / "step-000002").mkdir()
    assert checkpoint.newest_valid(run)[0].step == 1


def test_damage_between_the_verification_and_the_loading_is_found(run, story):
    """P5: the bytes that fill the tensors are the bytes that are digested."""
    story.save(1)
    newest, _ = checkpoint.newest_valid(run)
    for name in ("optimizer.safetensors", "state.json"):
        path = newest.path / name
        good = path.read_bytes()
        path.write_bytes(good[:-3] + b"\x01" + good[-2:])
        with pytest.raises(CheckpointError, match="was changed: its sha256 does not fit"):
            checkpoint.load(newest)
        path.write_bytes(good)
    assert checkpoint.load(newest).snapshot.state == {"training": {"step": 1}}
