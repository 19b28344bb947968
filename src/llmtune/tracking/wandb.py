"""Weights & Biases as a tracker: files in `wandb/` of the run folder, and a server only in its online mode.

A tracker may not change a run (P11). So wandb is set up not to capture the console, not to read the git repository or
the code, not to send crash reports, not to ask for a key during a run, and not to stop the training by its button.
Logging in and uploading happen on the tracker's thread, in bounded time; the end of the process does not wait for them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import psutil

from llmtune import durable
from llmtune.common.secrets import redacted
from llmtune.common.text import PrintLine, print_to_stderr
from llmtune.errors import MachineError
from llmtune.tracking.tracker import Histogram, Metrics, RunInfo, Sample, gradient_flow, grouped_name

if TYPE_CHECKING:
    import wandb

__all__ = ["WandbTracker"]

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 20.0
SERVICE_MODULE = "wandb.sdk.lib.service.service_connection"
"""The module of wandb that registers a function for the end of this process."""


class WandbTracker:
    """Sends metrics, samples and histograms to wandb.

    mode: online, offline or disabled; wandb's setting (`WANDB_MODE`) when None. entity and group: likewise. The key may
    also stand in a `.env` file of the working folder. finish_timeout_s: longest wait for the upload at the end.
    print_line: receives the address of the run, or the command that uploads an offline one.
    """

    name = "wandb"

    def __init__(
        self,
        project: str,
        *,
        tags: Sequence[str] = (),
        mode: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
        print_line: PrintLine = print_to_stderr,
    ) -> None:
        self._project = project
        self._tags = tuple(tags)
        self._mode = mode
        self._entity, self._group = entity, group
        self._finish_timeout_s = finish_timeout_s
        self._print_line = print_line
        self._library: ModuleType
        """wandb, from `start` on: importing it takes a second, and it reads the environment."""
        self._opened: wandb.Run | None = None
        self._samples: list[list[object]] = []
        self._service: list[psutil.Process] = []

    def start(self, info: RunInfo) -> None:
        """Open the run: its name, project, tags, config, parameter counts and architecture.

        Raises MachineError where wandb is online and has no key; wandb's own errors where its server refuses or does
        not answer in time.
        """
        # Before the import, which reads it: no crash reports to third parties.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._library = wandb
        exit_function, hook, raises = sys.exit, sys.excepthook, logging.raiseExceptions
        before = _wandb_processes()
        atexit.register(self._end_service)
        # wandb opens a log file, whose every line would print a traceback on a full disk.
        logging.raiseExceptions = False
        try:
            self._log_in(wandb)
            self._opened = wandb.init(
                project=self._project,
                entity=self._entity,
                group=self._group,
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
                    "modules": dict(info.modules),
                    "origins": dict(info.origins),
                    "ledger": dict(info.ledger),
                },
                mode=self._mode,  # type: ignore[arg-type]
                settings=_settings(wandb, self._finish_timeout_s),
            )
        finally:
            # wandb replaces these functions; a run that fails must end as it does without a tracker.
            sys.exit, sys.excepthook, logging.raiseExceptions = exit_function, hook, raises
            # wandb's function waits for its service without a limit, and prints a traceback when that is gone.
            atexit.unregister(_OfModule(SERVICE_MODULE))
            _quiet_log()
            _quiet_threads()
            self._service = [process for process in _wandb_processes() if process not in before]
        self._run.define_metric("*", step_metric="step")
        self._run.summary.update({f"parameters/{name}": count for name, count in info.parameters.items()})
        self._print_address()

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a step."""
        # `step` as a value, not as wandb's own step, which may only rise: a resumed run makes steps again.
        self._run.log({"step": step, **{grouped_name(key): value for key, value in metrics.items() if key != "step"}})

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Send all answers so far as one table; wandb shows the newest table of a name."""
        self._samples += [[step, row.get("prompt", ""), row.get("text", "")] for row in rows]
        self._run.log({"step": step, "samples": self._library.Table(["step", "prompt", "answer"], self._samples)})

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Send histograms as they were counted."""
        values = {
            name: self._library.Histogram(np_histogram=(np.array(counts), np.array(edges)))
            for name, (counts, edges, _) in histograms.items()
        }
        self._run.log({"step": step, **values, **gradient_flow(histograms)})

    def upload(self, name: str, folder: Path) -> None:
        """Send the files of a folder as an artifact of type `model`."""
        artifact = self._library.Artifact(name=re.sub(r"[^\w.-]", "-", name), type="model")
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def finish(self, state: str) -> None:
        """Record the run's state, let wandb upload in bounded time, and end the service process it started."""
        deadline = time.monotonic() + self._finish_timeout_s
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("finished", "stopped") else 1)
        self._let_service_write(max(deadline - time.monotonic(), 1.0))
        self._end_service()

    @property
    def _run(self) -> wandb.Run:
        assert self._opened is not None, "start comes first"
        return self._opened

    def _let_service_write(self, timeout_s: float) -> None:
        """Wait until the service has ended by itself, `timeout_s` seconds at most."""

        # `finish` of an offline run only tells the service to finish: ended at once, it leaves a file without records.
        def tear_down() -> None:
            with contextlib.suppress(Exception):  # a service that was killed before
                self._library.teardown()

        thread = threading.Thread(target=tear_down, name="wandb-teardown", daemon=True)
        thread.start()
        thread.join(timeout_s)

    def _end_service(self) -> None:
        """End the service process of this tracker, for which wandb would wait without a limit."""
        for process in self._service:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        self._service = []

    def _log_in(self, wandb: ModuleType) -> None:
        if "WANDB_API_KEY" not in os.environ and (key := _value_in_env_file("WANDB_API_KEY")):
            # In the environment alone: `wandb.login(key=...)` would write it to the user's netrc.
            os.environ["WANDB_API_KEY"] = key
        mode = self._mode or wandb.setup().settings.mode
        if mode in ("online", "run", "shared") and not wandb.login(prompt=False):
            fix = "run `wandb login`, set WANDB_API_KEY (or write it to `.env`), or use `tracking.wandb_mode=offline`"
            raise MachineError("wandb has no API key", where="tracking.trackers", fix=fix)

    def _print_address(self) -> None:
        if self._run.offline:
            self._print_line(f"wandb is offline; `wandb sync {Path(self._run.dir).parent}` uploads the run")
        elif self._run.url:
            self._print_line(f"wandb shows the run at {self._run.url}")


