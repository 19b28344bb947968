"""The checkpoints of a run, its best and its final model: found, restored and written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from llmtune import durable
from llmtune.adapters.config_file import WEIGHTS_FILE as ADAPTER_FILE
from llmtune.adapters.config_file import LoraOptions
from llmtune.adapters.load import load_adapter_weights
from llmtune.adapters.write import adapter_state_and_config, write_adapter
from llmtune.common.secrets import redacted
from llmtune.common.text import PrintLine, printable
from llmtune.config.dump import config_to_yaml
from llmtune.deploy.usage import Result, adapter_result, usage
from llmtune.engine.devices import Devices
from llmtune.engine.masters import MasterOptimizer
from llmtune.engine.sharded_tensors import GatheredInTurn, is_in_parts, shard_like
from llmtune.engine.state import Snapshot
from llmtune.errors import CheckpointError, LlmtuneError, MachineError, Problem, in_one_line
from llmtune.models import save
from llmtune.models.load import ADDED_ROWS
from llmtune.models.model_card import THIS_FOLDER, trained_model_card
from llmtune.models.save import PromptDefaults, prompt_defaults_of, write_prompt_defaults
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.checkpoint import CheckpointFolder, LoadedCheckpoint
from llmtune.runs.disk import SaveAttempts
from llmtune.runs.folder import RunFolder
from llmtune.tracking.jsonl import RunRecord
from llmtune.training.build import TrainingSetup

__all__ = ["SHARE_FOLDER", "Checkpointer", "find_checkpoint", "load_in_all", "restore_weights"]

WEIGHTS_FILE = "model.safetensors"
BEST, FINAL = "best", "final"
SHARE_FOLDER = "every machine must see the same runs: let `run.output_dir` lie on storage that all of them share"
OPTIMIZER = "optimizer"
"""The snapshot's group of optimizer state."""


def find_checkpoint(run: RunFolder, requested: Path | None) -> tuple[LoadedCheckpoint | None, list[Problem]]:
    """Load the requested checkpoint, or the newest valid one; None where the run never saved.

    Also returns what is wrong with newer ones. Raises CheckpointError when the requested one is damaged, or all are.
    """
    if requested is None:
        newest, problems = checkpoints.newest_valid(run)
        return (checkpoints.load(newest) if newest is not None else None), problems
    step = requested.name.removeprefix("step-")
    if not step.isdigit():
        saved = [checkpoint.path.name for checkpoint in checkpoints.all_checkpoints(run)]
        is_model = requested.name in (BEST, FINAL)
        raise CheckpointError(
            f"`{requested.name}` holds the model alone, and going on needs the state of the optimizer too"
            if is_model
            else f"`{requested.name}` is not the name of a checkpoint",
            str(requested),
            f"name one of {run.checkpoints}: {', '.join(saved)}" if saved else "this run has saved no checkpoint",
        )
    checkpoint = checkpoints.checkpoint_of(run, int(step))
    problems = checkpoints.verify(checkpoint, run_id=run.run_id)
    if problems:
        raise CheckpointError.all(problems)
    return checkpoints.load(checkpoint), []


def load_in_all(loaded: LoadedCheckpoint | None, devices: Devices) -> LoadedCheckpoint | None:
    """Load the checkpoint that the main process has `loaded` in every process; None where there it is None.

    Raises ConfigError in all of them where one finds another checkpoint at that place, or none.
    """
    step, name = devices.from_main((loaded.step, str(loaded.path)) if loaded is not None else (0, ""))
    if not name:
        return None
    try:
        # Read once more by each process: the tensors would be far more to send than to read.
        loaded = loaded or checkpoints.load(CheckpointFolder(step, Path(name)))
        # By the digest over all of its files: a machine may have an older copy of the same step.
        found = loaded.manifest["manifest_sha256"]
    except LlmtuneError as error:
        found = in_one_line(error)
    devices.check_alike({printable(name): found}, fix=SHARE_FOLDER)
    return loaded


