"""The run's folder: made for a new run, opened again for a stopped one, and the identity they are compared by."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtune import durable
from llmtune.common.decisions import Decision
from llmtune.common.environment import home_expanded, launched_process
from llmtune.common.records import flat_items
from llmtune.common.text import PrintLine, printable
from llmtune.config.dump import config_to_dict, config_to_yaml, plain
from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options
from llmtune.config.schema import Config, ModelConfig, SourceConfig
from llmtune.data.dataset.report import data_excerpt
from llmtune.engine.devices import Devices, open_devices
from llmtune.errors import MachineError
from llmtune.models import save
from llmtune.plan.memory import optimizer_bytes
from llmtune.plan.resolve_auto import OPEN_VALUES
from llmtune.plan.summary import Plan, as_dict
from llmtune.prepare import Prepared, keep_fitted
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.checkpoint import LoadedCheckpoint
from llmtune.runs.disk import forecast_disk
from llmtune.runs.folder import CONFIG_FILE, RunFolder, checked_name, clean_name_part, create_run
from llmtune.runs.identity import Effect, Identity, compare, describe_machine, refuse_changes
from llmtune.runs.run_file import RunDetails
from llmtune.runs.signals import exit_where_blocked, stop_with_launcher
from llmtune.tracking.model_graph import model_graph
from llmtune.tracking.tracker import RunInfo
from llmtune.training.build import TrainingSetup
from llmtune.training.checkpointer import find_checkpoint, load_in_all
from llmtune.training.progress import print_difference, print_length, print_resume

__all__ = [
    "Joined",
    "StoppedRun",
    "check_name",
    "compare_identity",
    "create",
    "facts_of",
    "identity_of",
    "meet_processes",
    "open_stopped",
    "run_info",
    "run_name",
    "with_defaults",
]

ORIGINS_FILE = "origins.json"
LEDGER_FILE = "ledger.jsonl"
DATA_FILE = "data.json"
TOKENIZER_FOLDER = "tokenizer"
SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "vocab_size",
)
"""Keys of a transformers config that trackers show."""
OWN_TO_A_PROCESS = ("data.cache_dir", "data.num_workers")
"""Keys of the config that may differ between the processes of a run: nothing in the run depends on them."""


Joined = tuple[Devices, list[Decision]]
"""The processes of a command that have met, and what was chosen then."""


def meet_processes(config: Config, options: Options) -> Joined:
    """Open the devices of this process and meet the others; a signal ends it while it waits for them.

    Raises ConfigError for a way to share a training that does not work here, MachineError for an environment that does
    not say how they meet, RankLostError when the others do not come.
    """
    process = launched_process()
    if process.world_size == 1:
        return open_devices(config, options)
    stop_with_launcher()
    with exit_where_blocked(announces=process.rank == 0):
        return open_devices(config, options)


@dataclass(frozen=True)
class StoppedRun:
    """A run to go on with, as each of its processes has it."""

    path: Path
    identity: Identity
    """What the run was made of when it began (see `identity_of`)."""
    loaded: LoadedCheckpoint | None
    """The checkpoint to go on from; None where the run never saved."""
    folder: RunFolder | None
    """The folder, locked, in the main process; None in the others, which only read."""

    def own_tokenizer(self, model: ModelConfig) -> Path | None:
        """The folder of the tokenizer that the run trained for itself; None where `model` does not use it.

        It uses none, or names another tokenizer, chat template or token than when the run began.
        """
        # Another one is opened as in a new run: then its digest decides whether the run can go on.
        folder, earlier = self.path / TOKENIZER_FOLDER, self.identity["config"]["model"]
        keys = ("tokenizer", "chat_template", "pad_token", "eos_token")
        is_same = all(getattr(model, key) == earlier.get(key) for key in keys)
        return folder if folder.is_dir() and is_same else None


def open_stopped(path: Path, checkpoint: Path | None, devices: Devices, print_line: PrintLine) -> StoppedRun:
    """Open the run in `path` at `checkpoint`, or at its newest valid one.

    The main process locks the folder, verifies and chooses; the others read what it chose. Raises MachineError where
    another process has the run, CheckpointError where no checkpoint can be used, ConfigError where the processes do not
    see the same one.
    """
    folder = devices.on_main(lambda: RunFolder.open(path))
    loaded = None

    def find() -> None:
        nonlocal loaded
        assert folder is not None, "the main process has opened it"
        loaded, problems = find_checkpoint(folder, checkpoint)
        newest = checkpoints.all_checkpoints(folder)[-1].step if checkpoint is not None else None
        print_resume(folder, loaded, problems, print_line, newest_step=newest)

    try:
        devices.on_main(find)
        identity = devices.from_main(folder.info["identity"] if folder is not None else None)
        assert identity is not None
        loaded = load_in_all(loaded, devices)
    except BaseException:  # an interrupt too: the lock must not outlive the attempt
        if folder is not None:
            folder.close()
        raise
    return StoppedRun(path.absolute(), identity, loaded, folder)


def compare_identity(
    stopped: StoppedRun, setup: TrainingSetup, resolved: ResolvedConfig, *, allow_changes: bool, print_line: PrintLine
) -> None:
    """Print how the training differs from the one that was stopped, and let it be the run's own from here on.

    Raises CheckpointError where it no longer fits the checkpoint, or would be another training and that is not allowed.
    """
    requested = resolved.config
    now = identity_of(setup)
    differences = compare({**stopped.identity, "config": with_open_values(stopped.identity, now, requested)}, now)
    # Before a step is made: another training under the same name would be found out only by its results.
    allowed = refuse_changes(differences, where=str(stopped.path), allow_changes=allow_changes)
    for difference in allowed:
        print_difference(difference, print_line)
    if stopped.loaded is not None:
        print_length(stopped.loaded.step, setup.batches.total_steps, print_line)
    if stopped.folder is not None and any(difference.effect is Effect.SCHEDULE for difference in allowed):
        # Stopped once more, it goes on with what was allowed here, and nobody has to say it again.
        _write_config(stopped.folder.path, resolved, setup)
        stopped.folder.update(identity=now)


def with_open_values(earlier: Identity, now: Identity, requested: Config) -> dict[str, Any]:
    """The config of an earlier identity with its open values as now, where the config still leaves them open.

    Earlier versions recorded `null` and `auto`, for which this one chooses the same: it follows from the model and the
    device, which the identity has too.
    """
    # A key that this version has and the run's did not: its default says what the run did.
    config = {**earlier["config"], **with_defaults(earlier["config"], config_to_dict(Config()))}
    source = plain(SourceConfig())
    assert isinstance(source, dict)
    for side in ("train", "eval"):
        config["data"][side] = [with_defaults(given, source) for given in config["data"][side]]
    for section, key, is_open in OPEN_VALUES:
        if config[section].get(key, is_open) == is_open == getattr(getattr(requested, section), key):
            config[section][key] = now["config"][section][key]
    return config


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and the defaults of those that are not in it; sections are filled key by key."""
    return {**values} | {
        key: with_defaults(values.get(key, {}), default) if isinstance(default, dict) else values.get(key, default)
        for key, default in defaults.items()
    }


