"""What a run was made of, and what has changed when it goes on: key by key, each change with what it does (P2)."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from llmtune.common.secrets import redacted_command
from llmtune.errors import CheckpointError, Problem

__all__ = ["Difference", "Effect", "compare", "describe_machine", "refuse_changes"]

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "numpy",
    "llmtune",
)


class Effect(IntEnum):
    """What a change between stop and resume does, from nothing to impossible."""

    HARMLESS = 0
    """The finished run is the same, bit for bit."""
    ROUNDING = 1
    """The same rows and rates, but sums may round differently: said before the first step."""
    SCHEDULE = 2
    """Another training from here on: needs the user's word."""
    SHAPES = 3
    """The saved tensors no longer fit, or mean something else: refused."""


class Difference(NamedTuple):
    """One key that is not as it was."""

    key: str
    was: Any
    now: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key} was {_short(self.was)}, is now {_short(self.now)}"


def _short(value: Any) -> str:
    """A value as a person reads it: of a digest the beginning tells enough."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value) else repr(value)


GLOBAL_BATCH = "global_batch_size"
_CUTS_OF_A_STEP = ("world_size", "config.training.batch_size", "config.training.gradient_accumulation_steps")

# The first pattern that fits a key decides; a key without one needs the user's word, so that a new key is never passed
# over.
EFFECTS: tuple[tuple[str, Effect], ...] = (
    ("run_id", Effect.SHAPES),
    ("digests.tokenizer", Effect.SHAPES),
    ("digests.base", Effect.SHAPES),
    ("digests.*", Effect.SCHEDULE),
    ("versions.*", Effect.ROUNDING),
    ("threads", Effect.ROUNDING),
    ("device*", Effect.ROUNDING),
    ("processor", Effect.ROUNDING),
    ("engine*", Effect.ROUNDING),
    (GLOBAL_BATCH, Effect.SCHEDULE),
    ("world_size", Effect.ROUNDING),
    ("config.training.batch_size", Effect.ROUNDING),
    ("config.training.gradient_accumulation_steps", Effect.ROUNDING),
    ("config.training.engine", Effect.ROUNDING),
    ("config.training.compile", Effect.ROUNDING),
    ("config.training.step_in_backward", Effect.ROUNDING),  # the same update; windows may be cut otherwise on a CPU
    ("config.training.max_minutes", Effect.HARMLESS),
    ("config.training.max_skipped_steps", Effect.HARMLESS),
    ("config.training.optimizer", Effect.SHAPES),
    ("config.model.attention", Effect.ROUNDING),
    ("config.model.gradient_checkpointing", Effect.ROUNDING),
    ("config.model.weights_prepack", Effect.HARMLESS),  # the same bits
    ("config.model.name", Effect.HARMLESS),  # the digest of the base decides: a moved folder is the same model
    ("config.model.revision", Effect.HARMLESS),
    ("config.model.tokenizer", Effect.HARMLESS),  # the digest of the tokenizer decides, which covers its template
    ("config.model.chat_template", Effect.HARMLESS),
    ("config.model.*", Effect.SHAPES),
    ("config.adapter.alpha", Effect.SCHEDULE),
    ("config.adapter.dropout", Effect.SCHEDULE),
    ("config.adapter.*", Effect.SHAPES),
    ("config.data.num_workers", Effect.HARMLESS),
    ("config.data.cache_dir", Effect.HARMLESS),
    ("config.data.train", Effect.HARMLESS),  # the digest of the data decides: a moved file is the same data
    ("config.data.eval", Effect.HARMLESS),
    ("config.evaluation.early_stopping_*", Effect.SCHEDULE),
    ("config.evaluation.*", Effect.HARMLESS),
    ("config.run.seed", Effect.SCHEDULE),
    ("config.run.*", Effect.HARMLESS),
    ("config.checkpoint.*", Effect.HARMLESS),
    ("config.tracking.*", Effect.HARMLESS),
    ("config.distributed.*", Effect.ROUNDING),
    ("config.*", Effect.SCHEDULE),
    ("git_revision", Effect.HARMLESS),
    ("command", Effect.HARMLESS),
    ("machine", Effect.HARMLESS),
    ("platform", Effect.HARMLESS),
)


def effect_of(key: str) -> Effect:
    """Return what a change of the dotted `key` does.

    >>> effect_of("config.adapter.r").name, effect_of("threads").name, effect_of("something.new").name
    ('SHAPES', 'ROUNDING', 'SCHEDULE')
    """
    return next((effect for pattern, effect in EFFECTS if fnmatchcase(key, pattern)), Effect.SCHEDULE)


def compare(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return every key in which two identities differ, the gravest first.

    Identities are nested dicts with `digests`, `versions`, `threads`, `world_size`, `device`, `config` and so on; a key
    that only one of them has counts as None in the other. Of `config.data.train_on` and the like only exact keys are
    compared, so lists count as one value.
    """
    flat_was, flat_now = dict(_flat(was)), dict(_flat(now))
    is_elastic = GLOBAL_BATCH in flat_was and GLOBAL_BATCH in flat_now
    keys = sorted(flat_was.keys() | flat_now.keys())
    found = []
    for key in keys:
        if flat_was.get(key) != flat_now.get(key):
            effect = Effect.SCHEDULE if key in _CUTS_OF_A_STEP and not is_elastic else effect_of(key)
            found.append(Difference(key, flat_was.get(key), flat_now.get(key), effect))
    return sorted(found, key=lambda one: -one.effect)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, one in value.items():
        if isinstance(one, Mapping):
            rows += _flat(one, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", list(one) if isinstance(one, tuple) else one))
    return rows


def refuse_changes(differences: Sequence[Difference], *, where: str, allow_changes: bool = False) -> list[Difference]:
    """Return the differences a run can go on with, to be said before the first step.

    Raises CheckpointError with every change that makes the checkpoint unusable, and, unless `allow_changes`, every one
    that would make it another training from here on.
    """
    grave = [one for one in differences if one.effect is Effect.SHAPES]
    if grave:
        fix = "put it back as it was, or start a new run with `llmtune train`"
        raise CheckpointError.all([Problem(f"the checkpoint no longer fits: {one}", where, fix) for one in grave])
    other = [one for one in differences if one.effect is Effect.SCHEDULE]
    if other and not allow_changes:
        fix = "put it back as it was, or say --allow-changes to go on with another training from here"
        raise CheckpointError.all([Problem(f"this would be another training: {one}", where, fix) for one in other])
    return list(differences)


def describe_machine(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the part of a run's identity that the machine gives: versions, platform, processor, git revision, the
    command without secrets.

    The rest (threads, devices, digests) is added by those who know it. Nothing is imported for the versions.
    """
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in LIBRARIES if (found := _version(name))},
        },
        "platform": platform.platform(),
        "processor": _processor(),
        "git_revision": git_revision(Path.cwd()),
        "command": redacted_command(list(sys.argv if command is None else command)),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Name the processor, because its instructions decide how sums round."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_revision(folder: Path) -> str | None:
    """Return the commit checked out in `folder` or above it, None outside a repository.

    The repository's files are read; git itself is not run, because a repository's settings can name programs that git
    then starts.
    """
    try:
        top = next((one for one in (folder, *folder.parents) if (one / ".git").exists()), None)
        if top is None:
            return None
        git = top / ".git"
        if git.is_file():  # a worktree or submodule: the file says where the real folder is
            git = top / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return _commit(head)
        name = head.removeprefix("ref:").strip()
        common = git / (git / "commondir").read_text(encoding="utf-8").strip() if (git / "commondir").is_file() else git
        for place in (git, common):
            if (place / name).is_file():
                return _commit((place / name).read_text(encoding="utf-8"))
        lines = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return next((_commit(line.partition(" ")[0]) for line in lines if line.endswith(f" {name}")), None)


def _commit(text: str) -> str | None:
    commit = text.strip()
    return commit if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit) else None
