"""Everything a training needs that holds weights: model, adapter, engine, optimizer, put together from a prepared run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llmtune.adapters import attach
from llmtune.common.bytes import readable_bytes
from llmtune.common.decisions import Decision
from llmtune.common.threads import spinning_in_force
from llmtune.config.process_options import Options
from llmtune.config.schema import Config, TrainingConfig
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.allocator import LEAN_LARGEST_BLOCK, allocator_in_force, bound_kernel_caches, tune_allocator
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine, build_engine
from llmtune.engine.neftune import Neftune
from llmtune.engine.optim import Optimizer, build_optimizer, choose_rates, matrices_of_blocks
from llmtune.engine.precision import Precision, choose_precision
from llmtune.engine.schedule import learning_rate_at, warmup_length
from llmtune.engine.step_in_backward import StepInBackward, choose_windows
from llmtune.engine.update import AfterBackward, Update
from llmtune.engine.utilization import utilization
from llmtune.models.load import load_model
from llmtune.models.parameters import count_parameters, trained_parameters
from llmtune.prepare import Prepared

__all__ = ["Counts", "TrainingSetup", "build_setup"]


@dataclass(frozen=True)
class Counts:
    """Parameters, tied ones counted once."""

    total: int
    trained: int


@dataclass(frozen=True)
class TrainingSetup:
    """A model that is ready to be trained."""

    model: Any
    """The transformers causal LM, inside peft's wrapper when an adapter is trained."""
    engine: Engine
    nll_sum: Callable[[MicroBatch], torch.Tensor]
    """The engine's loss, with the noise that training asks for; evaluation uses the engine's own."""
    parameters: dict[str, torch.nn.Parameter]
    """The trained ones, by name."""
    optimizer: Optimizer
    update: Update
    """How the gradients of a window become one step of the optimizer."""
    precision: Precision
    learning_rate: Callable[[int], float]
    mfu: Callable[[float], float] | None
    """From tokens per second to the part of the device's peak rate in use; None where the peak is not known."""
    devices: Devices
    batches: BatchPlan
    base_digest: str
    is_adapted: bool
    """Only an adapter is trained; `model` is peft's wrapper."""
    counts: Counts
    config: Config
    """The config with every rate that was chosen filled in."""
    decisions: tuple[Decision, ...]


def build_setup(prepared: Prepared, options: Options, devices: Devices) -> TrainingSetup:
    """Load the model, attach what is trained, choose engine and precision, build the optimizer.

    Weights are those before step 1.

    The random generators are seeded here, once, from `run.seed`; the kernels that torch keeps are bounded. Raises
    ModelError, AdapterError, ConfigError or MachineError.
    """
    config = prepared.config
    decisions = _set_up_process(config, devices)
    precision, more = _open_precision(config.training, devices)
    decisions += more
    adapter = config.adapter.method != "none"
    loaded = load_model(
        prepared.source,
        config.model,
        tokenizer=prepared.tokenizer.tokenizer,
        device=devices.device,
        trained="adapter" if adapter else "full",
        precision=precision.name,
        seed=config.run.seed,
        trust_remote_code=options.trust_remote_code,
    )
    model: Any = loaded.model
    decisions += loaded.decisions
    if adapter:
        model, more = attach.attach_adapter(
            model, config.adapter, seed=config.run.seed, tokenizer=prepared.tokenizer.tokenizer
        )
        decisions += more
    parameters = trained_parameters(model)
    devices.broadcast(parameters.values())
    counts = Counts(total=count_parameters(model), trained=sum(one.numel() for one in parameters.values()))

    training, more = choose_rates(
        config.training, scratch=prepared.source.kind == "scratch", adapter=adapter, parameters=counts.total
    )
    decisions += more
    config = replace(config, training=training)
    engine = build_engine(model, config=config, device=devices.device, precision=precision)
    decisions += engine.decisions
    model.train()  # dropout and noise are on from here; evaluation switches them off for itself
    optimizer, more = _make_optimizer(model, parameters, training, devices)
    decisions += more
    update, more = _make_update(list(parameters.values()), optimizer, training, precision, devices)
    decisions += more
    batches, more = _make_windows(prepared, engine, model, parameters, devices)
    decisions += more
    return TrainingSetup(
        model=model,
        engine=engine,
        nll_sum=_with_noise(engine.nll_sum, model, training),
        parameters=parameters,
        optimizer=optimizer,
        update=update,
        precision=precision,
        learning_rate=_make_schedule(training, batches.total_steps),
        mfu=utilization(devices, precision.name, total=counts.total, trained=counts.trained),
        devices=devices,
        batches=batches,
        base_digest=loaded.base_digest,
        is_adapted=adapter,
        counts=counts,
        config=config,
        decisions=tuple(decisions),
    )


