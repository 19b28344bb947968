"""The folder of a run: its name, its lock, and how a run is found again."""

from __future__ import annotations

import contextlib
import errno
import os
import unicodedata
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Unpack

from llmtune import durable
from llmtune.common.environment import home_expanded
from llmtune.common.secrets import redacted
from llmtune.common.text import printable
from llmtune.errors import CheckpointError, MachineError, UsageError
from llmtune.runs.identity import Identity
from llmtune.runs.run_file import RESUMABLE, RUN_FILE, RunDetails, RunFile, RunState, RunUpdate, read_run_file

__all__ = [
    "CONFIG_FILE",
    "RunFolder",
    "RunSummary",
    "checked_name",
    "clean_name_part",
    "config_file_of",
    "create_run",
    "find_newest_unfinished",
    "list_runs",
    "resolve_run",
]

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
_LONGEST_NAME_BYTES = 200  # leaves room for a suffix and for the names a commit works with (file systems allow 255)
_MOST_SUFFIXES = 10_000


class RunFolder:
    """A run that this process alone writes, until `close`."""

    def __init__(self, path: Path, lock: durable.FileLock, *, removed: tuple[str, ...] = ()) -> None:
        self.path = path
        self.removed = removed
        """The leftovers of a killed process that were removed or put back, one line each."""
        self._lock = lock
        self._info = read_run_file(path)

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Lock an existing run and clean up after a killed process.

        Raises MachineError when another process has it, CheckpointError when there is no run.
        """
        path = Path(path).absolute()
        read_run_file(path)  # before a lock file is made in a folder that is no run
        lock = _lock(path)
        try:
            # With the lock, leftovers of other machines are removed too: nobody else can be working on them.
            removed = durable.remove_leftovers(path, everything=True)
            if (path / "checkpoints").is_dir():
                removed += durable.remove_leftovers(path / "checkpoints", everything=True)
            return cls(path, lock, removed=tuple(removed))
        except BaseException:  # an interrupt too: the caller gets no folder that it could close
            lock.release()
            raise

    @property
    def name(self) -> str:
        """Name of the run, which is the name of its folder."""
        return self.path.name

    @property
    def run_id(self) -> str:
        """Identifies this run, wherever its folder is moved."""
        return self._info["run_id"]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def info(self) -> RunFile:
        """A copy of run.json."""
        return self._info.copy()

    @property
    def state(self) -> RunState:
        """State of the run in run.json."""
        return self._info["state"]

    def update(self, identity: Identity | None = None, **fields: Unpack[RunUpdate]) -> None:
        """Replace fields of run.json, durably and without secrets. Raises MachineError."""
        # The file first, then memory: after a refused write both still hold the old state.
        info: RunFile = {**self._info, **redacted(fields)}
        if identity is not None:
            info = {**info, "identity": redacted(identity)}
        durable.write_json(self.path / RUN_FILE, info)
        self._info = info

    def close(self) -> None:
        """Unlock the run."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(folder: Path) -> durable.FileLock:
    return durable.FileLock(folder / LOCK_FILE, "the run")


def create_run(
    output_dir: Path | str,
    name: str,
    *,
    details: RunDetails | None = None,
    fill: Callable[[Path], None] | None = None,
) -> RunFolder:
    """Make the folder of a new run under `output_dir`, with its run.json, and lock it.

    When the name is taken the run is called NAME-2, NAME-3 and so on; several processes may do this at once. `details`
    go into run.json, secrets hidden; `fill` writes the other files a run has from its first moment (its config). The
    folder appears under its name completely or not at all. Raises UsageError for a name that cannot be one,
    MachineError.
    """
    checked_name(name)
    output_dir = home_expanded(output_dir).absolute()
    durable.make_folder(output_dir)
    removed: list[str] = []
    with contextlib.suppress(MachineError):  # another user's leftovers are not in the way
        removed = durable.remove_leftovers(output_dir)
    for number in range(1, _MOST_SUFFIXES):
        path = output_dir / (name if number == 1 else f"{name}-{number}")
        # lexists: a dangling link takes the name as well.
        if os.path.lexists(path):
            continue
        info = {
            "run_id": uuid.uuid4().hex,
            "name": path.name,
            "state": "running",
            "created": datetime.now(UTC).isoformat(timespec="microseconds"),
            **redacted(dict(details or {})),
        }
        lock: durable.FileLock | None = None
        try:
            with durable.commit_folder(path, with_manifest=False, replace=False) as staging:
                durable.write_json(staging / RUN_FILE, info)
                durable.make_folder(staging / "checkpoints")
                if fill is not None:
                    fill(staging)
                # Locked before the folder has its name, so that no other process can find it and take it first.
                lock = _lock(staging)
        except BaseException as error:  # an interrupt too must not keep the lock
            if lock is not None:
                lock.release()
            if isinstance(error, MachineError) and durable.errno_of(error) in (
                errno.EEXIST,
                errno.ENOTEMPTY,
                errno.ENOTDIR,
            ):
                continue  # another process took the name in this moment
            raise
        assert lock is not None
        return RunFolder(path, lock, removed=tuple(removed))
    raise UsageError(f"{_MOST_SUFFIXES} runs are called {name!r}", printable(output_dir), "choose another run.name")


