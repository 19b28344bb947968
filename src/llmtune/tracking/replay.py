"""Send a run that is over to a tracker, from its folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmtune import durable
from llmtune.runs.run_file import read_run_file
from llmtune.tracking.tracker import RunInfo, Tracker

__all__ = ["info_of", "replay"]


@runtime_checkable
class TakesModels(Protocol):
    """A tracker that keeps models as well."""

    def upload(self, name: str, folder: Path) -> None:
        """Keep the files of a folder under a name."""
        ...


def info_of(folder: Path) -> RunInfo:
    """The facts of a run as its trackers got them. Raises CheckpointError where there is no run."""
    info: Mapping[str, Any] = read_run_file(folder)
    config = info.get("identity", {}).get("config", {})
    try:
        origins = json.loads((folder / "origins.json").read_bytes())
    except (OSError, ValueError):
        origins = {}
    return RunInfo(
        name=folder.name,
        folder=folder,
        total_steps=info.get("total_steps") or 0,
        model=str(config.get("model", {}).get("name", "")),
        config_name=str(info.get("config_name", "")),
        tags=tuple(info.get("tags") or ()),
        notes=info.get("notes"),
        config=config,
        parameters=info.get("parameters", {}),
        origins=origins,
        ledger=info.get("data", {}),
    )


def replay(folder: Path, tracker: Tracker, *, model: Path | None = None) -> int:
    """Give a tracker everything that the record of a run holds, and return the number of lines.

    `model`: a folder that is sent as well, to a tracker that takes one. Raises CheckpointError where there is no run,
    MachineError where its files cannot be read; errors of the tracker's library pass through.
    """
    info, state = info_of(folder), read_run_file(folder)["state"]
    metrics, samples = (durable.read_lines(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    tracker.start(info)
    for line in metrics:
        tracker.log(line["step"], line)
    for step, rows in itertools.groupby(samples, key=lambda row: row["step"]):
        tracker.samples(step, list(rows))
    if model is not None:
        assert isinstance(tracker, TakesModels), "the caller chose a tracker for it"
        tracker.upload(folder.name, model)
    tracker.finish(state)
    return len(metrics) + len(samples)
