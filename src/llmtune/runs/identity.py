"""The identity of a run: everything that decides its numbers, compared key by key when the run is resumed (P2)."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from llmtune.common.records import flat_items
from llmtune.common.secrets import redacted_command
from llmtune.errors import CheckpointError, Problem

__all__ = [
    "Difference",
    "Effect",
    "Identity",
    "MachineDescription",
    "compare",
    "describe_machine",
    "git_revision",
    "refuse_changes",
]

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "liger-kernel",
    "accelerate",
    "datasets",
    "numpy",
    "llmtune",
)


class Digests(TypedDict):
    """The sha256 of everything a run reads."""

    base: str
    start: str | None
    """Of the adapter that training started from."""
    tokenizer: str
    renderer: str
    train: str
    heldout: str | None
    reference: str | None
    """Of a second model that answers are compared with."""
    batches: str
    rewards: str | None
    """Of the rewards that drawn answers are judged by, the user's own code included."""
    loss: str | None
    """Of a loss function of the user's own."""


class Identity(TypedDict):
    """Everything that decides the numbers of a run."""

    config: dict[str, Any]
    """The config as nested plain values, with the values that `auto` was resolved to."""
    digests: Digests
    versions: dict[str, str]
    processor: str
    global_batch_size: int
    device: str
    engine: str
    threads: int
    world_size: int


class MachineDescription(TypedDict):
    """The facts about machine and command line in run.json."""

    versions: dict[str, str]
    """Of Python and of the libraries that are installed."""
    platform: str
    processor: str
    git_revision: str | None
    """Commit of the repository around the working directory."""
    command: list[str]
    """The command line without its secrets."""


class Effect(IntEnum):
    """The effect of a change between stop and resume, in rising order."""

    HARMLESS = 0
    """The finished run is the same, bit for bit."""
    ROUNDING = 1
    """The same rows and rates, but sums may round differently: printed before the first step."""
    SCHEDULE = 2
    """Another training from here on: needs `--allow-changes`."""
    SHAPES = 3
    """The saved tensors no longer fit, or mean something else: refused."""


class Difference(NamedTuple):
    """One key with another value than before."""

    key: str
    was: object
    now: object
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key} was {_short(self.was)}, is now {_short(self.now)}"


def _short(value: object) -> str:
    """Return a value as a person reads it; of a digest only the beginning, of a source of rows what was set.

    >>> _short([{"path": "rows.jsonl", "split": None, "columns": {}, "weight": 1.0}])
    "[{'path': 'rows.jsonl', 'weight': 1.0}]"
    """
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = [{key: entry for key, entry in item.items() if entry not in (None, {}, [])} for item in value]
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value) else repr(value)


GLOBAL_BATCH = "global_batch_size"
_CUTS_OF_A_STEP = ("world_size", "config.training.batch_size", "config.training.gradient_accumulation_steps")

# The first pattern that fits a key decides; a key without one counts as SCHEDULE, so that no new key is overlooked.
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
    ("config.training.deterministic", Effect.ROUNDING),
    ("config.training.step_in_backward", Effect.ROUNDING),  # the same update; windows may be cut otherwise on a CPU
    ("config.training.master_weights", Effect.ROUNDING),  # what is saved is float32 with and without
    ("config.training.max_minutes", Effect.HARMLESS),
    ("config.training.max_skipped_steps", Effect.HARMLESS),
    ("config.training.optimizer", Effect.SHAPES),
    ("config.model.attention", Effect.ROUNDING),
    ("config.model.gradient_checkpointing", Effect.ROUNDING),
    ("config.model.offload_weights", Effect.ROUNDING),  # the same bits, but 4-bit ones are made on the host
    ("config.model.name", Effect.HARMLESS),  # the digest of the base decides: a moved folder is the same model
    ("config.model.revision", Effect.HARMLESS),
    ("config.model.tokenizer", Effect.HARMLESS),  # the digest of the tokenizer decides, which covers its template
    ("config.model.chat_template", Effect.HARMLESS),
    ("config.model.pad_token", Effect.HARMLESS),
    ("config.model.eos_token", Effect.HARMLESS),
    ("config.model.weights_prepack", Effect.HARMLESS),  # a former key; it changed no bit
    ("config.model.*", Effect.SHAPES),
    ("config.objective.reference_model", Effect.HARMLESS),  # the digest of its weights decides
    ("config.objective.reference_revision", Effect.HARMLESS),
    ("config.adapter.start_from", Effect.HARMLESS),  # the digest of its weights decides
    ("config.adapter.alpha", Effect.SCHEDULE),
    ("config.adapter.dropout", Effect.SCHEDULE),
    ("config.adapter.*", Effect.SHAPES),
    ("config.data.num_workers", Effect.HARMLESS),
    ("config.data.cache_dir", Effect.HARMLESS),
    ("config.data.train", Effect.HARMLESS),  # the digest of the data decides: a moved file is the same data
    ("config.data.eval", Effect.HARMLESS),
    ("config.evaluation.early_stopping_*", Effect.SCHEDULE),
    ("config.evaluation.best_by", Effect.SCHEDULE),
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


