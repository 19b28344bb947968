"""run.json: the name, state and identity of a run, and everything about it that is known before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypedDict

from llmtune import durable
from llmtune.common.text import printable
from llmtune.errors import CheckpointError
from llmtune.runs.identity import Identity, MachineDescription

__all__ = ["RESUMABLE", "RUN_FILE", "RunDetails", "RunFile", "RunState", "RunUpdate", "read_run_file"]

RunState = Literal["running", "stopped", "finished", "failed", "diverged"]
RESUMABLE: tuple[RunState, ...] = ("running", "stopped", "failed")

RUN_FILE = "run.json"


class RecordedDecision(TypedDict):
    """A `Decision` as run.json holds it."""

    key: str
    value: str
    reason: str


class RunDetails(MachineDescription, total=False):
    """The fields of run.json that are written when the run is made."""

    config_name: str
    seed: int
    tags: list[str]
    notes: str | None
    requested: dict[str, Any]
    """The config as the command gave it, before anything was fitted to the model or resolved."""
    identity: Identity
    decisions: list[RecordedDecision]
    data: dict[str, object]
    """Summary of the ledger: rows by status."""
    parameters: dict[str, int]
    disk_forecast_bytes: int
    plan: dict[str, object] | None
    """Steps, memory by part, time and disk as they were planned."""


class RunUpdate(TypedDict, total=False):
    """The fields of run.json that change while the run trains."""

    state: RunState
    step: int
    total_steps: int
    measured_bytes: dict[str, int]
    """Bytes of the parts of memory that can be counted at the end, by their names in the plan."""


class RunFile(RunDetails, RunUpdate):
    """All of run.json."""

    run_id: str
    """Identifies this run, wherever its folder is moved."""
    name: str
    created: str
    """UTC time, ISO 8601."""


def read_run_file(folder: Path) -> RunFile:
    """Return the content of run.json in `folder`. Raises CheckpointError when it is missing or describes no run."""
    path = folder / RUN_FILE
    if not path.is_file():
        fix = "give the folder of a run, or its name; `llmtune runs` lists them"
        raise CheckpointError("no run here: run.json is missing", where=printable(folder), fix=fix)
    with durable.translate_os_errors("read", path):
        raw = path.read_bytes()
    fix = "restore it from a backup"
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"run.json is not JSON: {error}", printable(path), fix) from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("run_id"), str)
        or content.get("state") not in (*RESUMABLE, "finished", "diverged")
    ):
        raise CheckpointError("run.json does not describe a run", printable(path), fix)
    run_file: RunFile = content  # type: ignore[assignment]
    return run_file
