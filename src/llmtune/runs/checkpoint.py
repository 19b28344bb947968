"""Checkpoints: everything needed to resume a run bit for bit.

They are committed completely or not at all (P1), verified before use (P5), and free of pickle (P4).

checkpoints/step-000100/
    *.safetensors, ...      the weights, written by the caller
    optimizer.safetensors   one file for each group of tensors of the snapshot
    state.json              the counters and plain numbers of the snapshot
    manifest.json           bytes and sha256 of each file, step, run_id, versions, threads, world size, digests
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

from llmtune import durable
from llmtune.common.text import printable
from llmtune.engine.state import Snapshot
from llmtune.errors import CheckpointError, MachineError, Problem
from llmtune.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor


__all__ = [
    "CheckpointFolder",
    "all_checkpoints",
    "checkpoint_named",
    "checkpoint_of",
    "delete_old_checkpoints",
    "delete_replaced",
    "load",
    "newest_valid",
    "read_weights",
    "save_checkpoint",
    "save_folder",
    "set_aside_later",
    "verify",
]

STATE_FILE = "state.json"
DAMAGED_SUFFIX = ".damaged"
REPLACED_SUFFIX = ".replaced"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointManifest(durable.Manifest):
    """The manifest of a checkpoint; its writer may have added more (versions, threads, world_size)."""

    format: int
    step: int
    run_id: str
    groups: list[str]
    """Names of the snapshot's groups of tensors."""


class CheckpointFolder(NamedTuple):
    """The folder of a checkpoint, valid or not, and the step in its name."""

    step: int
    path: Path


class LoadedCheckpoint(NamedTuple):
    """A checkpoint in memory; its weights stay in `path` for the loader of the model."""

    step: int
    path: Path
    snapshot: Snapshot
    manifest: CheckpointManifest


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of `step`.

    >>> checkpoint_name(100)
    'step-000100'
    """
    return f"step-{step:06d}"


def checkpoint_named(name: str) -> str:
    """Return the folder name of a checkpoint as people name it: `100`, `step-100`, or any other name as it is.

    >>> checkpoint_named("100"), checkpoint_named("step-100"), checkpoint_named("best")
    ('step-000100', 'step-000100', 'best')
    """
    step = name.removeprefix("step-")
    return checkpoint_name(int(step)) if step.isdecimal() else name


def save_checkpoint(
    run: RunFolder,
    step: int,
    write_weights: Callable[[Path], None],
    snapshot: Snapshot,
    manifest_extra: Mapping[str, object] | None = None,
    *,
    read: Mapping[str, Callable[[str], Tensor]] = MappingProxyType({}),
) -> Path:
    """Commit the checkpoint of `step` and return its folder; on return it survives a power loss.

    `write_weights` writes any files into the folder it is given, `snapshot` becomes state.json and one safetensors file
    for each group. `manifest_extra` (versions, threads, world_size, digests) goes into the manifest. `read`: of groups
    that are held in parts, what gives a tensor in its full shape by its name (see `durable.write_tensors`). An older
    checkpoint of the same step is replaced. Raises MachineError; every earlier checkpoint is then untouched.
    """
    durable.make_folder(run.checkpoints)
    target = run.checkpoints / checkpoint_name(step)
    # The caller names its own files, and one of these names would be overwritten without a word.
    reserved = {durable.MANIFEST, STATE_FILE, *(f"{group}.safetensors" for group in snapshot.tensors)}
    manifest = {
        **(manifest_extra or {}),
        "format": _FORMAT,
        "step": step,
        "run_id": run.run_id,
        "groups": sorted(snapshot.tensors),
    }
    with durable.commit_folder(target, manifest=manifest) as staging:
        write_weights(staging)
        taken = reserved & {path.name for path in staging.iterdir()}
        assert not taken, f"the weights may not be called {taken}"
        for group, tensors in snapshot.tensors.items():
            durable.write_tensors(staging / f"{group}.safetensors", tensors, read=read.get(group))
        durable.write_json(staging / STATE_FILE, snapshot.state)
    return target


def save_folder(
    target: Path, write: Callable[[Path], None], manifest_extra: Mapping[str, object] | None = None
) -> Path:
    """Commit as `target` (best/, final/) the files that `write` puts into the folder it is given.

    An old `target` is replaced. Raises MachineError.
    """
    durable.make_folder(target.parent)
    with durable.commit_folder(target, manifest=manifest_extra) as staging:
        write(staging)
    return target


def all_checkpoints(run: RunFolder) -> list[CheckpointFolder]:
    """Return the run's checkpoints by step, the newest last, valid or not. Raises MachineError."""
    if not run.checkpoints.is_dir():
        return []
    with durable.translate_os_errors("list", run.checkpoints):
        folders = [
            CheckpointFolder(int(match[1]), path)
            for path in run.checkpoints.iterdir()
            if (match := _NAME.fullmatch(path.name))
        ]
    # By step, never by the time of a file: a clock set back would make an old checkpoint the newest.
    return sorted(folders)


