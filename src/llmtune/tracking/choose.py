"""The table of trackers, and the choice of those a run gets."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping

from llmtune.common.decisions import Decision
from llmtune.config.schema import TrackingConfig
from llmtune.errors import ConfigError, MachineError, Problem
from llmtune.tracking.console import ConsoleTracker
from llmtune.tracking.system import SystemTracker
from llmtune.tracking.tensorboard import TensorBoardTracker
from llmtune.tracking.tracker import Tracker
from llmtune.tracking.wandb import WandbTracker

__all__ = ["TRACKERS", "TrackerKind", "choose_trackers", "keeps_record"]


@dataclasses.dataclass(frozen=True)
class TrackerKind:
    """One row of `TRACKERS`."""

    make: Callable[[TrackingConfig], Tracker | None]
    """Returns the tracker; None for the run's record, which is not behind the queue (see `jsonl`)."""
    package: str | None = None
    """The package that must be installed."""
    requirement: str | None = None
    """What pip is given to install it."""


def choose_trackers(
    config: TrackingConfig, *, explicit: bool, environ: Mapping[str, str] = os.environ
) -> tuple[list[Tracker], list[Decision]]:
    """Return the trackers behind the queue, and the decisions made for the user.

    explicit: whether the user set `tracking.trackers`. A tracker that is not installed is then refused; otherwise it is
    left out, with a decision. Raises ConfigError for every name that is no tracker, MachineError for every tracker that
    is requested and not installed.
    """
    unknown = [name for name in config.trackers if name not in TRACKERS]
    if unknown:
        known = ", ".join(TRACKERS)
        raise ConfigError.all(
            Problem(f"unknown tracker `{name}`", "tracking.trackers", f"use one of {known}") for name in unknown
        )
    missing = [name for name in dict.fromkeys(config.trackers) if not _is_installed(TRACKERS[name])]
    if missing and explicit:
        raise MachineError.all(
            Problem(f"tracker `{name}` is not installed", "tracking.trackers", _how_to_install(name))
            for name in missing
        )
    decisions = [
        Decision("tracking.trackers", f"without {name}", f"it is not installed; {_how_to_install(name)}")
        for name in missing
    ]
    config, project = _with_project(config, environ)
    names = [name for name in dict.fromkeys(config.trackers) if name not in missing]
    trackers = [TRACKERS[name].make(config) for name in names]
    return [tracker for tracker in trackers if tracker is not None], decisions + (project if "wandb" in names else [])


def keeps_record(config: TrackingConfig) -> bool:
    """Return whether the run writes metrics.jsonl."""
    return "jsonl" in config.trackers


def _is_installed(kind: TrackerKind) -> bool:
    return kind.package is None or importlib.util.find_spec(kind.package) is not None


def _how_to_install(name: str) -> str:
    return f"pip install {TRACKERS[name].requirement}"


def _with_project(config: TrackingConfig, environ: Mapping[str, str]) -> tuple[TrackingConfig, list[Decision]]:
    project = environ.get("WANDB_PROJECT")
    if not project or config.project != TrackingConfig().project or project == config.project:
        return config, []
    reason = "WANDB_PROJECT is set and the config names no project"
    return dataclasses.replace(config, project=project), [Decision("tracking.project", project, reason)]


TRACKERS: dict[str, TrackerKind] = {
    "console": TrackerKind(lambda _: ConsoleTracker()),
    "jsonl": TrackerKind(lambda _: None),
    "system": TrackerKind(lambda _: SystemTracker()),
    "tensorboard": TrackerKind(
        lambda _: TensorBoardTracker(), package="tensorboard", requirement="'llmtune[tensorboard]'"
    ),
    "wandb": TrackerKind(
        lambda config: WandbTracker(
            config.project,
            tags=config.tags,
            mode=config.wandb_mode,
            entity=config.wandb_entity,
            group=config.wandb_group,
        ),
        package="wandb",
        requirement="wandb",
    ),
}
"""By name in `tracking.trackers`. A new tracker is one row here."""