def _settings(wandb: ModuleType, finish_timeout_s: float) -> wandb.Settings:
    return wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=finish_timeout_s,
        login_timeout=1,
        stop_fn=_ignore_stop_button,
    )


class _OfModule:
    """Equal to every function of a module, because `atexit.unregister` removes the functions equal to its argument."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __eq__(self, other: object) -> bool:
        return getattr(other, "__module__", None) == self._module

    __hash__ = None  # type: ignore[assignment]

    def __call__(self) -> None:
        """Do nothing; `atexit.unregister` takes only a callable."""


def _wandb_processes() -> list[psutil.Process]:
    """Return the service processes of wandb that this process started."""
    processes = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may end in this moment
            if any("wandb" in word for word in process.cmdline()[:1]):
                processes.append(process)
    return processes


def _quiet_log() -> None:
    """Print nothing about lines that wandb's log file does not take."""
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = _ignore_record  # type: ignore[method-assign]


def _quiet_threads() -> None:
    """Print no traceback for a thread of wandb that fails, as one does when its service is gone at the end."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread is None or not arguments.thread.name.startswith("wandb-"):
            previous(arguments)

    threading.excepthook = hook


def _ignore_record(record: logging.LogRecord) -> None:
    """Do nothing for a line that could not be written."""


def _ignore_stop_button() -> None:
    """Do nothing at wandb's "stop run" button, which would interrupt the training process."""


def _tags(info: RunInfo, tags: Sequence[str]) -> list[str]:
    """Return the tags of the run, once each, in order, as wandb takes them: 1 to 64 characters."""
    all_tags = [Path(info.model).name, info.config_name, "llmtune", *info.tags, *tags]
    return list(dict.fromkeys(tag[:64] for tag in all_tags if tag))


def _run_id(folder: Path) -> str:
    """Return wandb's id of this run folder, stored at its first start, so that a resumed run continues it there."""
    path = folder / "wandb" / "run-id.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    new_id = secrets.token_hex(6)
    durable.make_folder(path.parent)
    durable.write_text(path, new_id + "\n")
    return new_id


def _value_in_env_file(name: str) -> str | None:
    """Return the value of `name` in the `.env` of the working folder, where people keep keys; None without it.

    `export` before a name and quotes around a value are taken off; nothing else is interpreted.
    """
    try:
        lines = Path(".env").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        key, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and key.strip() == name:
            value = value.strip()
            is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            return (value[1:-1] if is_quoted else value) or None
    return None