def compare(was: Mapping[str, object], now: Mapping[str, object]) -> list[Difference]:
    """Return every key in which two identities differ, the gravest effect first.

    A key that only one of them has counts as None in the other; a list counts as one value.
    """
    flat_was, flat_now = dict(flat_items(was)), dict(flat_items(now))
    # Another cut of a step over processes and micro-batches only rounds differently, if the global batch is the same.
    has_global_batch = GLOBAL_BATCH in flat_was and GLOBAL_BATCH in flat_now
    differences = []
    for key in sorted(flat_was.keys() | flat_now.keys()):
        # One of them was read from JSON, which has no tuples.
        before, after = _listed(flat_was.get(key)), _listed(flat_now.get(key))
        if before != after:
            effect = Effect.SCHEDULE if key in _CUTS_OF_A_STEP and not has_global_batch else effect_of(key)
            differences.append(Difference(key, before, after, effect))
    return sorted(differences, key=lambda difference: -difference.effect)


def _listed(value: object) -> object:
    """Return a tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def refuse_changes(differences: Sequence[Difference], *, where: str, allow_changes: bool = False) -> list[Difference]:
    """Return the differences with which a run can be resumed, to be printed before the first step.

    Raises CheckpointError with every change that makes the checkpoint unusable, and, unless `allow_changes`, every one
    that would make it another training from here on.
    """
    fatal = [difference for difference in differences if difference.effect is Effect.SHAPES]
    if fatal:
        fix = "put it back as it was, or start a new run with `llmtune train`"
        raise CheckpointError.all(
            [Problem(f"the checkpoint no longer fits: {difference}", where, fix) for difference in fatal]
        )
    changes = [difference for difference in differences if difference.effect is Effect.SCHEDULE]
    if changes and not allow_changes:
        fix = "put it back as it was, or say --allow-changes to go on with another training from here"
        raise CheckpointError.all(
            [Problem(f"this would be another training: {difference}", where, fix) for difference in changes]
        )
    return list(differences)


def describe_machine(command: Sequence[str] | None = None) -> MachineDescription:
    """Describe this machine and the command line (`sys.argv` when None); no library is imported for its version."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in LIBRARIES if (version := _version(name))},
        },
        "platform": platform.platform(),
        "processor": _processor(),
        "git_revision": git_revision(Path.cwd()),
        "command": redacted_command(list(sys.argv if command is None else command)),
    }


@functools.cache  # a package's metadata is parsed as an e-mail: ten of them cost a third of a small run's start
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the name of the processor, whose instructions decide how sums round."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_revision(folder: Path) -> str | None:
    """Return the commit checked out in `folder` or above it, None outside a repository."""
    # git itself is not run, because the settings of a repository can name programs that git then starts.
    try:
        top = next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)
        if top is None:
            return None
        git = top / ".git"
        if git.is_file():  # a worktree or submodule: the file holds the path of the real folder
            git = top / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return _commit(head)
        name = head.removeprefix("ref:").strip()
        common = git / (git / "commondir").read_text(encoding="utf-8").strip() if (git / "commondir").is_file() else git
        for git_folder in (git, common):
            if (git_folder / name).is_file():
                return _commit((git_folder / name).read_text(encoding="utf-8"))
        lines = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return next((_commit(line.partition(" ")[0]) for line in lines if line.endswith(f" {name}")), None)


def _commit(text: str) -> str | None:
    commit = text.strip()
    return commit if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit) else None
