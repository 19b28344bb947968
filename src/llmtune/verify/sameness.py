"""Are two runs the same run? Weights, optimizer state and every logged number but the times, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtune.durable import read_lines
from llmtune.verify.verdict import Verdict

__all__ = ["TIMES", "compare_runs", "numbers_of"]

TIMES = ("step_seconds", "tokens_per_second", "loss_tokens_per_second", "memory_bytes", "mfu")
"""Metrics that a clock or a meter decides."""


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_lines(run / "metrics.jsonl")]


def compare_runs(whole: Path, other: Path, verdict: Verdict) -> None:
    """Add a finding for the final weights, the checkpoints and the best model, the logged numbers, and the samples.

    The other run may keep more checkpoints: the one it went on from is never deleted.
    """
    kept, others = whole / "checkpoints", other / "checkpoints"
    verdict.note("final weights are byte-identical", *_files(kept / "final", others / "final", "*.safetensors"))
    for folder in sorted([*kept.glob("step-??????"), *kept.glob("best")]):
        claim = (
            "weights of best are byte-identical"
            if folder.name == "best"
            else f"weights, optimizer and random generators of {folder.name} are byte-identical"
        )
        verdict.note(claim, *_files(folder, others / folder.name, "*.safetensors"))
        if folder.name != "best":
            one_state, other_state = _state_of(folder), _state_of(others / folder.name)
            verdict.note(
                f"every counter of {folder.name} is equal", f"{len(one_state)} groups", bool(one_state) and one_state == other_state
            )
    if (whole / "samples.jsonl").exists() or (other / "samples.jsonl").exists():
        texts, other_texts = read_lines(whole / "samples.jsonl"), read_lines(other / "samples.jsonl")
        verdict.note("every sample is equal", f"{len(texts)} and {len(other_texts)} answers", texts == other_texts)
    one, two = numbers_of(whole), numbers_of(other)
    first = next((index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    if first is not None:
        key = next(key for key in {**one[first], **two[first]} if one[first].get(key) != two[first].get(key))
        place = f"line {first + 1}, {key}: {one[first].get(key)!r} and {two[first].get(key)!r}"
        verdict.note("every logged number is equal", place, False)
    elif len(one) != len(two):
        verdict.note("every logged number is equal", f"{len(one)} lines and {len(two)} lines", False)
    else:
        verdict.note("every logged number is equal", f"{len(one)} lines, {sum(map(len, one))} numbers", bool(one))


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
            at = next((index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
            return f"{name} differs first at byte {at:,} of {len(one):,} and {len(two):,}", False
        total += len(one)
    return f"{len(names)} files, {total:,} bytes, no difference", bool(names)
