"""Build everything of a training that holds weights: model, adapter, engine, optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from llmtune.adapters import attach
from llmtune.adapters.config_file import WEIGHTS_FILE
from llmtune.adapters.residual_base import TakenPart, take_part
from llmtune.adapters.start import load_start, start_options
from llmtune.common.decisions import Decision
from llmtune.common.environment import spinning_in_force
from llmtune.common.text import readable_bytes
from llmtune.config.process_options import Options
from llmtune.config.schema import Config, TrainingConfig
from llmtune.data.dataset.batches import BatchPlan, Window
from llmtune.engine.allocator import (
    LEAN_LARGEST_BLOCK,
    SHARDED_LARGEST_BLOCK,
    allocator_in_force,
    bound_kernel_caches,
    tune_allocator,
)
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine, build_engine
from llmtune.engine.masters import MasterOptimizer, make_masters
from llmtune.engine.objective import Objective, next_token_objective
from llmtune.engine.optim import AnyOptimizer, Optimizer, build_optimizer, learning_rate_scales, matrices_of_blocks
from llmtune.engine.precision import Precision, PrecisionName, fixed_order_of_sums, without_tf32
from llmtune.engine.schedule import schedule_of
from llmtune.engine.sequence_parallel import SharedRows
from llmtune.engine.sharding import Strategy, Whole
from llmtune.engine.strategies import make_strategy
from llmtune.engine.update import StepInBackward, Update, choose_windows
from llmtune.evaluation.rewards import Reward
from llmtune.kernels.weight_offload import offload_weights
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.parameters import count_parameters, freeze_all_but, trained_parameters
from llmtune.plan.hardware import utilization
from llmtune.prepare import Prepared
from llmtune.runs.checkpoint import LoadedCheckpoint, read_weights
from llmtune.training.objectives import Objectives, make_objectives
from llmtune.training.quantization_error import begin_with_quantization_error
from llmtune.training.rollouts import Rollouts

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Counts", "TrainingSetup", "build_setup"]


_ROWS_LOOKED_AT = 100
"""Training rows in which control tokens are looked for."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, tied ones counted once; taken before processes divide the weights among them."""

    total: int
    trained: int


@dataclass(frozen=True)
class TrainingSetup:
    """A model that is ready to be trained, with everything it was built from."""

    prepared: Prepared
    model: PreTrainedModel
    """The transformers causal LM, inside peft's wrapper when an adapter is trained."""
    engine: Engine
    objective: Objective
    """The loss that training minimizes: the engine's, with noise on the embeddings where the config sets it, or a loss
    that compares answers.
    """
    parameters: dict[str, torch.nn.Parameter]
    """The trained ones, by name; masters, where the model holds them rounded."""
    optimizer: AnyOptimizer
    update: Update
    """Turns the gradients of a window into one step of the optimizer."""
    precision: Precision
    learning_rate: Callable[[int], float]
    """Rate of the next update as a function of the updates made."""
    mfu: Callable[[float], float] | None
    """From tokens per second to the part of the device's peak rate in use; None where the peak is not known."""
    devices: Devices
    strategy: Strategy
    """How the processes hold the weights."""
    batches: BatchPlan
    base_digest: str
    start_digest: str | None
    """sha256 over the adapter that training started from, where it started from one."""
    taken: TakenPart | None
    """What the adapter's first values took out of the base."""
    reference_digest: str | None
    """The same over a second model that answers are compared with."""
    is_adapted: bool
    """Only an adapter is trained; `model` is peft's wrapper."""
    counts: Counts
    heldout_objective: Objective | None
    """The same over the held-out rows, where answers are compared; else their loss is the engine's."""
    rollouts: Rollouts | None
    """The answers that are drawn to prompts, where training learns from their rewards."""
    decisions: tuple[Decision, ...]
    """The choices made while it was built."""

    def windows(self, start_step: int) -> Iterator[Window]:
        """The windows of the training after the first `start_step`."""
        if self.rollouts is None:
            return self.batches.windows(start_step)
        return self.rollouts.windows(self.batches, start_step)

    def held_parts(self) -> dict[str, torch.Tensor]:
        """The part of each trained parameter held by this process: all, or of [n, ...] about [n / processes, ...]."""
        return {name: self.strategy.part(parameter) for name, parameter in self.parameters.items()}

    @property
    def config(self) -> Config:
        """The config of the run, with everything that was left open resolved."""
        return self.prepared.config

    @property
    def peft_model(self) -> PeftModel:
        """The model as peft's wrapper, where an adapter is trained."""
        assert self.is_adapted
        return cast("PeftModel", self.model)


