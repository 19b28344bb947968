"""What of a run is kept on disk: its folder and identity, its checkpoints, the best model and the final one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmtune import durable
from llmtune.adapters.load import load_adapter_weights
from llmtune.adapters.write import write_adapter
from llmtune.common.printing import PrintLine
from llmtune.common.secrets import redacted
from llmtune.config.dump import config_to_yaml
from llmtune.engine.state import Snapshot
from llmtune.errors import CheckpointError, MachineError, Problem
from llmtune.models import save
from llmtune.models.model_card import trained_model_card
from llmtune.prepare import Prepared
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.checkpoint import CheckpointFolder, LoadedCheckpoint
from llmtune.runs.disk import SaveAttempts
from llmtune.runs.folder import RunFolder
from llmtune.tracking.jsonl import RunRecord
from llmtune.training.build import TrainingSetup

__all__ = ["Checkpointer", "find_checkpoint", "restore_weights"]

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
BEST, FINAL = "best", "final"


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
            f"`{wanted.name}` is not the name of a checkpoint",
            str(wanted),
            "name a folder such as checkpoints/step-000100",
        )
    chosen: CheckpointFolder = checkpoints.checkpoint_of(run, int(step))
    problems = checkpoints.verify(chosen, run_id=run.run_id)
    if problems:
        raise CheckpointError.all(problems)
    return checkpoints.load(chosen), []


def restore_weights(setup: TrainingSetup, loaded: LoadedCheckpoint) -> None:
    """Put the trained weights of a verified checkpoint into the model, bit for bit.

    The very bytes that do are compared with the manifest.

    Raises CheckpointError when they were changed since the checkpoint was verified.
    """
    name = ADAPTER_FILE if setup.is_adapted else WEIGHTS_FILE
    tensors, _ = durable.read_tensors(loaded.path / name, sha256=loaded.manifest["files"][name]["sha256"])
    if setup.is_adapted:
        load_adapter_weights(setup.model, loaded.path, tensors)
    else:
        save.restore_weights(setup.model, tensors)


class Checkpointer:
    """Writes the run's checkpoints, its best and its final model, and keeps as many as the config says."""

    def __init__(self, run: RunFolder, prepared: Prepared, setup: TrainingSetup, print_line: PrintLine) -> None:
        self._run, self._prepared, self._assembled, self._print_line = run, prepared, setup, print_line
        self._attempts = SaveAttempts(lambda: durable.remove_leftovers(run.checkpoints))
        self._manifest = {"threads": torch.get_num_threads(), "world_size": setup.devices.world_size}
        self._resumed_from: int | None = None

    def protect(self, step: int) -> None:
        """Never delete the checkpoint of `step`: this process goes on from it."""
        self._resumed_from = step

    def save(self, step: int, snapshot: Snapshot, record: RunRecord | None) -> bool:
        """Commit the checkpoint of `step`, then delete what is no longer wanted.

        A save that fails is said and the run goes on.

        The lines of `record`, which the checkpoint counts on, are on the disk before it. Returns whether it was saved.
        """

        def commit() -> Path:
            if record is not None:
                record.sync()
            return checkpoints.save_checkpoint(
                self._run, step, self._write_weights, snapshot, manifest_extra=self._manifest
            )

        saved = self._attempts.save(commit)
        if saved is None:
            self._print_line(
                f"warning: the save after step {step} failed, the one before it stands: {self._attempts.failure}"
            )
            return False
        protected = {self._resumed_from} if self._resumed_from is not None else set()
        for warning in checkpoints.delete_old_checkpoints(
            self._run, self._prepared.config.checkpoint.keep_last, protected_steps=protected
        ):
            self._print_line(f"warning: {warning}")
        return True

    def keep_best(self, metrics: Mapping[str, Any], step: int) -> None:
        """Replace `best/` by the model as it is now."""
        self._attempts.save(
            lambda: checkpoints.save_folder(self._run.checkpoints / BEST, self._write_result(metrics, step)),
            subject="best model",
        )

    def write_final(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write what the user takes away: adapter or model, tokenizer, chat template, generation config, model card.

        It lies in `checkpoints/final/`; `final` in the run folder is a short way there, where the file system knows
        such ways.
        """
        saved = self._attempts.save(
            lambda: checkpoints.save_folder(self._run.checkpoints / FINAL, self._write_result(metrics, step)),
            subject="final model",
        )
        if saved is not None:
            with contextlib.suppress(MachineError):
                durable.replace_symlink(self._run.path / FINAL, f"{self._run.checkpoints.name}/{FINAL}")

    def raise_if_unsaved(self) -> None:
        """Raise MachineError (exit 6) when the last save never worked."""
        self._attempts.raise_if_failed()

    def _write_weights(self, folder: Path) -> None:
        """The trained weights as a checkpoint holds them: an adapter in peft's files, a whole model by parameter name
        beside its config.
        """
        if self._assembled.is_adapted:
            write_adapter(self._assembled.model, folder, **self._base())
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
                write_adapter(self._assembled.model, folder, tokenizer=tokenizer, stop_token_ids=stops, **self._base())
            else:
                save.write_model(self._assembled.model, tokenizer, folder, stop_token_ids=stops)
            durable.write_text(folder / "README.md", self._card(metrics, step))

        return write

    def _card(self, metrics: Mapping[str, Any], step: int) -> str:
        return trained_model_card(
            run=self._run.name,
            base=self._prepared.source.name,
            base_path=None if self._prepared.source.kind == "scratch" else self._assembled.model.config._name_or_path,
            is_adapter=self._assembled.is_adapted,
            step=step,
            total_steps=self._assembled.batches.total_steps,
            metrics=metrics,
            data=self._prepared.data.ledger.summary(),
            config=redacted(config_to_yaml(self._assembled.config)),
        )
