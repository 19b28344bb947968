"""From a prepared run to its plan: the largest micro-batch is found exactly, traced once, and added up for a device."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtune.config.process_options import Options
from llmtune.config.schema import Config
from llmtune.data.dataset.batches import BatchPlan, Layout
from llmtune.engine.allocator import FULL_KERNEL_CACHES_BYTES, has_thread_caches
from llmtune.engine.devices import Devices
from llmtune.engine.forward import attention_ways, group_tokens
from llmtune.engine.precision import DTYPES as COMPUTE
from llmtune.engine.step_in_backward import choose_windows
from llmtune.plan.activation_trace import TRACED_BLOCKS, MicroBatchShape, Peaks, extrapolate, trace
from llmtune.plan.hardware import Target, open_target, precision_on, process_bytes
from llmtune.plan.memory import MemoryPlan, add_up
from llmtune.plan.meta_model import Counted, Shape, build, count, open_shape, weight_dtype
from llmtune.plan.plan_cache import read_entry, write_entry
from llmtune.prepare import Prepared
from llmtune.version import __version__

__all__ = ["Forecaster", "Steps", "keep_rate", "kept_rate"]

WINDOWS_LOOKED_AT = 4000
"""Of a longer run, so many windows evenly spread; all are looked at in a shorter one."""


@dataclass(frozen=True)
class Steps:
    """How long a training is, exactly."""

    total_steps: int
    steps_per_epoch: int
    sequences: int
    """Sequences (packs) an epoch."""
    tokens: int
    """Real tokens an epoch."""
    trained_tokens: float
    """Sum of loss weights an epoch."""
    run_tokens: int
    """Real tokens of the whole training."""
    padding_share: float
    """Part of the computed positions that is padding, over the windows looked at; 0 where rows are laid end to end."""


@dataclass
class Forecaster:
    """Plans variants of one prepared run for one device.

    What was traced once is not traced again, not even by the next process.
    """

    prepared: Prepared
    options: Options
    target: Target
    world_size: int = 1
    rank: int = 0
    _peaks: dict[str, Peaks] = field(default_factory=dict)
    _counted: dict[str, Counted] = field(default_factory=dict)

    @classmethod
    def for_this_machine(cls, prepared: Prepared, options: Options, devices: Devices) -> Forecaster:
        """Plans for the device of this process, and for its place among the processes that share the run."""
        target = open_target(None, no_cuda=devices.device.type == "cpu")
        return cls(prepared, options, target, world_size=devices.world_size, rank=devices.rank)

    def with_prepared(self, prepared: Prepared) -> Forecaster:
        """Plans for the same place of a variant of the run; what was traced is shared."""
        return replace(self, prepared=prepared)

    @property
    def config(self) -> Config:
        """The config that is planned."""
        return self.prepared.config

    @cached_property
    def shape(self) -> Shape:
        """The model's shape."""
        return open_shape(self.prepared, self.options)

    @cached_property
    def precision(self) -> str:
        """The arithmetic there: fp32, bf16 or fp16."""
        return precision_on(self.target, self.config.training)

    @cached_property
    def process(self) -> int:
        """Bytes of this process without a model, measured once, and of the kernels that it will collect."""
        if self.target.kind != "cpu":
            return 0
        self._build(
            self.config, blocks=1
        )  # brings in the libraries that loading will, also where every number comes from the cache
        compute = COMPUTE[self.precision]
        return process_bytes(compute) + (FULL_KERNEL_CACHES_BYTES if compute is not None else 0)

    @property
    def layout(self) -> Layout:
        """How the engine lays micro-batches out, as far as that is known before the model is loaded."""
        config = self.config
        plain = config.training.engine == "plain" or config.distributed.strategy in ("fsdp", "deepspeed")
        return "padded" if plain else "flat"

    def batches(self, config: Config) -> BatchPlan:
        """The windows of a variant of the run; its rows are those of the run."""
        prepared = replace(self.prepared, config=config)
        shape = self.shape.config
        is_cut = self.target.kind == "cpu" and self.layout == "flat"

        def windows(limit: int | None) -> BatchPlan:
            return prepared.batch_plan(
                layout=self.layout, max_group_tokens=limit, rank=self.rank, world_size=self.world_size
            )

        return choose_windows(
            windows,
            group_tokens(shape) if is_cut else None,
            config,
            shape=shape,
            gradient_bytes=lambda: self.count(config).gradient_bytes,
        )[0]

    def steps(self) -> Steps:
        """Count steps and tokens."""
        batches, data = self.batches(self.config), self.prepared.data.train
        lengths = np.asarray(data.lengths, dtype=np.int64)
        tokens = int(lengths.sum())
        epochs, rest = divmod(batches.total_steps, batches.steps_per_epoch)
        tail = range(epochs * batches.steps_per_epoch + 1, epochs * batches.steps_per_epoch + rest + 1)
        run_tokens = epochs * tokens + self.world_size * sum(
            int(lengths[group].sum()) for step in tail for group in batches.groups(step)
        )
        real = positions = 0
        for group in _groups(batches):
            real += int(lengths[group].sum())
            positions += (
                int(lengths[group].max()) * len(group) if self.layout == "padded" else int(lengths[group].sum())
            )
        return Steps(
            total_steps=batches.total_steps,
            steps_per_epoch=batches.steps_per_epoch,
            sequences=batches.num_packs,
            tokens=tokens,
            trained_tokens=float(np.asarray(data.loss_weights, dtype=np.float64).sum()),
            run_tokens=run_tokens,
            padding_share=1 - real / positions,
        )

    def largest(self, config: Config) -> tuple[MicroBatchShape, bool]:
        """The micro-batch that takes most positions, and whether any window has more than one.

        A lower `data.max_length` than the run's cuts its rows as `overlong: truncate_right` would.
        """
        data = self.prepared.data.train
        lengths = np.minimum(np.asarray(data.lengths, dtype=np.int64), config.data.max_length)
        weights = np.asarray(data.loss_weights, dtype=np.float64)
        batches = self.batches(config)
        worst, several = None, False
        for step in _steps_looked_at(batches):
            groups = batches.groups(step)
            several |= len(groups) > 1
            for group in groups:
                shape = MicroBatchShape(
                    tuple(int(one) for one in lengths[group]), round(weights[group].sum()), self.layout
                )
                if worst is None or (shape.tokens, shape.trained_tokens) > (worst.tokens, worst.trained_tokens):
                    worst = shape
        assert worst is not None
        return worst, several

    def memory(self, config: Config | None = None) -> MemoryPlan:
        """Memory by part of the run, or of a variant of it."""
        config = config or self.config
        batch, several = self.largest(config)
        dropped = config.training.step_in_backward and not several
        return add_up(
            self.count(config),
            self.peaks(config, batch, gradients_held=several, gradients_dropped=dropped),
            batch,
            kind=self.target.kind,
            optimizer=config.training.optimizer,
            gradients_held=several,
            gradients_dropped=dropped,
            prepacked=config.model.weights_prepack is True,
            thread_caches=has_thread_caches(),
            process=self.process,
            file_bytes=self.shape.file_bytes,
        )

    def count(self, config: Config) -> Counted:
        """Exact sizes of model and adapter."""
        key = json.dumps([asdict(config.adapter), config.model.quantization, config.model.dtype])
        if key not in self._counted:
            kept = self._key("count", config, None)
            entry = read_entry(kept)
            if entry is None:
                counted = count(self._build(config), config)
                write_entry(kept, asdict(counted))
            else:
                counted = Counted(**entry)
            self._counted[key] = counted
        return self._counted[key]

    def peaks(
        self, config: Config, batch: MicroBatchShape, *, gradients_held: bool, gradients_dropped: bool = False
    ) -> Peaks:
        """What a micro-batch of that shape holds beside the weights."""
        key = self._key("peaks", config, [asdict(batch), gradients_held, gradients_dropped])
        if key not in self._peaks:
            entry = read_entry(key)
            peaks = (
                Peaks(**entry) if entry is not None else self._trace(config, batch, gradients_held, gradients_dropped)
            )
            if entry is None:
                write_entry(key, asdict(peaks))
            self._peaks[key] = peaks
        return self._peaks[key]

    def rate_key(self) -> str:
        """Name under which the measured speed of this run's shape is kept."""
        facts = [asdict(self.config.training), torch.get_num_threads(), platform.machine(), platform.node()]
        return self._key("rate", self.config, [*facts, self.prepared.data.train.digest])

    def _trace(self, config: Config, batch: MicroBatchShape, gradients_held: bool, gradients_dropped: bool) -> Peaks:
        """By the first way of attention that is for this model, in the order in which the engine tries them."""
        half = (
            COMPUTE[self.precision] is not None and self.target.has_bf16
        )  # flash attention is not for devices without
        *better, last = attention_ways(config.model.attention, self.target.kind, half=half)
        for way in better:
            with suppress(NotImplementedError):
                return self._trace_way(config, batch, gradients_held, gradients_dropped, way)
        return self._trace_way(config, batch, gradients_held, gradients_dropped, last)

    def _trace_way(
        self, config: Config, batch: MicroBatchShape, gradients_held: bool, gradients_dropped: bool, way: str
    ) -> Peaks:
        def peaks_of(blocks: int) -> Peaks:
            return trace(
                self._build(config, blocks=blocks),
                batch,
                device_type=self.target.kind,
                compute=COMPUTE[self.precision],
                checkpointing=config.model.recomputes and config.model.gradient_checkpointing,
                gradients_held=gradients_held,
                gradients_dropped=gradients_dropped,
                attention=way,
            )

        if self.shape.blocks <= TRACED_BLOCKS + 1:
            return peaks_of(self.shape.blocks)
        return extrapolate(peaks_of(TRACED_BLOCKS), peaks_of(TRACED_BLOCKS + 1), self.shape.blocks)

    def _build(self, config: Config, blocks: int | None = None) -> Any:
        trained = config.adapter.method == "none"
        scratch = self.prepared.source.kind == "scratch"
        dtype = weight_dtype(config.model, trained=trained, precision=self.precision, scratch=scratch)
        return build(self.shape, config, self.prepared.tokenizer.tokenizer, dtype=dtype, blocks=blocks)

    def _key(self, kind: str, config: Config, more: Any) -> str:
        """Digest of everything that decides a number: shape, adapter, arithmetic, engine, code and library versions."""
        model = config.model
        shape = {key: value for key, value in self.shape.config.to_dict().items() if key != "_name_or_path"}
        held = [
            model.dtype,
            model.quantization,
            model.gradient_checkpointing,
            self.prepared.source.kind,
            asdict(config.adapter),
        ]
        there = [self.target.kind, self.target.has_bf16, self.precision, model.attention]
        facts = [kind, shape, held, there, self.prepared.tokenizer.digest, more, __version__, _code_digest()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _steps_looked_at(batches: BatchPlan) -> Iterator[int]:
    stride = -(-batches.total_steps // WINDOWS_LOOKED_AT)
    yield from range(1, batches.total_steps + 1, stride)


def _groups(batches: BatchPlan) -> Iterator[Any]:
    for step in _steps_looked_at(batches):
        yield from batches.groups(step)


@cache
def _code_digest() -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parents[1]
    for folder in ("models", "adapters", "kernels", "engine", "plan"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def keep_rate(forecaster: Forecaster, tokens_per_second: float) -> None:
    """Keep a measured rate for the next plan of this shape on this machine."""
    write_entry(forecaster.rate_key(), {"tokens_per_second": tokens_per_second})


def kept_rate(forecaster: Forecaster) -> float | None:
    """The rate kept for this shape, tokens per second; None when it was never measured here."""
    entry = read_entry(forecaster.rate_key())
    return float(entry["tokens_per_second"]) if entry is not None else None