def build_setup(
    prepared: Prepared,
    options: Options,
    devices: Devices,
    rewards: Sequence[Reward] = (),
    saved: LoadedCheckpoint | None = None,
) -> TrainingSetup:
    """Load the model, attach the adapter, choose the engine, build the optimizer: all as before step 1.

    `prepared.config` must be resolved (see `plan.resolve_auto`). rewards: those of a run that draws answers. saved: the
    checkpoint to restore. Seeds the generators from `run.seed`. Raises ModelError, ConfigError, MachineError or others.
    """
    config = prepared.config
    strategy = Whole(devices) if devices.world_size == 1 else make_strategy(config, devices)
    decisions = _set_up_process(config, devices, is_sharded=strategy.is_sharded)
    assert config.training.precision != "auto", "a config is resolved before a model is built"
    precision = Precision(config.training.precision, devices.device)
    is_adapted = config.adapter.method != "none"
    loaded = _load(prepared, options, devices, precision, strategy)
    model, start_digest, taken, choices = _choose_trained(prepared, loaded, devices, saved)
    decisions += [*loaded.decisions, *choices]
    counts = Counts(count_parameters(model), sum(weight.numel() for weight in trained_parameters(model).values()))
    make_optimizer = partial(_make_optimizer, model, config.training)
    optimizer, shares, own = strategy.shard(model, make_optimizer, convert_block=loaded.convert_block)
    parameters = optimizer.masters if isinstance(optimizer, MasterOptimizer) else trained_parameters(model)
    engine = _make_engine(model, config, devices, precision, strategy)
    model.train()  # dropout and noise are on from here; evaluation switches them off for itself
    if options.loss is None and (config.objective.method, config.training.neftune_alpha) == ("sft", None):  # most runs
        objectives = Objectives(next_token_objective(engine.nll_sum), None, [])
    else:
        objectives = make_objectives(
            prepared, options, model, engine, parameters, precision, devices, rewards, base_digest=loaded.base_digest
        )
    update, update_decisions = _make_update(list(parameters.values()), optimizer, config.training, precision, strategy)
    batches, window_decisions = _make_windows(prepared, engine, model, parameters, devices)
    decisions += [*shares, *objectives.decisions, *engine.decisions, *own, *update_decisions, *window_decisions]
    return TrainingSetup(
        prepared=prepared,
        model=model,
        engine=engine,
        objective=objectives.training,
        heldout_objective=objectives.heldout,
        rollouts=objectives.rollouts,
        parameters=parameters,
        optimizer=optimizer,
        update=update,
        precision=precision,
        learning_rate=schedule_of(config.training, batches.total_steps),
        mfu=utilization(devices, precision.name, total=counts.total, trained=counts.trained),
        devices=devices,
        strategy=strategy,
        batches=batches,
        base_digest=loaded.base_digest,
        start_digest=start_digest,
        taken=taken,
        reference_digest=objectives.reference_digest,
        is_adapted=is_adapted,
        counts=counts,
        decisions=tuple(decisions),
    )