def _set_up_process(config: Config, devices: Devices) -> list[Decision]:
    """Seed it, and bound the memory it collects.

    Here, because a program that came by the Python API passes nowhere else.
    """
    bound_kernel_caches()
    _seed_everything(config.run.seed + devices.rank)
    if config.model.recomputes and devices.device.type == "cpu":
        return [*spinning_in_force(), tune_allocator(largest_block=LEAN_LARGEST_BLOCK)]
    return [*spinning_in_force(), *allocator_in_force()]


def _open_precision(training: TrainingConfig, devices: Devices) -> tuple[Precision, list[Decision]]:
    if training.precision != "auto":
        return Precision(training.precision, devices.device), []
    choice = choose_precision(devices.device)
    return Precision(choice.value, devices.device), [choice]  # type: ignore[arg-type]


def _with_noise(
    nll_sum: Callable[[MicroBatch], torch.Tensor], model: Any, training: TrainingConfig
) -> Callable[[MicroBatch], torch.Tensor]:
    if training.neftune_alpha is None:
        return nll_sum
    return Neftune(nll_sum, model.get_input_embeddings(), training.neftune_alpha)


def _make_optimizer(
    model: Any, parameters: dict[str, torch.nn.Parameter], training: TrainingConfig, devices: Devices
) -> tuple[Optimizer, list[Decision]]:
    assert training.learning_rate is not None
    assert training.weight_decay is not None
    return build_optimizer(
        training.optimizer,
        parameters,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=training.betas,
        eps=training.eps,
        device=devices.device,
        orthogonal=matrices_of_blocks(model, parameters),
    )


def _make_update(
    parameters: list[torch.nn.Parameter],
    optimizer: Optimizer,
    training: TrainingConfig,
    precision: Precision,
    devices: Devices,
) -> tuple[Update, list[Decision]]:
    if not training.step_in_backward:
        return AfterBackward(parameters, optimizer, precision, devices, max_grad_norm=training.max_grad_norm), []
    sizes = [one.nbytes for one in parameters]
    reason = f"asked for: a gradient goes once it is complete; all are {readable_bytes(sum(sizes))}, the largest {readable_bytes(max(sizes))}"
    return StepInBackward(parameters, optimizer), [Decision("training.step_in_backward", True, reason)]


def _make_windows(
    prepared: Prepared, engine: Engine, model: Any, parameters: dict[str, torch.nn.Parameter], devices: Devices
) -> tuple[BatchPlan, list[Decision]]:
    def windows(limit: int | None) -> BatchPlan:
        return prepared.batch_plan(
            layout=engine.layout, max_group_tokens=limit, rank=devices.rank, world_size=devices.world_size
        )

    return choose_windows(
        windows,
        engine.max_group_tokens,
        prepared.config,
        shape=model.config,
        gradient_bytes=lambda: sum(one.nbytes for one in parameters.values()),
    )


def _make_schedule(training: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    assert training.learning_rate is not None
    return learning_rate_at(
        training.lr_schedule,
        peak=training.learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_length(total_steps, training.warmup_steps, training.warmup_ratio),
        min_lr_ratio=training.min_lr_ratio,
    )


def _seed_everything(seed: int) -> None:
    """Seed the generators that training draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