def run_name(template: str, *, model: str, config: str, seed: int) -> str:
    """Fill in `run.name`.

    >>> run_name("{model}-{config}-{seed}", model="org/Model", config="test", seed=7)
    'Model-test-7'
    """
    values = {
        "model": clean_name_part(model),
        "config": clean_name_part(config),
        "timestamp": time.strftime("%Y%m%d-%H%M%S"),
        "seed": seed,
    }
    for key, value in values.items():
        # Not str.format, which would also read attributes of what it fills in.
        template = template.replace("{" + key + "}", str(value))
    return template


def check_name(resolved: ResolvedConfig) -> None:
    """Raise UsageError for a `run.name` that no run can have, MachineError for a `run.output_dir` that is no folder."""
    config = resolved.config
    folder = home_expanded(config.run.output_dir).absolute()
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    if not there.is_dir():
        problem = f"the runs are to lie in `{printable(folder)}`, and `{printable(there)}` is no folder"
        raise MachineError(problem, "run.output_dir", "name another folder: `run.output_dir=DIR`")
    checked_name(run_name(config.run.name, model=config.model.name, config=resolved.name, seed=config.run.seed))


def create(
    resolved: ResolvedConfig,
    setup: TrainingSetup,
    decisions: Sequence[Decision],
    print_line: PrintLine,
    plan: Plan | None = None,
) -> RunFolder:
    """Make the folder of a new run with everything that is known before step 1, and print where it is.

    decisions: choices about devices and trackers; those about rows and model are in the setup. config.yaml holds the
    config as it was given, open values included, with what was fitted to the model. Raises MachineError when the disk
    is too small for the whole run, UsageError for a name that cannot be one; nothing is left behind then.
    """
    prepared, config = setup.prepared, setup.config
    name = run_name(config.run.name, model=prepared.source.short_name, config=resolved.name, seed=config.run.seed)
    # A checkpoint holds the trained weights only; a frozen base stays where it came from.
    weight_bytes = sum(parameter.nbytes for parameter in setup.parameters.values())
    forecast = forecast_disk(
        config,
        weights_bytes=weight_bytes,
        optimizer_bytes=optimizer_bytes(
            config.training.optimizer, entries=setup.counts.trained, entry_bytes=weight_bytes
        ),
        total_steps=setup.batches.total_steps,
        steps_per_epoch=setup.batches.steps_per_epoch,
        has_heldout=prepared.data.eval is not None,
    )

    def fill(folder: Path) -> None:
        _write_config(folder, resolved, setup)
        durable.write_json(
            folder / DATA_FILE,
            data_excerpt(prepared.data, prepared.tokenizer.tokenizer, max_length=config.data.max_length),
        )
        with durable.AppendLog(folder / LEDGER_FILE) as log:
            for entry in prepared.data.ledger.entries:
                log.append(entry)
        # It exists nowhere else, and a resumed run must not train another one.
        if prepared.tokenizer_is_new:
            checkpoints.save_folder(
                folder / TOKENIZER_FOLDER, lambda staging: save.write_tokenizer(prepared.tokenizer.tokenizer, staging)
            )

    run = create_run(
        config.run.output_dir,
        name,
        fill=fill,
        details=_details(resolved, setup, decisions, plan, forecast.needed_bytes),
    )
    taken = "" if run.name == name else f" (there is a run `{printable(name)}` already)"
    print_line(f"run     {printable(run.path)}{taken}")
    return run


