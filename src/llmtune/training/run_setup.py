"""The folder and the identity of a new run."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from llmtune import durable
from llmtune.common.printing import PrintLine
from llmtune.common.text import printable
from llmtune.config.dump import config_to_dict, config_to_yaml
from llmtune.config.layers import ResolvedConfig
from llmtune.config.schema import ModelConfig
from llmtune.models import save
from llmtune.plan.memory import optimizer_bytes
from llmtune.prepare import Prepared
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.disk import DiskForecast, forecast_disk
from llmtune.runs.folder import CONFIG_FILE, RunFolder, checked_name, clean_name_part, create_run
from llmtune.runs.identity import Identity, describe_machine
from llmtune.tracking.tracker import RunInfo
from llmtune.training.build import TrainingSetup

__all__ = ["check_name", "create", "identity_of", "own_tokenizer", "run_info", "run_name"]


ORIGINS_FILE = "origins.json"


LEDGER_FILE = "ledger.jsonl"


TOKENIZER_FOLDER = "tokenizer"


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
        template = template.replace("{" + key + "}", str(value))
    return template


def check_name(resolved: ResolvedConfig) -> None:
    """Raise UsageError when `run.name` cannot be the name of a run, while nothing is loaded yet.

    `create` asks again, of the final name.
    """
    config = resolved.config
    checked_name(run_name(config.run.name, model=config.model.name, config=resolved.name, seed=config.run.seed))


def own_tokenizer(run: RunFolder, asked: ModelConfig) -> Path | None:
    """The folder of the tokenizer that the run trained for itself.

    None where it has none, or where something else is asked for.

    Another tokenizer or chat template than when the run began is to be opened as in a new run: its digest says whether
    the run can go on.
    """
    folder = run.path / TOKENIZER_FOLDER
    was = run.info["identity"]["config"]["model"]
    is_as_it_was = (asked.tokenizer, asked.chat_template) == (was["tokenizer"], was["chat_template"])
    return folder if folder.is_dir() and is_as_it_was else None


def create(resolved: ResolvedConfig, prepared: Prepared, setup: TrainingSetup, print_line: PrintLine) -> RunFolder:
    """Make the folder of a new run with everything that is known before step 1, and say where.

    Nothing is left behind when that fails.

    Raises MachineError when the disk is too small for the whole run, UsageError for a name that cannot be one.
    """
    config = prepared.config
    name = run_name(config.run.name, model=prepared.source.short_name, config=resolved.name, seed=config.run.seed)
    forecast = forecast_for(prepared, setup)

    def fill(folder: Path) -> None:
        durable.write_text(folder / CONFIG_FILE, config_to_yaml(resolved.config))
        durable.write_json(folder / ORIGINS_FILE, {key: str(origin) for key, origin in resolved.origins.items()})
        with durable.AppendLog(folder / LEDGER_FILE) as log:
            for entry in prepared.data.ledger.entries:
                log.append(entry)
        if prepared.tokenizer_is_new:
            checkpoints.save_folder(
                folder / TOKENIZER_FOLDER, lambda place: save.write_tokenizer(prepared.tokenizer.tokenizer, place)
            )

    run = create_run(
        config.run.output_dir,
        name,
        fill=fill,
        details={
            "config_name": resolved.name,
            "seed": config.run.seed,
            "tags": list(config.run.tags),
            "notes": config.run.notes,
            "identity": identity_of(prepared, setup),
            "decisions": [
                {"key": one.key, "value": str(one.value), "reason": one.reason}
                for one in (*prepared.decisions, *setup.decisions)
            ],
            "data": prepared.data.ledger.summary(),
            "parameters": {"total": setup.counts.total, "trained": setup.counts.trained},
            "disk_forecast_bytes": forecast.needed_bytes,
            **describe_machine(),
        },
    )
    print_line(
        f"run     {printable(run.path)}"
        + ("" if run.name == name else f" (there is a run `{printable(name)}` already)")
    )
    return run


def identity_of(prepared: Prepared, setup: TrainingSetup) -> Identity:
    """Everything that decides the numbers of this run; compared key by key when it goes on."""
    heldout, machine = prepared.data.eval, describe_machine()
    return {
        "config": config_to_dict(prepared.config),
        "digests": {
            "base": setup.base_digest,
            "tokenizer": prepared.tokenizer.digest,
            "renderer": prepared.renderer.digest,
            "train": prepared.data.train.digest,
            "heldout": heldout.digest if heldout is not None else None,
            "batches": setup.batches.digest,
        },
        "versions": machine["versions"],
        "processor": machine["processor"],
        "global_batch_size": setup.batches.global_batch,
        "device": str(setup.devices.device),
        "engine": setup.engine.layout,
        "threads": torch.get_num_threads(),
        "world_size": setup.devices.world_size,
    }


def run_info(run: RunFolder, config_name: str, prepared: Prepared, setup: TrainingSetup, start_step: int) -> RunInfo:
    """What trackers may know of the run."""
    shape = setup.model.config.to_dict()
    keys = (
        "model_type",
        "hidden_size",
        "n_embd",
        "num_hidden_layers",
        "n_layer",
        "num_attention_heads",
        "n_head",
        "vocab_size",
    )
    return RunInfo(
        name=run.name,
        folder=run.path,
        total_steps=setup.batches.total_steps,
        start_step=start_step,
        model=prepared.config.model.name,
        config_name=config_name,
        tags=prepared.config.run.tags,
        notes=prepared.config.run.notes,
        config=config_to_dict(setup.config),
        parameters={"total": setup.counts.total, "trained": setup.counts.trained},
        architecture={key: shape[key] for key in keys if key in shape},
    )


def forecast_for(prepared: Prepared, setup: TrainingSetup) -> DiskForecast:
    """The disk space of the run at the worst moment. Raises MachineError when it does not fit."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in setup.parameters.values())
    return forecast_disk(
        setup.config,
        weights_bytes=weights,
        optimizer_bytes=optimizer_bytes(
            setup.config.training.optimizer, entries=setup.counts.trained, entry_bytes=weights
        ),
        total_steps=setup.batches.total_steps,
        steps_per_epoch=setup.batches.steps_per_epoch,
        has_heldout=prepared.data.eval is not None,
    )