def _make_engine(
    model: PreTrainedModel, config: Config, devices: Devices, precision: Precision, strategy: Strategy
) -> Engine:
    rows = SharedRows(devices) if devices.row_size > 1 else None
    return build_engine(model, config=config, device=devices.device, precision=precision, strategy=strategy, rows=rows)


class _Trained(NamedTuple):
    """The model with its adapter, if it has one, where the adapter's values come from, and the choices made."""

    model: PreTrainedModel
    start_digest: str | None
    """Of the adapter it starts from; None for a new one."""
    taken: TakenPart | None
    decisions: list[Decision]


def _choose_trained(
    prepared: Prepared, loaded: LoadedModel, devices: Devices, saved: LoadedCheckpoint | None
) -> _Trained:
    """Attach the adapter, or freeze what full tuning leaves out."""
    config, start_digest, taken = prepared.config, None, None
    if config.adapter.method == "none":
        patterns = config.model.train_only
        return _Trained(loaded.model, None, None, [freeze_all_but(loaded.model, patterns)] if patterns else [])
    adapted, decisions = attach.attach_adapter(
        loaded.model,
        config.adapter,
        seed=config.run.seed,
        tokenizer=prepared.tokenizer.tokenizer,
        used_ids=_control_tokens(prepared),
        start=start_options(config) if config.adapter.start_from is not None else None,
    )
    if config.adapter.start_from is not None:
        start_digest = load_start(adapted, config, base_digest=loaded.base_digest)
        devices.check_alike({"adapter that training starts from": start_digest})
    elif config.adapter.takes_from_base:
        taken, decision = _take_part(adapted, config, devices, saved)
        decisions.append(decision)
    elif config.adapter.init == "loftq" and saved is None:  # a saved adapter has what it learned since
        decisions.append(begin_with_quantization_error(adapted, prepared.source))
    if config.model.offload_weights:
        decisions.append(offload_weights(adapted, devices.device))
    # peft's wrapper passes on what it does not know.
    return _Trained(cast("PreTrainedModel", adapted), start_digest, taken, decisions)


def _take_part(
    adapted: PeftModel, config: Config, devices: Devices, saved: LoadedCheckpoint | None
) -> tuple[TakenPart, Decision]:
    """Take the adapter's first values out of the base. Raises ConfigError where other processes took others."""
    tensors = read_weights(saved, WEIGHTS_FILE) if saved is not None else None
    taken, decision = take_part(adapted, config.adapter.init, seed=config.run.seed, saved=tensors)
    devices.check_alike({"adapter's first values": taken.digest()})
    return taken, decision


def _set_up_process(config: Config, devices: Devices, *, is_sharded: bool) -> list[Decision]:
    """Seed the random generators and bound the memory that torch and the C library keep for later."""
    # Here and not only in the commands, because a program that uses the Python API passes nowhere else.
    bound_kernel_caches()
    # Each process draws other dropout masks: with the same ones, two would be one.
    seed = config.run.seed + devices.rank
    random.seed(seed)
    # NumPy takes 32 bits only.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    decisions = [fixed_order_of_sums(devices.device)] if config.training.deterministic else []
    decisions += without_tf32(devices.device, cast("PrecisionName", config.training.precision))
    if devices.device.type == "cpu" and is_sharded:
        return [*decisions, *spinning_in_force(), tune_allocator(largest_block=SHARDED_LARGEST_BLOCK)]
    # Whoever recomputes blocks is short of memory; see LEAN_LARGEST_BLOCK for what it costs others.
    if config.model.recomputes and devices.device.type == "cpu":
        return [*decisions, *spinning_in_force(), tune_allocator(largest_block=LEAN_LARGEST_BLOCK)]
    return [*decisions, *spinning_in_force(), *allocator_in_force()]


