"""The log-probabilities of answers by a reference: of a live model, or measured once before step 1 and cached."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llmtune import durable
from llmtune.common.decisions import Decision
from llmtune.common.environment import cache_folder, home_expanded
from llmtune.common.text import readable_bytes
from llmtune.data.dataset.batches import eval_batches
from llmtune.data.dataset.packing import examples_together
from llmtune.data.example import ExampleSet
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine, build_engine
from llmtune.engine.precision import Precision
from llmtune.engine.reference import FrozenCopy, LiveReference, LogProbs, PrecomputedReference, Reference
from llmtune.engine.sharded_tensors import full_tensor
from llmtune.errors import ConfigError, MachineError
from llmtune.models.load import load_model
from llmtune.models.second_model import find_second_model
from llmtune.prepare import Prepared
from llmtune.version import __version__

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["ReferenceLogProbs"]

REFERENCE_BATCH_SIZE = 8
"""Rows of a micro-batch when the reference is measured before training: fixed, so that its values are bit-identical."""


class ReferenceLogProbs:
    """The reference of each set of examples, by the resolved `objective.reference`."""

    def __init__(
        self,
        prepared: Prepared,
        model: PreTrainedModel,
        engine: Engine,
        log_probs_of: Callable[[Engine], LogProbs],
        parameters: Mapping[str, nn.Parameter],
        precision: Precision,
        devices: Devices,
        base_digest: str,
        *,
        offline: bool,
    ) -> None:
        self._prepared, self._engine, self._precision, self._devices = prepared, engine, precision, devices
        self._parameters, self._base_digest = parameters, base_digest
        self._live: LiveReference | None = None
        self.digest: str | None = None
        """sha256 over the weights of a second model."""
        log_probs = log_probs_of(engine)
        kind = prepared.config.objective.reference
        self.decision: Decision
        """What the reference is, and what it costs."""
        if kind == "base":
            peft_model: PeftModel = model  # type: ignore[assignment]
            self._live = LiveReference(log_probs, peft_model.disable_adapter)
            self.decision = Decision("objective.reference", kind, "the model without its adapter: no second model")
        elif kind == "start":
            copy = FrozenCopy(tuple(parameters.values()))
            self._live = LiveReference(log_probs, copy.in_place)
            reason = f"a frozen copy of the trained weights as they are before step 1, {readable_bytes(copy.nbytes)}"
            self.decision = Decision("objective.reference", kind, reason)
        elif kind == "model":
            self._live, self.decision = self._second_model(log_probs_of, offline=offline)
        else:
            reason = "log-probabilities of all answers by the model as it is before step 1; no second model"
            self.decision = Decision("objective.reference", kind, reason)

    def _second_model(
        self, log_probs_of: Callable[[Engine], LogProbs], *, offline: bool
    ) -> tuple[LiveReference, Decision]:
        """Load the model that the config names, frozen and with an engine of its own.

        Raises ModelError or TokenizerError for one that cannot be loaded.
        """
        config, tokenizer = self._prepared.config, self._prepared.tokenizer.tokenizer
        source = find_second_model(config.objective, tokenizer, offline=offline)
        assert source is not None
        # Nothing is recomputed, quantized or compiled in a model that has no gradients.
        own = replace(
            config.model, gradient_checkpointing=False, offload_weights=False, quantization="none", train_only=()
        )
        loaded = load_model(
            source,
            replace(own, name=source.name),
            tokenizer=tokenizer,
            device=self._devices.device,
            trained="adapter",
            precision=self._precision.name,
            seed=config.run.seed,
        )
        self._devices.check_alike({"reference model": loaded.base_digest})
        loaded.model.requires_grad_(requires_grad=False)
        config = replace(config, model=own, training=replace(config.training, compile=False))
        engine = build_engine(loaded.model, config=config, device=self._devices.device, precision=self._precision)
        if engine.layout != self._engine.layout:
            problem = f"the reference model computes {engine.layout} batches, and the trained one {self._engine.layout}"
            raise ConfigError(problem, where="objective.reference_model", fix="set training.engine=plain")
        self.digest = loaded.base_digest
        size = readable_bytes(sum(weight.nbytes for weight in loaded.model.parameters()))
        reason = f"`{source.name}`, frozen, {size}; its tokens have the ids of this run"
        return LiveReference(log_probs_of(engine), nullcontext), Decision("objective.reference", "model", reason)

    def of(self, examples: ExampleSet) -> Reference:
        """The reference for these examples; measured, or read from the cache, where it is precomputed."""
        if self._live is not None:
            return self._live
        folder = self._folder()
        path = None if folder is None else folder / f"{self._key(examples)}.bin"
        values = None if path is None else _read(path, len(examples))
        # The processes share the measuring: where one of them lacks the numbers, all measure.
        (missing,) = self._devices.largest(float(values is None))
        if values is None or missing:
            values = self._measure(examples)
            if path is not None and self._devices.is_main:
                _write(path, values)
        return PrecomputedReference(torch.from_numpy(values), self._devices.device)

    def _folder(self) -> Path | None:
        named = self._prepared.config.data.cache_dir
        folder = home_expanded(named) if named else cache_folder()
        return None if folder is None else folder / "reference"

    def _key(self, examples: ExampleSet) -> str:
        """Digest of everything that decides the numbers: weights, rows (with template and length), arithmetic, code."""
        weights = hashlib.sha256()
        for name, parameter in sorted(self._parameters.items()):
            weights.update(name.encode())
            whole = full_tensor(parameter.detach()).cpu().contiguous()
            weights.update(whole.view(torch.uint8).numpy().tobytes())
        config = self._prepared.config
        facts = [
            self._base_digest,
            weights.hexdigest(),
            examples.digest,
            config.model.quantization,
            [self._precision.name, self._devices.device.type, self._engine.layout, torch.get_num_threads()],
            [__version__, torch.__version__, importlib.metadata.version("transformers")],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]

    def _measure(self, examples: ExampleSet) -> npt.NDArray[np.float32]:
        """Log-probabilities of all examples by the model as it is now, float32 [N]; processes share the work."""
        values = torch.zeros(len(examples), dtype=torch.float64, device=self._devices.device)
        batches = eval_batches(
            examples,
            batch_size=REFERENCE_BATCH_SIZE,
            layout=self._engine.layout,
            pad_id=self._prepared.tokenizer.tokenizer.pad_token_id or 0,
            max_group_tokens=self._engine.max_group_tokens,
            world_size=self._devices.world_size,
            rank=self._devices.rank,
            together=examples_together(examples),
            equal_counts=self._engine.equal_counts,
        )
        with torch.no_grad(), self._precision.autocast():
            for batch in batches:
                assert batch.indices is not None
                log_probs_S = self._engine.log_probs(batch).double()
                # An idle micro-batch has a document that is no example.
                values[torch.from_numpy(batch.indices).to(values.device)] = log_probs_S[: len(batch.indices)]
        measured: npt.NDArray[np.float32] = self._devices.sum_tensor(values).float().cpu().numpy()
        return measured


def _read(path: Path, count: int) -> npt.NDArray[np.float32] | None:
    """The cached numbers, float32 [count]; None where they are missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest or len(data) != 4 * count:
        return None
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def _write(path: Path, values: npt.NDArray[np.float32]) -> None:
    data = values.astype("<f4").tobytes()
    with suppress(MachineError):  # a disk that refuses costs the next run the measuring, and this one nothing
        durable.make_folder(path.parent)
        durable.write_bytes(path, hashlib.sha256(data).digest() + data)
