"""Forecaster: from a prepared run and a device to its exact steps and its memory plan.

Traces, counts and measured rates are cached in the user's cache folder, one small JSON file for each key.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from llmtune import durable
from llmtune.adapters.target_modules import block_of
from llmtune.common.environment import cache_folder
from llmtune.config.process_options import Options
from llmtune.config.schema import AdapterConfig, Config
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.micro_batch import Layout
from llmtune.engine.allocator import FULL_KERNEL_CACHES_BYTES, has_thread_caches
from llmtune.engine.devices import Devices
from llmtune.engine.forward import attention_ways, group_tokens
from llmtune.engine.precision import DTYPES as COMPUTE
from llmtune.engine.update import choose_windows
from llmtune.errors import LlmtuneError
from llmtune.models.load import choose_weight_dtype
from llmtune.plan.activation_trace import TRACED_BLOCKS, Gradients, MicroBatchShape, Peaks, extrapolate, trace
from llmtune.plan.hardware import Target, find_target, precision_on, process_bytes
from llmtune.plan.memory import MemoryPlan, division_of, plan_memory
from llmtune.plan.meta_model import (
    ModelShape,
    ModelSizes,
    adapted_layers_of,
    build_meta_model,
    count_sizes,
    read_shape,
)
from llmtune.plan.reference_memory import reference_bytes
from llmtune.prepare import Prepared
from llmtune.version import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import PreTrainedModel

__all__ = [
    "Forecaster",
    "Steps",
    "cached",
    "read_entry",
    "write_entry",
]

SAMPLED_WINDOWS = 4000
"""Windows of which the padding and the largest micro-batch are found: all of a shorter run, else evenly spread ones."""


@dataclass(frozen=True)
class Steps:
    """The length of a training, exactly."""

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
    """Part of the computed positions that is padding, over the sampled windows; 0 where rows are laid end to end."""


@dataclass(frozen=True)
class Rate:
    """A measured speed of training, as it is cached."""

    tokens_per_second: float


@dataclass
class Forecaster:
    """Plans variants of one prepared run for one device.

    Counts and traces are made once: they are shared by all variants, and by later processes through the plan cache.
    """

    prepared: Prepared
    options: Options
    target: Target
    world_size: int = 1
    rank: int = 0
    _peaks: dict[str, Peaks] = field(default_factory=dict)
    _sizes: dict[str, ModelSizes] = field(default_factory=dict)
    _layers: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def for_this_machine(cls, prepared: Prepared, options: Options, devices: Devices) -> Forecaster:
        """Plans for the device of this process as the main one plans: it has the most rows, and some may have none."""
        # The machine's own free memory, measured here; another device is planned by its published size.
        shared_by = devices.neighbours.machine
        target = find_target(None, no_cuda=devices.device.type == "cpu", shared_by=shared_by)
        return cls(prepared, options, target, world_size=devices.world_size)

    def with_prepared(self, prepared: Prepared) -> Forecaster:
        """Plans for the same device and rank of a variant of the run; counts and traces are shared."""
        return replace(self, prepared=prepared)

    @property
    def config(self) -> Config:
        """The config that is planned."""
        return self.prepared.config

    @cached_property
    def shape(self) -> ModelShape:
        """The model's architecture."""
        return read_shape(self.prepared, self.options)

    @cached_property
    def precision(self) -> str:
        """The arithmetic on the target: fp32, bf16 or fp16."""
        return precision_on(self.target, self.config)

    @cached_property
    def process_bytes(self) -> int:
        """Bytes of this process without a model, and of the kernels that it will collect; 0 for a GPU."""
        if self.target.kind != "cpu":
            return 0
        # Loading imports libraries that the process then holds; a plan from the cache must not be without them.
        config = self.config
        # What names blocks or tokens says nothing of the libraries.
        adapter, model = AdapterConfig(method=config.adapter.method), replace(config.model, train_only=())
        self._build(replace(config, adapter=adapter, model=model), blocks=1)
        compute = COMPUTE[self.precision]
        return process_bytes(compute) + (FULL_KERNEL_CACHES_BYTES if compute is not None else 0)

    @property
    def layout(self) -> Layout:
        """How the engine lays micro-batches out, as far as that is known before the model is loaded."""
        config = self.config
        plain = config.training.engine == "plain"
        return "padded" if plain else "flat"

    def batches(self, config: Config) -> BatchPlan:
        """The windows of a variant of the run; its rows are those of the run."""
        prepared = replace(self.prepared, config=config)
        shape = self.shape.config
        is_cut = self.target.kind == "cpu" and self.layout == "flat"

        # Of devices that share each row, a group takes a share.
        readers = max(1, self.world_size // config.distributed.sequence_parallel)

        def windows(limit: int | None) -> BatchPlan:
            return prepared.batch_plan(layout=self.layout, max_group_tokens=limit, rank=self.rank, world_size=readers)

        return choose_windows(
            windows,
            group_tokens(shape) if is_cut else None,
            config,
            shape=shape,
            gradient_bytes=lambda: self.sizes(config).gradient_bytes,
        )[0]

    def steps(self) -> Steps:
        """Count steps and tokens."""
        batches, data = self.batches(self.config), self.prepared.examples
        lengths = np.asarray(data.lengths, dtype=np.int64)
        tokens, trained_tokens = batches.tokens_of_epoch()
        epochs, rest = divmod(batches.total_steps, batches.steps_per_epoch)
        # Of a part of one, every rank is taken to have as many tokens as this one.
        tail = range(epochs * batches.steps_per_epoch + 1, epochs * batches.steps_per_epoch + rest + 1)
        whole = (
            sum(batches.tokens_of_epoch(epoch)[0] for epoch in range(epochs)) if batches.draws_anew else epochs * tokens
        )
        run_tokens = whole + batches.world_size * sum(
            int(lengths[group].sum()) for step in tail for group in batches.groups(step)
        )
        real = positions = 0
        for step in _sampled_steps(batches):
            for group in batches.groups(step):
                tokens_of_group = int(lengths[group].sum())
                real += tokens_of_group
                positions += int(lengths[group].max()) * len(group) if self.layout == "padded" else tokens_of_group
        return Steps(
            total_steps=batches.total_steps,
            steps_per_epoch=batches.steps_per_epoch,
            sequences=batches.num_packs,
            tokens=tokens,
            trained_tokens=trained_tokens,
            run_tokens=run_tokens,
            padding_share=1 - real / positions,
        )

    def largest_micro_batch(self, config: Config) -> tuple[MicroBatchShape, bool]:
        """The micro-batch that takes most positions, and whether any window has more than one micro-batch.

        A lower `data.max_length` than the run's cuts its rows as `overlong: truncate_right` would.
        """
        data = replace(self.prepared, config=config).examples
        drawn = config.objective.max_new_tokens if config.objective.method == "grpo" else 0
        # A search for what would fit asks for shorter rows too, and must not render them again for it.
        lengths = np.minimum(np.asarray(data.lengths, dtype=np.int64), config.data.max_length + drawn)
        weights = np.asarray(data.loss_weights, dtype=np.float64)
        batches, compares = self.batches(config), config.objective.method != "sft"
        largest, several = None, False
        for step in _sampled_steps(batches):
            groups = batches.groups(step)
            several |= len(groups) > 1
            for group in groups:
                trained = round(weights[group].sum())
                shape = MicroBatchShape(tuple(lengths[group].tolist()), trained, self.layout, compares=compares)
                if largest is None or _size(shape) > _size(largest):
                    largest = shape
        assert largest is not None
        return largest, several

    def memory(self, config: Config | None = None) -> MemoryPlan:
        """Memory by part of the run, or of a variant of it. Raises any of MODEL_ERRORS for a model without a plan."""
        config = config or self.config
        batch, several = self.largest_micro_batch(config)
        gradients: Gradients = "summed" if several else "dropped" if config.training.step_in_backward else "single"
        return plan_memory(
            self.sizes(config),
            self.peaks(config, batch, gradients).of_part(config.distributed.sequence_parallel),
            batch,
            kind=self.target.kind,
            optimizer=config.training.optimizer,
            gradients=gradients,
            thread_caches=has_thread_caches(),
            process_bytes=self.process_bytes,
            file_bytes=self.shape.file_bytes,
            reference_bytes=reference_bytes(self.prepared, config, self.options, self.precision, self.sizes(config))
            if config.objective.method != "sft"
            else 0,
            division=division_of(config, self.world_size),
        )

    def sizes(self, config: Config) -> ModelSizes:
        """Exact sizes of model and adapter."""
        key = self._key("sizes", config)
        if key not in self._sizes:
            self._sizes[key] = cached(ModelSizes, key, lambda: count_sizes(self._build(config), config))
        return self._sizes[key]

    def peaks(self, config: Config, batch: MicroBatchShape, gradients: Gradients) -> Peaks:
        """Bytes of a micro-batch of that shape beside the weights, by phase."""
        key = self._key("peaks", config, config.model.gradient_checkpointing, asdict(batch), gradients)
        if key not in self._peaks:
            self._peaks[key] = cached(Peaks, key, lambda: self._trace(config, batch, gradients))
        return self._peaks[key]

    def store_rate(self, tokens_per_second: float) -> None:
        """Cache a measured rate for the next plan of this shape on this machine."""
        write_entry(self._rate_key(), Rate(tokens_per_second))

    def cached_rate(self) -> float | None:
        """The rate cached for this shape, tokens per second; None when it was never measured on this machine."""
        rate = read_entry(Rate, self._rate_key())
        return rate.tokens_per_second if rate is not None else None

    def _rate_key(self) -> str:
        config, machine = self.config, (torch.get_num_threads(), platform.machine(), platform.node())
        recompute, rows = config.model.gradient_checkpointing, self.prepared.data.train.digest
        return self._key("rate", config, recompute, asdict(config.training), machine, rows)

    def _trace(self, config: Config, batch: MicroBatchShape, gradients: Gradients) -> Peaks:
        """Trace with the first backend of attention that computes this model, in the order the engine tries them."""
        half = COMPUTE[self.precision] is not None and self.target.has_bf16  # flash attention needs such a device
        *preferred, last = attention_ways(config.model.attention, self.target.kind, half=half)
        for backend in preferred:
            with suppress(NotImplementedError):  # a soft cap, for example, which flash attention does not have
                return self._trace_with(config, batch, gradients, backend)
        return self._trace_with(config, batch, gradients, last)

    def _trace_with(self, config: Config, batch: MicroBatchShape, gradients: Gradients, backend: str) -> Peaks:
        layers = self._adapted_layers(config)

        def peaks_of(blocks: int | None) -> Peaks:
            return trace(
                self._build(config, blocks, layers if blocks is not None and layers else None),
                batch,
                device_type=self.target.kind,
                compute=COMPUTE[self.precision],
                checkpointing=config.model.recomputes and config.model.gradient_checkpointing,
                gradients=gradients,
                attention=backend,
                masters=config.training.master_weights is True,
                is_quantized=config.model.quantization != "none",
            )

        # A model of so few blocks is traced as it is, in the same time.
        if self.shape.blocks <= TRACED_BLOCKS + 1:
            return peaks_of(None)
        frozen = self._frozen_blocks(config, layers)
        return extrapolate(peaks_of(TRACED_BLOCKS), peaks_of(TRACED_BLOCKS + 1), self.shape.blocks - frozen)

    def _adapted_layers(self, config: Config) -> list[str]:
        key = self._key("layers", config)
        if key not in self._layers:
            self._layers[key] = adapted_layers_of(self.shape, config, self.prepared.tokenizer.tokenizer)
        return self._layers[key]

    def _frozen_blocks(self, config: Config, layers: Sequence[str]) -> int:
        """Count the first blocks through which no gradient goes: they keep nothing for the backward pass."""
        adapter = config.adapter
        blocks = [block_of(name) for name in layers]
        # In the model's order, what stands before the first block is the embedding.
        reaches_embedding = (
            adapter.train_tokens or adapter.modules_to_save or adapter.start_from or blocks[:1] == [None]
        )
        return 0 if reaches_embedding else min((block[0] for block in blocks if block), default=0)

    def _build(self, config: Config, blocks: int | None = None, layers: Sequence[str] | None = None) -> PreTrainedModel:
        trained = config.adapter.method == "none" or self.prepared.source.kind == "scratch"
        dtype, _ = choose_weight_dtype(config.model.dtype, trained=trained, precision=self.precision)
        tokenizer = self.prepared.tokenizer.tokenizer
        return build_meta_model(self.shape, config, tokenizer, dtype=dtype, blocks=blocks, layers=layers)

    def _key(self, kind: str, config: Config, *details: object) -> str:
        """Digest of everything that decides a number: shape, adapter, arithmetic, engine, code and library versions."""
        model = config.model
        # `_name_or_path` is the folder, which may move without changing the model.
        shape = {key: value for key, value in self.shape.config.to_dict().items() if key != "_name_or_path"}
        weights = [model.dtype, model.quantization, model.train_only, self.prepared.source.kind, asdict(config.adapter)]
        ways = [model.attention, model.offload_weights, config.training.master_weights]
        device = [self.target.kind, self.target.has_bf16, self.precision, *ways]
        facts = [kind, shape, weights, device, self.prepared.tokenizer.digest, details, __version__, _code_digest()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _size(shape: MicroBatchShape) -> tuple[int, int]:
    return shape.tokens, shape.trained_tokens


def _sampled_steps(batches: BatchPlan) -> range:
    return range(1, batches.total_steps + 1, -(-batches.total_steps // SAMPLED_WINDOWS))


@cache
def _code_digest() -> str:
    """Digest of the code that decides a trace, and torch's version: another code may hold other tensors."""
    # Part of every cache key: after a change of a kernel an old trace is wrong.
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parents[1]
    for folder in ("models", "adapters", "kernels", "engine", "plan"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


Entry = TypeVar("Entry", bound="DataclassInstance")


def cached(kind: type[Entry], key: str, compute: Callable[[], Entry]) -> Entry:
    """The entry of that key; where there is none, the one that `compute` returns, which is then written."""
    entry = read_entry(kind, key)
    if entry is None:
        entry = compute()
        write_entry(key, entry)
    return entry


def read_entry(kind: type[Entry], key: str) -> Entry | None:
    """The entry of that key, a dataclass of plain values; None when there is none, or none that can be read."""
    path = _path(key)
    if path is None:
        return None
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # missing, not JSON, or of other fields
        return None


def write_entry(key: str, entry: DataclassInstance) -> None:
    """Write an entry; a cache that cannot be written only costs the next process its time."""
    path = _path(key)
    if path is None:
        return
    try:
        durable.make_folder(path.parent)
        durable.write_json(path, asdict(entry))
    except LlmtuneError:
        return


def _path(key: str) -> Path | None:
    folder = cache_folder()
    return folder / "plan" / f"{key}.json" if folder is not None else None
