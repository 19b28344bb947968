"""Weights & Biases as a tracker: files in the run folder's `wandb/`, and a server only in its online mode.

wandb is held at arm's length, because a tracker may not change a run (promise P11): it does not capture the console,
does not read the git repository or the code, does not report its own crashes to its makers, does not ask for a key in
the middle of a run, and its "stop" button does not reach the training. Whatever it costs to log in and to upload
happens on the tracker's thread, in bounded time, and the end of the process waits for none of it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from llmtune import durable
from llmtune.common.printing import PrintLine
from llmtune.common.secrets import redacted
from llmtune.errors import MachineError
from llmtune.tracking.queue import say_on_stderr
from llmtune.tracking.tracker import Histogram, RunInfo, grouped_name

__all__ = ["WandbTracker"]

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 20.0
SERVICE_MODULE = "wandb.sdk.lib.service.service_connection"


class WandbTracker:
    """Sends metrics, samples and histograms to wandb.

    mode: online, offline or disabled; wandb's own setting (`WANDB_MODE`) when None.
    print_line: told where the run can be seen, or how to upload an offline one.
    """

    name = "wandb"

    def __init__(
        self,
        project: str,
        *,
        tags: Sequence[str] = (),
        mode: str | None = None,
        print_line: PrintLine = say_on_stderr,
    ) -> None:
        self._project = project
        self._tags = tuple(tags)
        self._mode = mode
        self._print_line = print_line
        self._run: Any = None
        self._samples: list[list[Any]] = []
        self._service: list[psutil.Process] = []

    def start(self, info: RunInfo) -> None:
        """Open the run: its name, project, tags, config, parameter counts and architecture.

        Raises MachineError where wandb is online and has no key; wandb's own errors where its server refuses or does
        not answer in time.
        """
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # read when wandb is imported: no crash reports to third parties
        import wandb

        exit_function, hook, complains = sys.exit, sys.excepthook, logging.raiseExceptions
        before = _wandb_processes()
        atexit.register(self._end_service)
        logging.raiseExceptions = (
            False  # wandb opens a log file of its own, whose every line would print a traceback on a full disk
        )
        try:
            self._log_in(wandb)
            self._run = wandb.init(
                project=self._project,
                name=info.name,
                id=None if os.environ.get("WANDB_RUN_ID") else _run_id(info.folder),
                resume="allow",
                dir=str(info.folder),
                tags=_tags(info, self._tags),
                notes=info.notes,
                config={
                    **redacted(info.config),
                    "parameters": dict(info.parameters),
                    "architecture": dict(info.architecture),
                },
                mode=self._mode,  # type: ignore[arg-type]
                settings=_settings(wandb),
            )
        finally:
            # wandb puts its own functions in their place; a run that ends with an error must end as it would without a
            # tracker.
            sys.exit, sys.excepthook, logging.raiseExceptions = exit_function, hook, complains
            atexit.unregister(_OfModule(SERVICE_MODULE))
            _quiet_log()
            _quiet_threads()
            self._service = [one for one in _wandb_processes() if one not in before]
        self._run.define_metric("*", step_metric="step")
        self._run.summary.update({f"parameters/{name}": count for name, count in info.parameters.items()})
        self._say_where()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step; `step` is a value of its own, so that a resumed run may write a step again."""
        self._run.log({"step": step, **{grouped_name(key): value for key, value in metrics.items() if key != "step"}})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send all answers so far as one table; wandb shows the newest table of a name."""
        import wandb

        self._samples += [[step, row.get("prompt", ""), row.get("text", "")] for row in rows]
        self._run.log({"step": step, "samples": wandb.Table(columns=["step", "prompt", "answer"], data=self._samples)})

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Send histograms as they were counted."""
        import numpy as np
        import wandb

        made = {
            name: wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
            for name, (counts, edges) in histograms.items()
        }
        self._run.log({"step": step, **made})

    def finish(self, state: str) -> None:
        """Note the run's state, let wandb upload what is pending in bounded time, and end the process it started for
        that.
        """
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("finished", "stopped") else 1)
        self._end_service()

    def _end_service(self) -> None:
        """End the process that wandb started for this tracker, if it is still there.

        Wandb itself would wait for it without a limit.
        """
        for process in self._service:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        self._service = []

    def _log_in(self, wandb: Any) -> None:
        mode = self._mode or wandb.setup().settings.mode
        if mode in ("online", "run", "shared") and not wandb.login(prompt=False):
            fix = "run `wandb login`, set WANDB_API_KEY, or use `tracking.wandb_mode=offline`"
            raise MachineError("wandb has no API key", where="tracking.trackers", fix=fix)

    def _say_where(self) -> None:
        if self._run.offline:
            self._print_line(f"wandb is offline; `wandb sync {Path(self._run.dir).parent}` uploads the run")
        elif self._run.url:
            self._print_line(f"wandb shows the run at {self._run.url}")


def _settings(wandb: Any) -> Any:
    return wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        login_timeout=1,
        stop_fn=_ignore_the_stop_button,
    )


class _OfModule:
    """Equal to every function of a module: `atexit.unregister` takes out what is equal to its argument.

    wandb's own function there waits without a limit for its process, and prints a traceback when that is gone.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __eq__(self, other: object) -> bool:
        return getattr(other, "__module__", None) == self._module

    __hash__ = None  # type: ignore[assignment]

    def __call__(self) -> None:
        """Functions that end with the process are called so; this one only stands for others."""


def _wandb_processes() -> list[psutil.Process]:
    """Processes of wandb's that this one started."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("wandb" in word for word in process.cmdline()[:1]):
                found.append(process)
    return found


def _quiet_log() -> None:
    """Let wandb's own log file go on to fail in silence."""
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = _ignore_the_record  # type: ignore[method-assign]


def _quiet_threads() -> None:
    """Let a thread of wandb's that fails, as one does when its process is gone at the end, do so without a traceback on
    the screen.
    """
    usual = threading.excepthook

    def of_others(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread is None or not arguments.thread.name.startswith("wandb-"):
            usual(arguments)

    threading.excepthook = of_others


def _ignore_the_record(record: logging.LogRecord) -> None:
    """Do nothing about a line that could not be written."""


def _ignore_the_stop_button() -> None:
    """Do nothing: wandb's own answer to its "stop run" button is an interrupt of the training process."""


def _tags(info: RunInfo, further: Sequence[str]) -> list[str]:
    """Return the tags once each, in order, as wandb takes them: 1 to 64 characters."""
    wanted = [Path(info.model).name, info.config_name, "llmtune", *info.tags, *further]
    return list(dict.fromkeys(tag[:64] for tag in wanted if tag))


def _run_id(folder: Path) -> str:
    """Return the id under which wandb knows this run folder, made at its first start, so that a resumed run goes on in
    the same place.
    """
    path = folder / "wandb" / "run-id.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(6)
    durable.make_folder(path.parent)
    durable.write_text(path, made + "\n")
    return made
