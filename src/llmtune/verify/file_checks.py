"""`verify checkpoint` and `verify merge`: what lies on the disk is what was saved, and a merge is the model it claims
to be.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from llmtune import durable
from llmtune.common.printing import PrintLine
from llmtune.deploy.merge import merge_lora
from llmtune.durable import read_lines
from llmtune.errors import CheckpointError
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.folder import RunFolder
from llmtune.verify.result import Verdict

__all__ = ["TIMES", "compare_runs", "numbers_of", "verify_checkpoint", "verify_merge"]

_FLIPS = 20


def verify_checkpoint(run: Path, *, print_line: PrintLine) -> Verdict:
    """Re-read every byte of every checkpoint, best and final.

    Then damage copies of the newest and require that each damage is found.
    """
    verdict = Verdict("checkpoint")
    with RunFolder.open(run) as folder:
        found = checkpoints.all_checkpoints(folder)
        for one in found:
            problems = checkpoints.verify(one, run_id=folder.run_id)
            verdict.add(
                one.path.name, problems[0].problem if problems else "every byte is what was saved", not problems
            )
        for name in ("best", "final"):
            place = folder.checkpoints / name
            if place.is_dir():
                problems = durable.verify_manifest(place)
                verdict.add(name, problems[0].problem if problems else "every byte is what was saved", not problems)
        if not found:
            raise CheckpointError("this run has no checkpoint", where=str(run))
        print_line(f"damaging copies of {found[-1].path.name}")
        caught, tried = _damage(found[-1].path)
        verdict.add(
            "a flipped bit, a cut, a missing and a foreign file are found",
            f"{caught} of {tried} damages",
            caught == tried,
        )
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
        others: dict[str, dict[str, bytes | None]] = {
            "missing": {files[0].name: None},
            "foreign": {"foreign.bin": b"x"},
        }
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


def verify_merge(run: Path, *, offline: bool, print_line: PrintLine) -> Verdict:
    """Merge the run's adapter into a scratch folder and report the comparison with base + adapter (N8)."""
    verdict = Verdict("merge")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = merge_lora(run, Path(scratch) / "merged", offline=offline, print_line=print_line)
        except CheckpointError as error:
            verdict.add("the merged model gives the logits of base + adapter", str(error.problems[0].problem), False)
            return verdict
        verdict.add(
            "the merged model gives the logits of base + adapter", f"{report.difference}; {report.tolerance}", True
        )
    return verdict


TIMES = ("step_seconds", "tokens_per_second", "loss_tokens_per_second", "memory_bytes", "mfu")
"""Metrics that a clock or a meter decides."""


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times."""
    return [
        {key: value for key, value in line.items() if key not in TIMES} for line in read_lines(run / "metrics.jsonl")
    ]


def compare_runs(whole: Path, other: Path, verdict: Verdict) -> None:
    """Add a finding for the final weights, the checkpoints and the best model, the logged numbers, and the samples.

    The other run may keep more checkpoints: the one it went on from is never deleted.
    """
    kept, others = whole / "checkpoints", other / "checkpoints"
    verdict.add("final weights are byte-identical", *_files(kept / "final", others / "final", "*.safetensors"))
    for folder in sorted([*kept.glob("step-??????"), *kept.glob("best")]):
        claim = (
            "weights of best are byte-identical"
            if folder.name == "best"
            else f"weights, optimizer and random generators of {folder.name} are byte-identical"
        )
        verdict.add(claim, *_files(folder, others / folder.name, "*.safetensors"))
        if folder.name != "best":
            one_state, other_state = _state_of(folder), _state_of(others / folder.name)
            verdict.add(
                f"every counter of {folder.name} is equal",
                f"{len(one_state)} groups",
                bool(one_state) and one_state == other_state,
            )
    if (whole / "samples.jsonl").exists() or (other / "samples.jsonl").exists():
        texts, other_texts = read_lines(whole / "samples.jsonl"), read_lines(other / "samples.jsonl")
        verdict.add("every sample is equal", f"{len(texts)} and {len(other_texts)} answers", texts == other_texts)
    one, two = numbers_of(whole), numbers_of(other)
    first = next((index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    if first is not None:
        key = next(key for key in {**one[first], **two[first]} if one[first].get(key) != two[first].get(key))
        place = f"line {first + 1}, {key}: {one[first].get(key)!r} and {two[first].get(key)!r}"
        verdict.add("every logged number is equal", place, False)
    elif len(one) != len(two):
        verdict.add("every logged number is equal", f"{len(one)} lines and {len(two)} lines", False)
    else:
        verdict.add("every logged number is equal", f"{len(one)} lines, {sum(map(len, one))} numbers", bool(one))


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """Counters and plain numbers of a checkpoint, without times; empty where there is none."""
    place = checkpoint / "state.json"
    state: dict[str, Any] = json.loads(place.read_bytes()) if place.is_file() else {}
    for key in TIMES:
        state.get("pipeline", {}).get("metrics", {}).pop(key, None)
    return state


def _files(whole: Path, other: Path, pattern: str) -> tuple[str, bool]:
    names = sorted(path.name for path in whole.glob(pattern))
    total = 0
    for name in names:
        if not (other / name).is_file():
            return f"{name} is missing in {other}", False
        one, two = (whole / name).read_bytes(), (other / name).read_bytes()
        if one != two:
            at = next(
                (index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
            )
            return f"{name} differs first at byte {at:,} of {len(one):,} and {len(two):,}", False
        total += len(one)
    return f"{len(names)} files, {total:,} bytes, no difference", bool(names)
