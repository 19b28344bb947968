"""`verify checkpoint` and `verify merge`: what lies on the disk is what was saved, and a merge is the model it claims to be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from llmtune import durable
from llmtune.deploy.merge import merge_lora
from llmtune.errors import CheckpointError
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.folder import RunFolder
from llmtune.verify.verdict import Verdict

__all__ = ["verify_checkpoint", "verify_merge"]

_FLIPS = 20


def verify_checkpoint(run: Path, *, say: Callable[[str], None]) -> Verdict:
    """Re-read every byte of every checkpoint, best and final; then damage copies of the newest and require that each damage is found."""
    verdict = Verdict("checkpoint")
    with RunFolder.open(run) as folder:
        found = checkpoints.all_checkpoints(folder)
        for one in found:
            problems = checkpoints.verify(one, run_id=folder.run_id)
            verdict.note(one.path.name, problems[0].problem if problems else "every byte is what was saved", not problems)
        for name in ("best", "final"):
            place = folder.checkpoints / name
            if place.is_dir():
                problems = durable.verify_manifest(place)
                verdict.note(name, problems[0].problem if problems else "every byte is what was saved", not problems)
        if not found:
            raise CheckpointError("this run has no checkpoint", where=str(run))
        say(f"damaging copies of {found[-1].path.name}")
        caught, tried = _damage(found[-1].path)
        verdict.note("a flipped bit, a cut, a missing and a foreign file are found", f"{caught} of {tried} damages", caught == tried)
    return verdict


def _damage(checkpoint: Path) -> tuple[int, int]:
    """(found, tried) over damages to files of a checkpoint, each made to a copy in memory and on a scratch folder."""
    caught = tried = 0
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(_FLIPS):
            victim = files[number % len(files)]
            content = bytearray(victim.read_bytes())
            place = (number * 7919) % max(1, len(content))
            content[place] ^= 1 << (number % 8)
            for kind, data in (("flipped", bytes(content)), ("cut", bytes(content[:place]))):
                copy = Path(scratch) / f"{number}-{kind}" / checkpoint.name
                _copy(files, copy, {victim.name: data})
                tried += 1
                caught += bool(durable.verify_manifest(copy))
                durable.remove_tree(copy)
        others: dict[str, dict[str, bytes | None]] = {"missing": {files[0].name: None}, "foreign": {"foreign.bin": b"x"}}
        for name, change in others.items():
            copy = Path(scratch) / name / checkpoint.name
            _copy(files, copy, change)
            tried += 1
            caught += bool(durable.verify_manifest(copy))
    return caught, tried


def _copy(files: list[Path], target: Path, changes: dict[str, bytes | None]) -> None:
    """Copy `files` into `target`; `changes` replaces, adds or (None) leaves out one by name."""
    durable.make_folder(target)
    for file in files:
        if file.name not in changes:
            durable.link_or_copy(file, target / file.name)
    for name, data in changes.items():
        if data is not None:
            durable.write_bytes(target / name, data)


def verify_merge(run: Path, *, offline: bool, say: Callable[[str], None]) -> Verdict:
    """Merge the run's adapter into a scratch folder and report the comparison with base + adapter (N8)."""
    verdict = Verdict("merge")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = merge_lora(run, Path(scratch) / "merged", offline=offline, say=say)
        except CheckpointError as error:
            verdict.note("the merged model gives the logits of base + adapter", str(error.problems[0].problem), False)
            return verdict
        verdict.note("the merged model gives the logits of base + adapter", f"{report.difference}; {report.tolerance}", True)
    return verdict
