"""`--resume auto`: the same command, started again, goes on with the run that it began before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmtune.common.environment import home_expanded
from llmtune.common.secrets import redacted
from llmtune.common.text import printable
from llmtune.config.dump import config_to_dict
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.config.schema import Config
from llmtune.engine.devices import Devices
from llmtune.errors import CheckpointError, ConfigError, DivergedError, Problem
from llmtune.prepare import find_model
from llmtune.runs.folder import CONFIG_FILE, config_file_of
from llmtune.runs.identity import compare
from llmtune.runs.run_file import read_run_file
from llmtune.training.checkpointer import SHARE_FOLDER
from llmtune.training.run_setup import Joined, check_name, meet_processes, run_name, with_defaults

__all__ = ["OwnRun", "find_own_run", "refuse_another"]


class OwnRun(NamedTuple):
    """What the processes of a command that met found in its place."""

    joined: Joined
    path: Path | None
    """The run that the command began before; None where there is none."""
    state: str
    """As in run.json."""
    step: int
    """The last step of a finished run."""
    resolved: ResolvedConfig
    """The config to train with: that of the run where there is one."""

    def sentence(self) -> str:
        """What the command does now."""
        if self.path is None:
            return "resume  auto: this command has no run yet; it begins one"
        if self.state == "finished":
            return (
                f"resume  auto: {printable(self.path.name)} is finished after step {self.step}; nothing is left to do"
            )
        return f"resume  auto: {printable(self.path.name)} was begun by this command; it goes on"


def find_own_run(resolved: ResolvedConfig, options: Options) -> OwnRun:
    """Meet the other processes, and find the run that this command began before; the main process decides for all.

    Raises ConfigError where its place is taken by a run with another config, with each key that differs, and where
    another process does not see its folder; DivergedError where that run diverged, because it would again.
    """
    check_name(resolved)
    joined = meet_processes(resolved.config, options)
    devices = joined[0]
    try:
        with devices.errors_printed_once():
            found = devices.from_main(devices.on_main(lambda: _find(resolved, options)))
            assert found is not None
            path = None if found["path"] is None else Path(found["path"])
            own = resolved if path is None else _own_config(path, devices)
    except BaseException:
        devices.close()  # the next run of a sweep meets anew
        raise
    return OwnRun(joined, path, found.get("state", ""), found.get("step", 0), own)


def _find(resolved: ResolvedConfig, options: Options) -> dict[str, Any]:
    config = resolved.config
    model = find_model(config, options).short_name
    name = run_name(config.run.name, model=model, config=resolved.name, seed=config.run.seed)
    path = home_expanded(config.run.output_dir).absolute() / name
    if not os.path.lexists(path):
        return {"path": None}
    info = read_run_file(path)
    refuse_another(info.get("requested"), resolved.config, path)
    config_file_of(path)  # refused here, by one process for all
    if info["state"] == "diverged":
        raise DivergedError(
            f"{printable(name)} diverged after step {info.get('step')}, and would again",
            str(path),
            "begin another run: a lower training.learning_rate and another --name",
        )
    return {"path": str(path), "state": info["state"], "step": info.get("step", 0)}


def _own_config(path: Path, devices: Devices) -> ResolvedConfig:
    """Read the config of the run in `path`. Raises ConfigError in all processes where one has another file there."""
    file = path / CONFIG_FILE
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:  # a machine that does not share the storage of the runs
        found = str(error.strerror)
    devices.check_alike({printable(file): found}, fix=SHARE_FOLDER)
    # Without the environment, as `llmtune resume` reads it: the run goes on as it began.
    return load_config(str(file), environ={})


def refuse_another(requested: Mapping[str, Any] | None, config: Config, path: Path) -> None:
    """Raise ConfigError with each key in which `config` is not what the run in `path` was begun with.

    Raises CheckpointError for a run without a record of its command.
    """
    if requested is None:
        raise CheckpointError(
            "an earlier version of llmtune began this run, without a record of its command",
            str(path),
            "go on with `llmtune resume`, or choose another --name",
        )
    was, now = with_defaults(requested, config_to_dict(Config())), redacted(config_to_dict(config))
    fix = f"choose another --name; or change the run on purpose: `llmtune resume {printable(path)} KEY=VALUE`"
    problems = [
        Problem(f"a run with another config is there: {difference}", str(path), fix)
        for difference in compare(was, now)
        if difference.key != "run.output_dir"  # its folder was found, however it is written
    ]
    if problems:
        raise ConfigError.all(problems)
