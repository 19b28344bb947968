"""The comparison of a resumed run with the run nobody stopped, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtune import durable
from llmtune.verify.result import Verdict

__all__ = ["TIMES", "compare_runs"]

TIMES = ("step_seconds", "tokens_per_second", "loss_tokens_per_second", "memory_bytes", "mfu")
"""Metrics that depend on the clock or the machine, and are not compared."""


def compare_runs(uninterrupted: Path, other: Path, verdict: Verdict) -> None:
    """Add a finding for each of: final weights, checkpoints, best model, samples, logged numbers.

    whole: the folder of the run nobody stopped. other: the folder of the resumed run, which may have more checkpoints,
    because the one it resumed from is never deleted.
    """
    checkpoints, others = uninterrupted / "checkpoints", other / "checkpoints"
    verdict.add("final weights are byte-identical", *_compare_files(checkpoints / "final", others / "final"))
    if (checkpoints / "best").is_dir():
        verdict.add("weights of best are byte-identical", *_compare_files(checkpoints / "best", others / "best"))
    for folder in sorted(checkpoints.glob("step-??????")):
        claim = f"weights, optimizer and random generators of {folder.name} are byte-identical"
        verdict.add(claim, *_compare_files(folder, others / folder.name))
        state = _state_of(folder)
        is_equal = bool(state) and state == _state_of(others / folder.name)
        verdict.add(f"every counter of {folder.name} is equal", f"{len(state)} groups", is_equal)
    if (uninterrupted / "samples.jsonl").exists() or (other / "samples.jsonl").exists():
        samples, other_samples = (durable.read_lines(run / "samples.jsonl") for run in (uninterrupted, other))
        counts = f"{len(samples)} and {len(other_samples)} answers"
        verdict.add("every sample is equal", counts, samples == other_samples)
    verdict.add("every logged number is equal", *_compare_lines(_lines_of(uninterrupted), _lines_of(other)))


def _compare_files(folder: Path, other: Path) -> tuple[str, bool]:
    """Compare the bytes of every safetensors file; (measured, whether all are equal)."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    total = 0
    for name in names:
        if not (other / name).is_file():
            return f"{name} is missing in {other}", False
        content, other_content = (folder / name).read_bytes(), (other / name).read_bytes()
        if content != other_content:
            unequal = (index for index, (a, b) in enumerate(zip(content, other_content, strict=False)) if a != b)
            first = next(unequal, min(len(content), len(other_content)))
            return f"{name} differs first at byte {first:,} of {len(content):,} and {len(other_content):,}", False
        total += len(content)
    return f"{len(names)} files, {total:,} bytes, no difference", bool(names)


def _compare_lines(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[str, bool]:
    """Compare the lines of two records; (measured, whether all are equal)."""
    for number, (line, other) in enumerate(zip(lines, others, strict=False), 1):
        if line != other:
            key = next(key for key in {**line, **other} if line.get(key) != other.get(key))
            return f"line {number}, {key}: {line.get(key)!r} and {other.get(key)!r}", False
    if len(lines) != len(others):
        return f"{len(lines)} lines and {len(others)} lines", False
    return f"{len(lines)} lines, {sum(map(len, lines))} numbers", bool(lines)


def _lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without `TIMES`."""
    lines = durable.read_lines(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """Return the counters and plain numbers of a checkpoint without `TIMES`; empty where there is none."""
    path = checkpoint / "state.json"
    state: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    for key in TIMES:
        state.get("pipeline", {}).get("metrics", {}).pop(key, None)
    return state