def checkpoint_of(run: RunFolder, step: int) -> CheckpointFolder:
    """Return the checkpoint of `step`. Raises CheckpointError with the steps there are."""
    steps = [checkpoint.step for checkpoint in all_checkpoints(run)]
    if step not in steps:
        raise CheckpointError(f"no checkpoint of step {step}", printable(run.checkpoints), f"choose one of: {steps}")
    return CheckpointFolder(step, run.checkpoints / checkpoint_name(step))


def verify(checkpoint: CheckpointFolder, *, run_id: str | None = None, past_cache: bool = False) -> list[Problem]:
    """Re-read every byte of a checkpoint and return its differences from what was saved (P5).

    Besides every change of a file, a valid checkpoint under another one's name is found: by its step, and by `run_id`.
    `past_cache` reads from the disk, not from the memory in which the system still has the files.
    """
    # The bytes first: the manifest of a damaged folder says nothing that could be relied on.
    problems = durable.verify_manifest(checkpoint.path, past_cache=past_cache)
    if problems:
        return problems
    where = printable(checkpoint.path)
    fix = "use another checkpoint, or put the right folder back"
    try:
        manifest = _read_manifest(checkpoint.path)
    except (ValueError, OSError) as error:
        return [Problem(str(error), where, fix)]
    if manifest.get("step") != checkpoint.step:
        problems.append(Problem(f"this is the checkpoint of step {manifest.get('step')}", where, fix))
    if run_id is not None and manifest.get("run_id") != run_id:
        problems.append(Problem("this checkpoint belongs to another run", where, fix))
    if manifest.get("format") != _FORMAT:
        problems.append(
            Problem(
                f"checkpoint format {manifest.get('format')!r}; this version reads {_FORMAT}",
                where,
                "use the version that wrote it",
            )
        )
    return problems


def _read_manifest(folder: Path) -> CheckpointManifest:
    """Return the manifest of a checkpoint, in which keys may be missing. Raises ValueError or OSError."""
    return cast("CheckpointManifest", durable.read_manifest(folder))


def newest_valid(run: RunFolder) -> tuple[CheckpointFolder | None, list[Problem]]:
    """Return the valid checkpoint with the highest step, and the problems of newer, damaged ones.

    Those are renamed to `NAME.damaged`; one that cannot be renamed (a read-only disk) is reported all the same. (None,
    no problems) means that the run has never saved. Raises CheckpointError (exit 5) when there are checkpoints and none
    is valid; nothing is renamed or deleted then.
    """
    problems: list[Problem] = []
    bad: list[CheckpointFolder] = []
    for checkpoint in reversed(all_checkpoints(run)):
        differences = verify(checkpoint, run_id=run.run_id)
        if not differences:
            return checkpoint, [*problems, *_set_aside(bad)]
        problems += differences
        bad.append(checkpoint)
    # Those of earlier starts: with them alone the run has saved, and must not silently start from zero.
    damaged = sorted(path.name for path in run.checkpoints.glob(f"step-*{DAMAGED_SUFFIX}*"))
    problems += [Problem("set aside earlier", printable(run.checkpoints / name)) for name in damaged]
    if not problems:
        return None, []
    summary = Problem(
        f"none of the {len(bad) + len(damaged)} checkpoints of this run can be used; nothing was deleted",
        printable(run.checkpoints),
        "restore one of them from a backup, or start a new run with `llmtune train`",
    )
    raise CheckpointError.all([summary, *problems])


def _set_aside(bad: list[CheckpointFolder]) -> Iterator[Problem]:
    """Rename damaged checkpoints, so that nobody takes them for valid ones, and yield what happened."""
    for checkpoint in bad:
        new_path = _aside_path(checkpoint.path, DAMAGED_SUFFIX)
        try:
            # Renamed and not deleted, because weights that are partly damaged may be all that a person has left.
            durable.rename(checkpoint.path, new_path)
            yield Problem(f"damaged; set aside as {new_path.name}", printable(checkpoint.path))
        except MachineError as error:
            yield error.problems[0]


def _aside_path(path: Path, suffix: str) -> Path:
    """A free name for a folder that is set aside: `NAME.suffix`, then `NAME.suffix-2` and so on."""
    names = itertools.chain([suffix], (f"{suffix}-{number}" for number in itertools.count(2)))
    paths = (path.with_name(path.name + name) for name in names)
    return next(path for path in paths if not path.exists())