def _control_tokens(prepared: Prepared) -> list[int]:
    """Return the ids of the control tokens in the first training rows: a template writes the same ones in all."""
    control = [index for index, token in prepared.tokenizer.tokenizer.added_tokens_decoder.items() if token.special]
    rows = range(min(len(prepared.data.train), _ROWS_LOOKED_AT))
    used = {int(index) for row in rows for index in np.unique(prepared.data.train[row].input_ids)}
    return sorted(used.intersection(control))


def _make_optimizer(
    model: PreTrainedModel, training: TrainingConfig, device: torch.device
) -> tuple[Optimizer, list[Decision]]:
    """Build the optimizer of the trained weights as they are now, on that device."""
    parameters = trained_parameters(model)
    assert training.learning_rate is not None
    assert training.weight_decay is not None
    scales, decisions = learning_rate_scales(
        model,
        parameters,
        learning_rate=training.learning_rate,
        embedding_learning_rate=training.embedding_learning_rate,
        loraplus_lr_ratio=training.loraplus_lr_ratio,
    )
    orthogonal = matrices_of_blocks(model, parameters)  # asked before masters stand for the model's own
    if training.master_weights is True:
        parameters = make_masters(model)
    optimizer, optimizer_decisions = build_optimizer(
        training.optimizer,
        parameters,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=training.betas,
        eps=training.eps,
        device=device,
        orthogonal=orthogonal,
        lr_scales=scales,
    )
    if training.master_weights is True:
        optimizer = MasterOptimizer(optimizer, model, parameters)
    return optimizer, [*optimizer_decisions, *decisions]


def _make_update(
    parameters: list[torch.nn.Parameter],
    optimizer: AnyOptimizer,
    training: TrainingConfig,
    precision: Precision,
    strategy: Strategy,
) -> tuple[Update, list[Decision]]:
    if not training.step_in_backward:
        return strategy.make_update(parameters, optimizer, precision, max_grad_norm=training.max_grad_norm), []
    assert isinstance(optimizer, Optimizer), "one process moves its weights itself"
    sizes = [parameter.nbytes for parameter in parameters]
    total, largest = readable_bytes(sum(sizes)), readable_bytes(max(sizes))
    reason = f"asked for: a gradient goes once it is complete; all are {total}, the largest {largest}"
    return StepInBackward(parameters, optimizer), [Decision("training.step_in_backward", True, reason)]


def _load(
    prepared: Prepared, options: Options, devices: Devices, precision: Precision, strategy: Strategy
) -> LoadedModel:
    """Load the base model. Raises ConfigError where other processes have another one."""
    config = prepared.config
    # Weights that will be sharded go to the device part by part, so that it never holds the whole model. Only there are
    # they quantized.
    on_host = (strategy.is_sharded and config.model.quantization == "none") or config.model.offload_weights
    loaded = load_model(
        prepared.source,
        config.model,
        tokenizer=prepared.tokenizer.tokenizer,
        device=torch.device("cpu") if on_host else devices.device,
        trained="full" if config.adapter.method == "none" else "adapter",
        precision=precision.name,
        seed=config.run.seed,
        trust_remote_code=options.trust_remote_code,
        blocks_as_stored=strategy.takes_blocks_as_stored and not attach.reads_base(config.adapter),
        labels=prepared.labels,
    )
    devices.check_alike({"base model": loaded.base_digest})
    return loaded


def _make_windows(
    prepared: Prepared,
    engine: Engine,
    model: PreTrainedModel,
    parameters: dict[str, torch.nn.Parameter],
    devices: Devices,
) -> tuple[BatchPlan, list[Decision]]:
    def windows(max_group_tokens: int | None) -> BatchPlan:
        return prepared.batch_plan(
            layout=engine.layout,
            max_group_tokens=max_group_tokens,
            rank=devices.reader,
            world_size=devices.readers,
            equal_counts=engine.equal_counts,
        )

    return choose_windows(
        windows,
        engine.max_group_tokens,
        prepared.config,
        shape=model.config,
        gradient_bytes=lambda: sum(parameter.nbytes for parameter in parameters.values()),
    )