def checked_name(name: str) -> str:
    """Return `name` if it can be the name of a run's folder. Raises UsageError with the reason why it cannot.

    Shell syntax is allowed, since a name is never given to a shell. Refused are names that could leave the output
    folder, hide, or disturb a terminal.

    >>> checked_name("a; touch x $(id) && '`")
    "a; touch x $(id) && '`"
    """
    reasons = {
        "it is empty": not name.strip(),
        "it contains a path separator": "/" in name or "\\" in name,
        "it starts with a dot": name.startswith("."),
        "it starts with a dash": name.startswith("-"),
        "it starts or ends with a space": name != name.strip(),
        "it contains a control character": any(_disturbs_a_terminal(char) for char in name),
        f"it is longer than {_LONGEST_NAME_BYTES} bytes": len(name.encode("utf-8", "surrogatepass"))
        > _LONGEST_NAME_BYTES,
    }
    for reason, applies in reasons.items():
        if applies:
            shown = printable(name if len(name) <= 80 else f"{name[:77]}...")
            raise UsageError(
                f"`{shown}` cannot be the name of a run: {reason}",
                where="run.name",
                fix="choose a plain name, such as my-run-1",
            )
    return name


def _disturbs_a_terminal(char: str) -> bool:
    """Say whether `char` is a control, a direction mark, half a surrogate pair or a line separator."""
    is_emoji_joiner = char == "\u200d"  # of the same category as direction marks, and harmless
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not is_emoji_joiner


def clean_name_part(text: str) -> str:
    """Return the last part of the path `text` (a model id, a config's name) without what a run's name may not have.

    >>> clean_name_part("HuggingFaceTB/SmolLM2-135M-Instruct")
    'SmolLM2-135M-Instruct'
    """
    last = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    clean = "".join(char for char in last if not _disturbs_a_terminal(char))
    return clean.strip(" .-")[:80].strip() or "model"


class RunSummary(NamedTuple):
    """One line of `llmtune runs`."""

    path: Path
    name: str
    state: str
    """As in run.json; `interrupted` for `running` when no process has the run locked."""
    created: str
    """UTC time at which the run was made, ISO 8601."""
    step: int | None
    total_steps: int | None
    train_mean_nll: float | None
    """Nats per trained token at the last logged step."""
    eval_mean_nll: float | None
    """Nats per trained token on held-out rows at the last evaluation."""
    train_loss: float | None = None
    """Loss of a pair or an answer at the last logged step, where answers are compared."""
    eval_loss: float | None = None
    """The same over the held-out rows at the last evaluation."""


def list_runs(output_dir: Path | str) -> list[RunSummary]:
    """Return the runs in `output_dir`, the newest last; other folders are left out. Raises MachineError."""
    output_dir = home_expanded(output_dir)
    if not output_dir.is_dir():
        return []
    with durable.translate_os_errors("list", output_dir):
        folders = [path for path in output_dir.iterdir() if not path.name.startswith(".")]
    runs = []
    for folder in folders:
        # Folders of other programs may lie beside the runs.
        with contextlib.suppress(CheckpointError):
            runs.append(_summary(folder, read_run_file(folder)))
    return sorted(runs, key=lambda run: (run.created, run.name))


def _summary(folder: Path, info: RunFile) -> RunSummary:
    is_interrupted = info["state"] == "running" and not durable.is_locked(folder / LOCK_FILE)
    newest: dict[str, Any] = {}  # the newest value of each metric
    for line in durable.read_lines(folder / "metrics.jsonl"):
        newest.update(line)
    return RunSummary(
        path=folder,
        name=folder.name,
        state="interrupted" if is_interrupted else info["state"],
        created=str(info.get("created", "")),
        step=newest.get("step"),
        total_steps=info.get("total_steps"),
        train_mean_nll=newest.get("train_mean_nll"),
        eval_mean_nll=newest.get("eval_mean_nll"),
        train_loss=newest.get("train_loss"),
        eval_loss=newest.get("eval_loss"),
    )


def find_newest_unfinished(output_dir: Path | str) -> Path:
    """Return the folder of the newest run that can be resumed and that no process has locked.

    Raises CheckpointError.
    """
    unfinished = [
        run
        for run in list_runs(output_dir)
        if run.state in (*RESUMABLE, "interrupted") and not durable.is_locked(run.path / LOCK_FILE)
    ]
    if not unfinished:
        raise CheckpointError(
            "there is no unfinished run to go on with",
            where=printable(output_dir),
            fix="`llmtune runs` lists what is there; name a run, or another folder with run.output_dir=DIR",
        )
    return unfinished[-1].path


def resolve_run(run: str | None, output_dir: Path | str) -> Path:
    """Return the folder of RUN: a folder, a name in `output_dir`, or None for the newest unfinished run.

    Raises CheckpointError.
    """
    if run is None:
        return find_newest_unfinished(output_dir)
    # A folder as typed wins over a name, because the shell completes folders.
    for candidate in (Path(run), home_expanded(output_dir) / run):
        if (candidate / RUN_FILE).is_file():
            return candidate.absolute()
    names = [summary.name for summary in list_runs(output_dir)]
    shown = f"the runs there: {', '.join(names[-5:])}" if names else "there are no runs there"
    raise CheckpointError(f"no run `{printable(run)}`, neither as a folder nor in {printable(output_dir)}", fix=shown)


def config_file_of(folder: Path) -> Path:
    """Return the config file of a run. Raises CheckpointError when the folder is no run or the file is missing."""
    read_run_file(folder)
    if not (folder / CONFIG_FILE).is_file():
        fix = "restore it from a backup, or start a new run with `llmtune train`"
        raise CheckpointError(f"{CONFIG_FILE} is missing", where=printable(folder), fix=fix)
    return folder / CONFIG_FILE