def restore_weights(setup: TrainingSetup, loaded: LoadedCheckpoint) -> None:
    """Put the trained weights of a verified checkpoint into the model, bit for bit.

    Raises CheckpointError when they were changed since the checkpoint was verified.
    """
    tensors = checkpoints.read_weights(loaded, ADAPTER_FILE if setup.is_adapted else WEIGHTS_FILE)
    tensors = setup.taken.trained(tensors) if setup.taken is not None else tensors
    held = _trained_weights(setup)
    tensors = {name: shard_like(full, held[name]) if name in held else full for name, full in tensors.items()}
    if setup.is_adapted:
        with setup.strategy.opened(setup.parameters.values(), write=True):
            load_adapter_weights(setup.peft_model, loaded.path, tensors)
        return
    strategy = setup.strategy
    save.restore_weights(
        setup.parameters,
        tensors,
        shape=strategy.shape,
        # One at a time: no process may have to hold all weights of a model that was divided because of its size.
        opened=lambda parameter: strategy.opened([parameter], write=True),
    )
    if isinstance(setup.optimizer, MasterOptimizer):
        setup.optimizer.round_masters()


def _trained_weights(setup: TrainingSetup) -> Mapping[str, torch.Tensor]:
    """The trained weights as a checkpoint names them: by peft's names for an adapter, else by parameter name."""
    if not setup.is_adapted:
        return setup.parameters
    with setup.strategy.opened(setup.parameters.values()):
        return adapter_state_and_config(setup.peft_model)[0]


