"""The health of a run from its folder: the events of its lines, and what its end and its machine add to them."""

from __future__ import annotations

from pathlib import Path

from llmtune import durable
from llmtune.runs.run_file import read_run_file
from llmtune.tracking.health import HealthEvent, HealthMonitor

__all__ = ["health_of"]

ENDS: dict[str, tuple[str, str]] = {
    "diverged": (
        "the training diverged: more windows were not finite than training.max_skipped_steps allows",
        "start again with a lower training.learning_rate, or resume from an earlier checkpoint",
    ),
    "failed": ("the run ended with an error", "`llmtune resume` goes on from the newest checkpoint"),
}
"""State of a run -> what it says, and the advice."""


def health_of(folder: Path) -> list[HealthEvent]:
    """Every event of the run in `folder`, checked anew from its record. Raises CheckpointError where there is no run.

    They are those of events.jsonl, and one more where the run ended badly.
    """
    info = read_run_file(folder)
    lines = durable.read_lines(folder / "metrics.jsonl")
    events = HealthMonitor().see_all(lines)
    if info["state"] in ENDS:
        message, advice = ENDS[info["state"]]
        step = max((line["step"] for line in lines if isinstance(line.get("step"), int)), default=0)
        events.append({"step": step, "kind": info["state"], "level": "error", "message": message, "advice": advice})
    return events
