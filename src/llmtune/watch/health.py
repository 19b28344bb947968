"""The health of a run from its folder: the events of its lines, and what its end and its machine add to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from llmtune import durable
from llmtune.runs.run_file import read_run_file
from llmtune.tracking.health import HealthEvent, HealthMonitor
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["health_of", "machine_event"]

FEWEST_FIGURES = 6
"""Lines of system.jsonl, five seconds apart, before they say anything about a run."""
LOW_USE = 0.5
FULL_USE = 0.9

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

    They are those of events.jsonl, and more where the run ended badly or its device had little to do.
    """
    info = read_run_file(folder)
    run = RunData(folder)
    run.refresh()
    lines = durable.read_lines(folder / "metrics.jsonl")
    events = HealthMonitor().see_all(lines)
    if (event := machine_event(run)) is not None:
        events.append(event)
    if info["state"] in ENDS:
        message, advice = ENDS[info["state"]]
        step = max((line["step"] for line in lines if isinstance(line.get("step"), int)), default=0)
        events.append({"step": step, "kind": info["state"], "level": "error", "message": message, "advice": advice})
    return events


def machine_event(run: RunData) -> HealthEvent | None:
    """Low use of the device with its likely cause, from the figures of the machine; None where it was busy.

    A GPU is compared with the processors beside it; without one, the processors of this run with those of others.
    """
    gpus = [series for name, series in run.system.items() if name.startswith("gpus.") and name.endswith(".use")]
    use = max((_middle(series) for series in gpus), default=None)
    own, count = _middle(run.system.get("process_cpus")), _middle(run.system.get("cpu_count"))
    everyone = _middle(run.system.get("cpu_use"))
    if len(run.system.get("cpu_use", ())) < FEWEST_FIGURES or count < 1:
        return None
    is_crowded = everyone > FULL_USE and own < LOW_USE * count
    if use is None:
        if not is_crowded:
            return None
        seen = f"this run had {own:.1f} of {count:.0f} processors while all were busy"
        cause = "crowded"
    elif use >= LOW_USE:
        return None
    else:
        seen = f"the GPU computed in {use:.0%} of the time"
        cause = "crowded" if is_crowded else "feeding" if own >= FULL_USE else "small"
    because, advice = CAUSES[cause]
    message = f"{seen}: {because}"
    return {"step": run.step, "kind": "low_device_use", "level": "warning", "message": message, "advice": advice}


CAUSES: Mapping[str, tuple[str, str]] = {
    "crowded": (
        "other programs keep the processors busy",
        "end them, or give the run a machine of its own: `llmtune gpu-monitor` shows the load",
    ),
    "feeding": (
        "the processor's work between the kernels keeps it waiting",
        "raise training.batch_size or pack rows (data.packing), so that each step has more to compute",
    ),
    "small": (
        "the steps are small, or something slow is between them",
        "raise training.batch_size; evaluate and save less often (evaluation.every_steps, checkpoint.every_steps)",
    ),
}
"""Likely cause of low use -> how it is said, and the advice."""


def _middle(series: Series | None) -> float:
    values = series.finite().values if series is not None else []
    return median(values) if values else 0.0
