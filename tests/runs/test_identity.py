"""What changed between a stop and a resume is found key by key and answered by what it does (P2)."""

import subprocess

import pytest

from llmtune.config.keys import FORMER_KEYS
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError
from llmtune.runs.identity import (
    EFFECTS,
    Difference,
    Effect,
    compare,
    describe_machine,
    effect_of,
    git_revision,
    refuse_changes,
)

WAS = {
    "versions": {"torch": "2.12"},
    "threads": 2,
    "world_size": 1,
    "global_batch_size": 16,
    "digests": {"data": "a", "tokenizer": "b", "base": "c"},
    "config": {
        "training": {"learning_rate": 1e-4, "batch_size": 8},
        "adapter": {"r": 16},
        "tracking": {"project": "p"},
    },
}


def changed(key, value):
    now = {name: dict(one) if isinstance(one, dict) else one for name, one in WAS.items()}
    place, parts = now, key.split(".")
    for part in parts[:-1]:
        place[part] = dict(place[part])
        place = place[part]
    place[parts[-1]] = value
    return compare(WAS, now)


@pytest.mark.parametrize(
    ("key", "value", "effect"),
    [
        ("config.tracking.project", "q", Effect.HARMLESS),
        ("threads", 1, Effect.ROUNDING),
        ("versions.torch", "2.13", Effect.ROUNDING),
        ("world_size", 2, Effect.ROUNDING),
        ("config.training.batch_size", 4, Effect.ROUNDING),
        ("global_batch_size", 8, Effect.SCHEDULE),
        ("config.training.learning_rate", 2e-4, Effect.SCHEDULE),
        ("digests.data", "z", Effect.SCHEDULE),
        ("digests.tokenizer", "z", Effect.SHAPES),
        ("digests.base", "z", Effect.SHAPES),
        ("config.adapter.r", 8, Effect.SHAPES),
    ],
)
def test_each_change_is_named_with_what_it_does(key, value, effect):
    (difference,) = changed(key, value)
    assert (difference.key, difference.now, difference.effect) == (key, value, effect)


def test_nothing_changed_is_nothing_to_say():
    assert compare(WAS, WAS) == []
    assert compare({"a": (1, 2)}, {"a": [1, 2]}) == []


def test_a_key_that_is_new_needs_the_users_word():
    (difference,) = compare(WAS, {**WAS, "invented": 1})
    assert difference == ("invented", None, 1, Effect.SCHEDULE)


@pytest.mark.parametrize(
    "key", ["world_size", "config.training.batch_size", "config.training.gradient_accumulation_steps"]
)
def test_another_cut_of_a_step_is_harmless_only_where_the_whole_step_is_known_to_be_the_same(key):
    """P9."""
    parts = key.split(".")
    was, now = ({}, {})
    for one, value in ((was, 1), (now, 2)):
        for part in parts[:-1]:
            one = one.setdefault(part, {})
        one[parts[-1]] = value
    assert [one.effect for one in compare(was, now)] == [Effect.SCHEDULE]
    assert [one.effect for one in compare({**was, "global_batch_size": 4}, {**now, "global_batch_size": 4})] == [
        Effect.ROUNDING
    ]


def test_harmless_and_rounding_changes_go_on_and_are_said():
    differences = changed("threads", 1)
    assert refuse_changes(differences, where="run") == differences
    assert str(differences[0]) == "threads was 2, is now 1"


def test_another_training_needs_the_users_word():
    differences = changed("digests.data", "z")
    with pytest.raises(
        CheckpointError, match=r"this would be another training: digests\.data was 'a', is now 'z'"
    ) as caught:
        refuse_changes(differences, where="run")
    assert caught.value.exit_code == 5
    assert refuse_changes(differences, where="run", allow_changes=True) == differences


def test_a_digest_is_shown_by_its_beginning_only():
    one, other = "ba8913e9ef00" * 5 + "abcd", "6279ca2ab8fe" * 5 + "abcd"
    assert (
        str(Difference("digests.batches", one, other, Effect.SCHEDULE))
        == "digests.batches was ba8913e9ef00..., is now 6279ca2ab8fe..."
    )
    assert (
        str(Difference("config.run.name", one[:12], None, Effect.HARMLESS))
        == "config.run.name was 'ba8913e9ef00', is now None"
    )


def test_tensors_that_no_longer_fit_are_refused_whatever_is_said_and_all_at_once():
    differences = compare(WAS, {**WAS, "digests": {"data": "z", "tokenizer": "z", "base": "z"}})
    assert [one.effect for one in differences] == [Effect.SHAPES, Effect.SHAPES, Effect.SCHEDULE]
    with pytest.raises(CheckpointError, match="the checkpoint no longer fits") as caught:
        refuse_changes(differences, where="run", allow_changes=True)
    assert len(caught.value.problems) == 2


def config_keys(value, prefix="config"):
    for name in value.__dataclass_fields__:
        one = getattr(value, name)
        if hasattr(one, "__dataclass_fields__"):
            yield from config_keys(one, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


def test_every_config_key_has_an_effect_and_every_pattern_still_names_something():
    keys = list(config_keys(Config()))
    assert len(keys) > 70
    assert {effect_of(key) for key in keys} == set(Effect)
    for key in (
        "config.data.train_on",
        "config.data.max_length",
        "config.training.epochs",
        "config.training.precision",
        "config.run.seed",
    ):
        assert effect_of(key) is Effect.SCHEDULE, key
    known = [*keys, *(f"config.{key}" for key in FORMER_KEYS)]  # runs of earlier versions hold those
    for pattern, _ in EFFECTS:
        section = pattern.removesuffix("*").rstrip("._")
        if section.startswith("config."):
            assert any(key.startswith(section) for key in known), f"{pattern} names no key of the config"


def test_the_machine_is_described_without_secrets():
    found = describe_machine(["llmtune", "train", "tracking.api_key=canary", "--token", "canary"])
    assert "canary" not in str(found)
    assert found["versions"]["torch"]
    assert found["processor"]


def git(folder, *arguments):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", "-C", folder, *settings, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_git_revision_is_read_as_git_reads_it(tmp_path):
    assert git_revision(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_revision(tmp_path) is None
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    (tmp_path / "below").mkdir()
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(tmp_path / "below") == head
    git(tmp_path, "pack-refs", "--all")
    assert git_revision(tmp_path) == head
    git(tmp_path, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    assert git_revision(tmp_path / "tree") == head
    git(tmp_path, "worktree", "add", "-q", "-b", "other", str(tmp_path / "branch"))
    assert git_revision(tmp_path / "branch") == head