def set_aside_later(run: RunFolder, step: int, *, best: Path) -> list[str]:
    """Rename the checkpoints after `step` to `NAME.replaced`, and then a later `best` too; return the new names.

    The run goes on from `step`, so they belong to a training that it leaves: the newest of them would be taken for the
    newest of the run. Raises MachineError.
    """
    later = [checkpoint.path for checkpoint in all_checkpoints(run) if checkpoint.step > step]
    # Without a later checkpoint it is the best of this very training, saved after the last checkpoint.
    if later and _step_of_best(best) > step:
        later.append(best)
    moved = []
    for path in later:
        new_path = _aside_path(path, REPLACED_SUFFIX)
        durable.rename(path, new_path)
        moved.append(new_path.name)
    return moved


def _step_of_best(best: Path) -> int:
    try:
        return int(cast("int", durable.read_manifest(best).get("step", 0)))
    except (ValueError, OSError):
        return 0


def delete_replaced(run: RunFolder, step: int) -> list[str]:
    """Delete what `set_aside_later` renamed, of steps up to `step`, whose successor is committed; return warnings."""
    warnings = []
    for path in sorted(run.checkpoints.glob(f"*{REPLACED_SUFFIX}*")):
        match = _NAME.match(path.name)
        if match is None or int(match[1]) <= step:
            try:
                durable.remove_tree(path)
            except MachineError as error:
                warnings.append(f"a replaced checkpoint stays: {error.problems[0].problem} ({printable(path)})")
    return warnings


def load(checkpoint: CheckpointFolder) -> LoadedCheckpoint:
    """Read the snapshot of a verified checkpoint.

    The digest of each file is compared with the manifest once more, because it may have changed since `verify`. Raises
    CheckpointError when anything differs from what was saved, MachineError when it cannot be read.
    """
    where = printable(checkpoint.path)
    with durable.translate_os_errors("read", checkpoint.path):
        try:
            manifest = _read_manifest(checkpoint.path)
            groups = {group: f"{group}.safetensors" for group in manifest["groups"]}
            digests = {name: manifest["files"][name]["sha256"] for name in (*groups.values(), STATE_FILE)}
            raw = (checkpoint.path / STATE_FILE).read_bytes()
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"not a checkpoint: {error}", where, "use another checkpoint") from error
    if not durable.has_digest(raw, digests[STATE_FILE]):
        raise CheckpointError(
            "state.json was changed: its sha256 does not fit the manifest", where, "use another checkpoint"
        )
    tensors = {
        group: durable.read_tensors(checkpoint.path / name, sha256=digests[name])[0] for group, name in groups.items()
    }
    return LoadedCheckpoint(checkpoint.step, checkpoint.path, Snapshot(tensors, json.loads(raw)), manifest)


def read_weights(checkpoint: LoadedCheckpoint, name: str) -> dict[str, Tensor]:
    """Read one of its files of weights, in saved shapes. Raises CheckpointError for one changed since `verify`."""
    # The digest is taken of the very bytes that fill the tensors, so nothing can come between check and use.
    return durable.read_tensors(checkpoint.path / name, sha256=checkpoint.manifest["files"][name]["sha256"])[0]


def delete_old_checkpoints(run: RunFolder, keep_last: int, *, protected_steps: Collection[int] = ()) -> list[str]:
    """Delete all but the `keep_last` checkpoints of the highest steps and those of `protected_steps`.

    Returns warnings, one line each: a checkpoint that cannot be deleted is a warning, never an error. `keep_last` 0
    keeps all. When the newest checkpoint is damaged, all are kept.
    """
    if keep_last == 0:
        return []
    checkpoints = all_checkpoints(run)
    doomed = [checkpoint for checkpoint in checkpoints[:-keep_last] if checkpoint.step not in protected_steps]
    if not doomed:
        return []
    newest = checkpoints[-1]
    # Read back from the disk itself: until that has been seen, an older checkpoint is the only one known to be good.
    problems = verify(newest, run_id=run.run_id, past_cache=True)
    if problems:
        reason = f"the newest one is damaged: {problems[0].problem} ({newest.path.name})"
        return [f"kept {len(doomed)} older checkpoints, because {reason}"]
    warnings = []
    for checkpoint in doomed:
        try:
            durable.remove_tree(checkpoint.path)
        except MachineError as error:
            warnings.append(f"an old checkpoint stays: {error.problems[0].problem} ({printable(checkpoint.path)})")
    return warnings