def _write_config(folder: Path, resolved: ResolvedConfig, setup: TrainingSetup) -> None:
    """Write config.yaml, which loads back to the config, and origins.json beside it."""
    durable.write_text(folder / CONFIG_FILE, config_to_yaml(keep_fitted(resolved.config, setup.config)))
    durable.write_json(folder / ORIGINS_FILE, {key: str(origin) for key, origin in resolved.origins.items()})


def _details(
    resolved: ResolvedConfig,
    setup: TrainingSetup,
    decisions: Sequence[Decision],
    plan: Plan | None,
    disk_forecast_bytes: int,
) -> RunDetails:
    """What run.json holds from the first moment."""
    prepared, config = setup.prepared, setup.config
    return {
        "config_name": resolved.name,
        "seed": config.run.seed,
        "tags": list(config.run.tags),
        "notes": config.run.notes,
        "requested": config_to_dict(resolved.config),
        "identity": identity_of(setup),
        "decisions": [
            {"key": decision.key, "value": str(decision.value), "reason": decision.reason}
            for decision in (*prepared.decisions, *setup.decisions, *decisions)
        ],
        "data": {**prepared.data.ledger.summary()},
        "parameters": {"total": setup.counts.total, "trained": setup.counts.trained},
        "disk_forecast_bytes": disk_forecast_bytes,
        "plan": as_dict(plan) if plan is not None else None,
        **describe_machine(),
    }


def identity_of(setup: TrainingSetup) -> Identity:
    """Everything that decides the numbers of a run; compared key by key when it goes on."""
    prepared, machine = setup.prepared, describe_machine()
    heldout = prepared.data.eval
    return {
        "config": config_to_dict(setup.config),
        "digests": {
            "base": setup.base_digest,
            "start": setup.start_digest,
            "reference": setup.reference_digest,
            "tokenizer": prepared.tokenizer.digest,
            "renderer": prepared.renderer.digest,
            "train": prepared.data.train.digest,
            "heldout": heldout.digest if heldout is not None else None,
            "batches": setup.batches.digest,
            "rewards": setup.rollouts.rewards_digest if setup.rollouts is not None else None,
            "loss": setup.objective.code,
        },
        "versions": machine["versions"],
        "processor": machine["processor"],
        "global_batch_size": setup.batches.global_batch,
        "device": str(setup.devices.device),
        "engine": setup.engine.layout,
        "threads": torch.get_num_threads(),
        "world_size": setup.devices.world_size,
    }


def facts_of(prepared: Prepared) -> dict[str, object]:
    """Facts that must be equal in all processes of a run, known before its model is loaded: a key for each value."""
    config = {key: value for key, value in flat_items(config_to_dict(prepared.config)) if key not in OWN_TO_A_PROCESS}
    heldout = prepared.data.eval
    return {
        **config,
        "tokenizer": prepared.tokenizer.digest,
        "chat template and masks": prepared.renderer.digest,
        "training rows": prepared.data.train.digest,
        "held-out rows": heldout.digest if heldout is not None else None,
        **{f"version of {name}": version for name, version in describe_machine()["versions"].items()},
    }


def _trained_by_module(setup: TrainingSetup) -> dict[str, int]:
    """Trained parameters by the module that they belong to."""
    counts: Counter[str] = Counter()
    for name, parameter in setup.parameters.items():
        counts[name.rpartition(".")[0]] += parameter.numel()
    return dict(counts)


def _origins_of(folder: Path) -> dict[str, str]:
    try:
        origins = json.loads((folder / ORIGINS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}  # a run of an earlier version, or a damaged file: nothing in the training depends on it
    return origins if isinstance(origins, dict) else {}


def run_info(run: RunFolder, config_name: str, setup: TrainingSetup, start_step: int) -> RunInfo:
    """The facts of a run that its trackers get when it starts."""
    shape, config = setup.model.config.to_dict(), setup.config
    return RunInfo(
        name=run.name,
        folder=run.path,
        total_steps=setup.batches.total_steps,
        start_step=start_step,
        model=config.model.name,
        config_name=config_name,
        tags=config.run.tags,
        notes=config.run.notes,
        config=config_to_dict(config),
        parameters={"total": setup.counts.total, "trained": setup.counts.trained},
        architecture={key: shape[key] for key in SHAPE_KEYS if key in shape},
        modules=_trained_by_module(setup),
        origins=_origins_of(run.path),
        ledger=run.info.get("data", {}),
        graph=model_graph(setup.model.config) if config.tracking.graph else None,
    )
