"""What of a run is kept on disk: its folder and identity, its checkpoints, the best model and the final one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmtune import durable
from llmtune.assembly import Assembled
from llmtune.config.dump import config_to_dict, config_to_yaml
from llmtune.config.layers import ResolvedConfig
from llmtune.config.schema import ModelConfig
from llmtune.errors import CheckpointError, MachineError, Problem
from llmtune.model_card import model_card
from llmtune.models import adapters, save
from llmtune.plan.memory import optimizer_bytes
from llmtune.preparation import Prepared
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs import identity, retention
from llmtune.runs.checkpoint import CheckpointFolder, LoadedCheckpoint
from llmtune.runs.disk import DiskForecast, SaveAttempts, forecast_disk
from llmtune.runs.folder import RunFolder, checked_name, clean_name_part, create_run, read_run_file
from llmtune.runs.secrets import redacted
from llmtune.tracking.jsonl import RunRecord
from llmtune.tracking.tracker import RunInfo
from llmtune.training.state import Snapshot

__all__ = [
    "CONFIG_FILE",
    "Keeper",
    "check_name",
    "config_file_of",
    "create",
    "find_checkpoint",
    "identity_of",
    "own_tokenizer",
    "restore_weights",
    "run_info",
    "run_name",
]

CONFIG_FILE = "config.yaml"
ORIGINS_FILE = "origins.json"
LEDGER_FILE = "ledger.jsonl"
TOKENIZER_FOLDER = "tokenizer"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
BEST, FINAL = "best", "final"


def run_name(template: str, *, model: str, config: str, seed: int) -> str:
    """Fill in `run.name`.

    >>> run_name("{model}-{config}-{seed}", model="org/Model", config="test", seed=7)
    'Model-test-7'
    """
    values = {"model": clean_name_part(model), "config": clean_name_part(config), "timestamp": time.strftime("%Y%m%d-%H%M%S"), "seed": seed}
    for key, value in values.items():
        template = template.replace("{" + key + "}", str(value))
    return template


def check_name(resolved: ResolvedConfig) -> None:
    """Raise UsageError when `run.name` cannot be the name of a run, while nothing is loaded yet; `create` asks again, of the final name."""
    config = resolved.config
    checked_name(run_name(config.run.name, model=config.model.name, config=resolved.name, seed=config.run.seed))


def own_tokenizer(run: RunFolder, asked: ModelConfig) -> Path | None:
    """The folder of the tokenizer that the run trained for itself; None where it has none, or where something else is asked for.

    Another tokenizer or chat template than when the run began is to be opened as in a new run: its digest says whether the run can go on.
    """
    folder = run.path / TOKENIZER_FOLDER
    was = run.info["identity"]["config"]["model"]
    is_as_it_was = (asked.tokenizer, asked.chat_template) == (was["tokenizer"], was["chat_template"])
    return folder if folder.is_dir() and is_as_it_was else None


def create(resolved: ResolvedConfig, prepared: Prepared, assembled: Assembled, say: Callable[[str], None]) -> RunFolder:
    """Make the folder of a new run with everything that is known before step 1, and say where; nothing is left behind when that fails.

    Raises MachineError when the disk is too small for the whole run, UsageError for a name that cannot be one.
    """
    config = prepared.config
    name = run_name(config.run.name, model=prepared.source.short_name, config=resolved.name, seed=config.run.seed)
    forecast = forecast_for(prepared, assembled)

    def fill(folder: Path) -> None:
        durable.write_text(folder / CONFIG_FILE, config_to_yaml(resolved.config))
        durable.write_json(folder / ORIGINS_FILE, {key: str(origin) for key, origin in resolved.origins.items()})
        with durable.AppendLog(folder / LEDGER_FILE) as log:
            for entry in prepared.data.ledger.entries:
                log.append(entry)
        if prepared.tokenizer_is_new:
            checkpoints.save_folder(folder / TOKENIZER_FOLDER, lambda place: save.write_tokenizer(prepared.tokenizer.tokenizer, place))

    run = create_run(
        config.run.output_dir,
        name,
        fill=fill,
        identity={
            "config_name": resolved.name,
            "seed": config.run.seed,
            "tags": list(config.run.tags),
            "notes": config.run.notes,
            "identity": identity_of(prepared, assembled),
            "decisions": [
                {"key": one.key, "value": str(one.value), "reason": one.reason} for one in (*prepared.decisions, *assembled.decisions)
            ],
            "data": prepared.data.ledger.summary(),
            "parameters": {"total": assembled.counts.total, "trained": assembled.counts.trained},
            "disk_forecast_bytes": forecast.needed_bytes,
            **identity.describe_machine(),
        },
    )
    say(f"run     {durable.printable(run.path)}" + ("" if run.name == name else f" (there is a run `{durable.printable(name)}` already)"))
    return run


def identity_of(prepared: Prepared, assembled: Assembled) -> dict[str, Any]:
    """Everything that decides the numbers of this run; compared key by key when it goes on."""
    heldout = prepared.data.eval
    return {
        "config": config_to_dict(prepared.config),
        "digests": {
            "base": assembled.base_digest,
            "tokenizer": prepared.tokenizer.digest,
            "renderer": prepared.renderer.digest,
            "train": prepared.data.train.digest,
            "heldout": heldout.digest if heldout is not None else None,
            "batches": assembled.batches.digest,
        },
        "versions": identity.describe_machine()["versions"],
        "processor": identity.describe_machine()["processor"],
        "global_batch_size": assembled.batches.global_batch,
        "device": str(assembled.devices.device),
        "engine": assembled.engine.layout,
        "threads": torch.get_num_threads(),
        "world_size": assembled.devices.world_size,
    }


def run_info(run: RunFolder, config_name: str, prepared: Prepared, assembled: Assembled, start_step: int) -> RunInfo:
    """What trackers may know of the run."""
    shape = assembled.model.config.to_dict()
    keys = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "vocab_size")
    return RunInfo(
        name=run.name,
        folder=run.path,
        total_steps=assembled.batches.total_steps,
        start_step=start_step,
        model=prepared.config.model.name,
        config_name=config_name,
        tags=prepared.config.run.tags,
        notes=prepared.config.run.notes,
        config=config_to_dict(assembled.config),
        parameters={"total": assembled.counts.total, "trained": assembled.counts.trained},
        architecture={key: shape[key] for key in keys if key in shape},
    )


def config_file_of(folder: Path) -> Path:
    """The config a run was started with. Raises CheckpointError when the folder is no run or its config is gone."""
    read_run_file(folder)
    if not (folder / CONFIG_FILE).is_file():
        fix = "restore it from a backup, or start a new run with `llmtune train`"
        raise CheckpointError(f"{CONFIG_FILE} is missing", where=durable.printable(folder), fix=fix)
    return folder / CONFIG_FILE


def find_checkpoint(run: RunFolder, wanted: Path | None) -> tuple[LoadedCheckpoint | None, list[Problem]]:
    """The checkpoint to go on from: the one named, or the newest that is whole; None where the run never saved.

    Raises CheckpointError when the one named is damaged, or all are.
    """
    if wanted is None:
        found, problems = checkpoints.newest_valid(run)
        return (checkpoints.load(found) if found is not None else None), problems
    step = wanted.name.removeprefix("step-")
    if not step.isdigit():
        raise CheckpointError(
            f"`{wanted.name}` is not the name of a checkpoint", str(wanted), "name a folder such as checkpoints/step-000100"
        )
    chosen: CheckpointFolder = checkpoints.checkpoint_of(run, int(step))
    problems = checkpoints.verify(chosen, run_id=run.run_id)
    if problems:
        raise CheckpointError.all(problems)
    return checkpoints.load(chosen), []


def restore_weights(assembled: Assembled, loaded: LoadedCheckpoint) -> None:
    """Put the trained weights of a verified checkpoint into the model, bit for bit; the very bytes that do are compared with the manifest.

    Raises CheckpointError when they were changed since the checkpoint was verified.
    """
    name = ADAPTER_FILE if assembled.is_adapted else WEIGHTS_FILE
    tensors, _ = durable.read_tensors(loaded.path / name, sha256=loaded.manifest["files"][name]["sha256"])
    if assembled.is_adapted:
        adapters.fill_adapter(assembled.model, loaded.path, tensors)
    else:
        save.restore_weights(assembled.model, tensors)


def forecast_for(prepared: Prepared, assembled: Assembled) -> DiskForecast:
    """What the run's disk must hold at the worst moment; raises MachineError when it does not fit."""
    config = assembled.config
    weights = sum(one.numel() * one.element_size() for one in assembled.parameters.values())
    optimizer = optimizer_bytes(config.training.optimizer, entries=assembled.counts.trained, entry_bytes=weights)
    batches = assembled.batches
    every = config.checkpoint.every_steps or batches.steps_per_epoch
    return forecast_disk(
        config.run.output_dir,
        checkpoint_bytes=weights + optimizer,
        saves=-(-batches.total_steps // every),
        keep_last=config.checkpoint.keep_last,
        best_bytes=weights if config.checkpoint.keep_best and prepared.data.eval is not None else 0,
        final_bytes=weights,
    )


class Keeper:
    """Writes the run's checkpoints, its best and its final model, and keeps as many as the config says."""

    def __init__(self, run: RunFolder, prepared: Prepared, assembled: Assembled, say: Callable[[str], None]) -> None:
        self._run, self._prepared, self._assembled, self._say = run, prepared, assembled, say
        self._attempts = SaveAttempts(lambda: durable.sweep_litter(run.checkpoints))
        self._manifest = {"threads": torch.get_num_threads(), "world_size": assembled.devices.world_size}
        self._resumed_from: int | None = None

    def protect(self, step: int) -> None:
        """Never delete the checkpoint of `step`: this process goes on from it."""
        self._resumed_from = step

    def save(self, step: int, snapshot: Snapshot, record: RunRecord | None) -> bool:
        """Commit the checkpoint of `step`, then delete what is no longer wanted; a save that fails is said and the run goes on.

        The lines of `record`, which the checkpoint counts on, are on the disk before it. Returns whether it was saved.
        """

        def commit() -> Path:
            if record is not None:
                record.sync()
            return checkpoints.save_checkpoint(self._run, step, self._write_weights, snapshot, manifest_extra=self._manifest)

        saved = self._attempts.save(commit)
        if saved is None:
            self._say(f"warning: the save after step {step} failed, the one before it stands: {self._attempts.failure}")
            return False
        protected = {self._resumed_from} if self._resumed_from is not None else set()
        for warning in retention.apply(self._run, self._prepared.config.checkpoint.keep_last, protected_steps=protected):
            self._say(f"warning: {warning}")
        return True

    def keep_best(self, metrics: Mapping[str, Any], step: int) -> None:
        """Replace `best/` by the model as it is now."""
        self._attempts.save(
            lambda: checkpoints.save_folder(self._run.checkpoints / BEST, self._write_result(metrics, step)), what="best model"
        )

    def write_final(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write what the user takes away: adapter or model, tokenizer, chat template, generation config, model card.

        It lies in `checkpoints/final/`; `final` in the run folder is a short way there, where the file system knows such ways.
        """
        saved = self._attempts.save(
            lambda: checkpoints.save_folder(self._run.checkpoints / FINAL, self._write_result(metrics, step)), what="final model"
        )
        if saved is not None:
            with contextlib.suppress(MachineError):
                durable.point_to(self._run.path / FINAL, f"{self._run.checkpoints.name}/{FINAL}")

    def be_sure(self) -> None:
        """Raise MachineError (exit 6) when the last save never worked."""
        self._attempts.finish()

    def _write_weights(self, folder: Path) -> None:
        """The trained weights as a checkpoint holds them: an adapter in peft's files, a whole model by parameter name beside its config."""
        if self._assembled.is_adapted:
            save.write_adapter(self._assembled.model, folder, **self._base())
        else:
            save.write_weights(self._assembled.model, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            durable.write_json(folder / "config.json", self._assembled.model.config.to_dict())

    def _base(self) -> dict[str, Any]:
        source = self._prepared.source
        name = self._prepared.config.model.name if source.kind in ("hub", "gguf") else source.location
        return {"base_digest": self._assembled.base_digest, "base_name": name, "base_revision": source.revision}

    def _write_result(self, metrics: Mapping[str, Any], step: int) -> Callable[[Path], None]:
        tokenizer, stops = self._prepared.tokenizer.tokenizer, self._prepared.renderer.stop_token_ids

        def write(folder: Path) -> None:
            if self._assembled.is_adapted:
                save.write_adapter(self._assembled.model, folder, tokenizer=tokenizer, stop_token_ids=stops, **self._base())
            else:
                save.write_model(self._assembled.model, tokenizer, folder, stop_token_ids=stops)
            durable.write_text(folder / "README.md", self._card(metrics, step))

        return write

    def _card(self, metrics: Mapping[str, Any], step: int) -> str:
        return model_card(
            run=self._run.name,
            base=self._prepared.source.name,
            base_path=None if self._prepared.source.kind == "scratch" else self._assembled.model.config._name_or_path,
            method="LoRA" if self._assembled.is_adapted else "full",
            step=step,
            total_steps=self._assembled.batches.total_steps,
            metrics=metrics,
            data=self._prepared.data.ledger.summary(),
            config=redacted(config_to_yaml(self._assembled.config)),
        )