class Checkpointer:
    """Writes the run's checkpoints, its best and its final model, and deletes checkpoints that are no longer wanted.

    Every process of a run has one and calls it at the same step boundaries: weights that are sharded are gathered from
    all. Only the main process writes (`run` is None in the others), and a disk that refuses there is an answer or an
    error in all of them.
    """

    def __init__(self, run: RunFolder | None, setup: TrainingSetup, print_line: PrintLine) -> None:
        self._run, self._setup, self._print_line = run, setup, print_line
        self._attempts = SaveAttempts(lambda: durable.remove_leftovers(self._folder.checkpoints))
        self._manifest = {"threads": torch.get_num_threads(), "world_size": setup.devices.world_size}
        self._resumed_from: int | None = None
        self.newest: Path | None = None
        """The newest checkpoint, known in every process; None before the first."""
        self.on_save: Callable[[int, Path], None] | None = None
        """Called with step and folder after each save, in the process that writes; must never raise."""

    @property
    def _folder(self) -> RunFolder:
        assert self._run is not None, "only the main process writes"
        return self._run

    def go_on_from(self, loaded: LoadedCheckpoint) -> None:
        """Keep the checkpoint from which this process has resumed; it is the newest until the next save."""
        self._resumed_from, self.newest = loaded.step, loaded.path

    def leave_later(self, step: int) -> None:
        """Set aside what a training left behind from which the run goes back to `step`."""

        def set_aside() -> None:
            names = checkpoints.set_aside_later(self._folder, step, best=self._folder.checkpoints / BEST)
            if names:
                self._print_line(f"set aside until their steps come again: {', '.join(names)}")

        self._setup.devices.on_main(set_aside)

    def save(self, step: int, snapshot: Snapshot, record: RunRecord | None) -> bool:
        """Commit the checkpoint of `step`, then delete older ones; returns whether it was saved.

        A disk that refuses is a warning. The lines of `record` that the checkpoint counts are on the disk before it.
        """
        devices, optimizer = self._setup.devices, snapshot.tensors[OPTIMIZER]
        is_divided = not self._setup.is_adapted and any(map(is_in_parts, self._setup.parameters.values()))
        weights = self._setup.parameters if is_divided else self._gather_weights()
        in_turn = GatheredInTurn(
            {WEIGHTS_FILE: weights, OPTIMIZER: optimizer}, durable.tensor_order, keep=devices.is_main
        )

        def commit(ask: Callable[[int], None]) -> Path:
            # First the lines, then the checkpoint that counts them: a crash in between leaves lines to cut, never a
            # gap.
            if record is not None:
                record.sync()
            read_weight, read = (partial(in_turn.read, file, ask=ask) for file in (WEIGHTS_FILE, OPTIMIZER))
            write_weights = partial(self._write_weights, weights, read_weight)
            return checkpoints.save_checkpoint(
                self._folder, step, write_weights, snapshot, self._manifest, read={OPTIMIZER: read}
            )

        def save_and_delete(ask: Callable[[int], None]) -> str | None:
            saved = self._attempts.save(partial(commit, ask))
            if saved is None:
                self._print_line(
                    f"warning: the save after step {step} failed, the one before it stands: {self._attempts.failure}"
                )
                return None
            self._announce(step, saved)
            protected = {self._resumed_from} if self._resumed_from is not None else set()
            keep_last = self._setup.config.checkpoint.keep_last
            warnings = checkpoints.delete_old_checkpoints(self._folder, keep_last, protected_steps=protected)
            for warning in (*warnings, *checkpoints.delete_replaced(self._folder, step)):
                self._print_line(f"warning: {warning}")
            return str(saved)

        # All processes must agree whether it was saved: they decide by it what to do at the next boundary. And where:
        # the one that fails later says what to go on from.
        saved = devices.from_main(devices.on_main_with_others(save_and_delete, in_turn.gather))
        self.newest = self.newest if saved is None else Path(saved)
        return saved is not None

    def save_best(self, metrics: Mapping[str, Any], step: int) -> None:
        """Replace `best/` by the model as it is now."""
        write = self._model_writer(metrics, step)

        def save() -> None:
            best = self._folder.checkpoints / BEST
            commit = lambda: checkpoints.save_folder(best, write, {"step": step})  # noqa: E731 - tried again by `save`
            self._announce(step, self._attempts.save(commit, subject="best model"))

        self._setup.devices.on_main(save)

    def has_best(self, step: int) -> bool:
        """Whether `best/` is whole and holds the model after `step` updates; the same answer in every process."""

        def is_whole() -> bool:
            best = self._folder.checkpoints / BEST
            return not durable.verify_manifest(best) and durable.read_manifest(best).get("step") == step

        return self._setup.devices.from_main(bool(self._setup.devices.on_main(is_whole)))

    def save_final(self, metrics: Mapping[str, Any], step: int, *, from_best: bool = False) -> None:
        """Write the adapter or model, tokenizer, chat template, generation config and model card to `final/`.

        It lies in `checkpoints/`, and a link in the run folder leads there where the file system has links. `from_best`
        gives it the content of `best/`.
        """
        write = self._copy_best if from_best else self._model_writer(metrics, step)

        def save_and_link() -> None:
            saved = self._attempts.save(
                lambda: checkpoints.save_folder(self._folder.checkpoints / FINAL, write), subject="final model"
            )
            if saved is not None:
                # The link is a convenience; the model is complete without it.
                with contextlib.suppress(MachineError):
                    durable.replace_symlink(self._folder.path / FINAL, f"{self._folder.checkpoints.name}/{FINAL}")
            self._announce(step, saved)

        self._setup.devices.on_main(save_and_link)

    def _announce(self, step: int, folder: Path | None) -> None:
        if self.on_save is not None and folder is not None:
            self.on_save(step, folder)

    def _copy_best(self, folder: Path) -> None:
        for path in sorted((self._folder.checkpoints / BEST).iterdir()):
            if path.name != durable.MANIFEST:  # `final/` gets its own
                durable.link_or_copy(path, folder / path.name)

    def raise_if_unsaved(self) -> None:
        """Raise MachineError (exit 6) when the last save never worked."""
        self._setup.devices.on_main(self._attempts.raise_if_failed)

    def _gather_weights(self) -> dict[str, torch.Tensor]:
        """The trained weights as a checkpoint holds them."""
        return self._setup.strategy.gather(_trained_weights(self._setup), keep=self._setup.devices.is_main)

    def _write_weights(
        self, weights: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor], folder: Path
    ) -> None:
        if self._setup.is_adapted:
            write_adapter(self._setup.peft_model, folder, tensors=weights, **self._base())
        else:
            durable.write_tensors(folder / WEIGHTS_FILE, weights, {"format": "pt"}, read=read)
            durable.write_json(folder / "config.json", self._setup.model.config.to_dict())

    def _base(self) -> dict[str, Any]:
        source = self._setup.prepared.source
        name = self._setup.config.model.name if source.kind in ("hub", "gguf") else source.location
        base = {"base_digest": self._setup.base_digest, "base_name": name, "base_revision": source.revision}
        return {**base, "taken": self._setup.taken}

    def _model_writer(self, metrics: Mapping[str, Any], step: int) -> Callable[[Path], None]:
        """Gather the weights, and return the function that writes the model as users load it into a folder."""
        setup, prepared = self._setup, self._setup.prepared
        tokenizer, stops = prepared.tokenizer.tokenizer, prepared.renderer.stop_token_ids
        tensors = self._gather_weights() if setup.is_adapted else self._gather_state()

        def write(folder: Path) -> None:
            if setup.is_adapted:
                write_adapter(
                    setup.peft_model, folder, tensors=tensors, tokenizer=tokenizer, stop_token_ids=stops, **self._base()
                )
            else:
                with self._masters_in_model():
                    save.write_model(setup.model, tokenizer, folder, state=tensors, stop_token_ids=stops)
            write_prompt_defaults(folder, self._prompt_defaults())
            durable.write_text(folder / "README.md", self._card(metrics, step))

        return write

    def _gather_state(self) -> dict[str, torch.Tensor]:
        # The parameters themselves, because only they show which names are one tied weight.
        with self._masters_in_model():
            state = self._setup.model.state_dict(keep_vars=True)
            return self._setup.strategy.gather(state, keep=self._setup.devices.is_main)

    def _masters_in_model(self) -> AbstractContextManager[object]:
        optimizer = self._setup.optimizer
        return optimizer.in_model() if isinstance(optimizer, MasterOptimizer) else contextlib.nullcontext()

    def _prompt_defaults(self) -> PromptDefaults:
        prepared = self._setup.prepared
        formats = [str(decision.value) for decision in prepared.decisions if decision.key == "data.format"]
        return prompt_defaults_of(self._setup.config.data, formats)

    def _served(self, base_path: str | None, *, adds_rows: bool) -> list[str]:
        """Return the command lines that serve what is written."""
        setup = self._setup
        if setup.is_adapted:
            held = setup.peft_model.peft_config["default"].to_dict()
            options = cast("LoraOptions", setup.taken.config_as_lora(held) if setup.taken is not None else held)
            return usage(adapter_result(THIS_FOLDER, options, base_path, adds_rows=adds_rows))
        return usage(Result("folder", THIS_FOLDER, self._prompt_defaults(), setup.model.config.model_type))

    def _card(self, metrics: Mapping[str, Any], step: int) -> str:
        setup, source = self._setup, self._setup.prepared.source
        base = Path(setup.model.config._name_or_path)
        num_rows = next((decision.value for decision in setup.decisions if decision.key == ADDED_ROWS), None)
        # A folder is written in full: the code in the card is run elsewhere.
        base_path = None if source.kind == "scratch" else str(base.absolute() if base.is_dir() else base)
        return trained_model_card(
            run=self._folder.name,
            base=source.name,
            base_path=base_path,
            num_rows=cast("int | None", num_rows),
            is_adapter=setup.is_adapted,
            step=step,
            total_steps=setup.batches.total_steps,
            metrics=metrics,
            data=setup.prepared.data.ledger.summary(),
            config=redacted(config_to_yaml(setup.config)),
            prompts=self._prompt_defaults().described(),
            usage=self._served(base_path, adds_rows=num_rows is not None),
            labels=setup.prepared.labels,
        )
