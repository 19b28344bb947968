"""`verify checkpoint` and `verify merge`: every byte on the disk is as it was saved, and a merge equals its parts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llmtune import durable
from llmtune.common.text import PrintLine
from llmtune.deploy.merge import merge_lora
from llmtune.errors import CheckpointError, Problem
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.folder import RunFolder
from llmtune.verify.result import Verdict

__all__ = ["verify_checkpoint", "verify_merge"]

_FLIPS = 20


def verify_checkpoint(run: Path, *, print_line: PrintLine) -> Verdict:
    """Re-read every byte of every checkpoint, best and final; then damage copies of the newest and verify each.

    Raises CheckpointError where the run has no checkpoint.
    """
    verdict = Verdict("checkpoint")
    with RunFolder.open(run) as folder:
        saved = checkpoints.all_checkpoints(folder)
        for checkpoint in saved:
            _add_problems(verdict, checkpoint.path.name, checkpoints.verify(checkpoint, run_id=folder.run_id))
        for name in ("best", "final"):
            if (folder.checkpoints / name).is_dir():
                _add_problems(verdict, name, durable.verify_manifest(folder.checkpoints / name))
        if not saved:
            raise CheckpointError("this run has no checkpoint", where=str(run))
        print_line(f"damaging copies of {saved[-1].path.name}")
        detected, tried = _damage(saved[-1].path)
        claim = "a flipped bit, a cut, a missing and a foreign file are found"
        verdict.add(claim, f"{detected} of {tried} damages", detected == tried)
    return verdict


def _add_problems(verdict: Verdict, name: str, problems: list[Problem]) -> None:
    verdict.add(name, problems[0].problem if problems else "every byte is what was saved", not problems)


def _damage(checkpoint: Path) -> tuple[int, int]:
    """Damage files of a checkpoint, each time in another copy; (damages found, damages made)."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    damages: list[dict[str, bytes | None]] = [{files[0].name: None}, {"foreign.bin": b"x"}]
    for number in range(_FLIPS):
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        position = (number * 7919) % max(1, len(content))  # a prime step spreads the flips over the file
        content[position] ^= 1 << (number % 8)
        damages += [{file.name: bytes(content)}, {file.name: bytes(content[:position])}]
    detected = 0
    with tempfile.TemporaryDirectory() as scratch:
        for changes in damages:
            copy = Path(scratch) / checkpoint.name
            _copy(files, copy, changes)
            detected += bool(durable.verify_manifest(copy))
            durable.remove_tree(copy)
    return detected, len(damages)


def _copy(files: list[Path], target: Path, changes: dict[str, bytes | None]) -> None:
    """Copy `files` into `target`; `changes` replaces, adds or (None) leaves out a file by name."""
    durable.make_folder(target)
    for file in files:
        if file.name not in changes:
            durable.link_or_copy(file, target / file.name)
    for name, data in changes.items():
        if data is not None:
            durable.write_bytes(target / name, data)


def verify_merge(run: Path, *, offline: bool, print_line: PrintLine) -> Verdict:
    """Merge the run's adapter into a scratch folder and report the comparison with base + adapter (N8)."""
    verdict, claim = Verdict("merge"), "the merged model gives the logits of base + adapter"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = merge_lora(run, Path(scratch) / "merged", offline=offline, print_line=print_line)
            verdict.add(claim, f"{report.difference}; {report.tolerance}", True)
        except CheckpointError as error:
            verdict.add(claim, error.problems[0].problem, False)
    return verdict
