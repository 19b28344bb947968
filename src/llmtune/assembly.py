"""Everything a training needs that holds weights: model, adapter, engine, optimizer, put together from a prepared run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llmtune.config.schema import Config, TrainingConfig
from llmtune.data.batches import BatchPlan, MicroBatch
from llmtune.decisions import Decision
from llmtune.errors import ConfigError, Problem
from llmtune.models import adapters
from llmtune.models.load import load_model
from llmtune.preparation import Options, Prepared
from llmtune.training.devices import Devices, choose_device
from llmtune.training.engine import Engine, build_engine
from llmtune.training.memory import LEAN_LARGEST_BLOCK, allocator_in_force, bound_kernel_caches, tune_allocator
from llmtune.training.neftune import Neftune
from llmtune.training.optim import Optimizer, build_optimizer, matrices_of_blocks
from llmtune.training.precision import Precision, choose_precision
from llmtune.training.schedule import learning_rate_at, warmup_length
from llmtune.training.step_in_backward import StepInBackward, choose_windows
from llmtune.training.update import AfterBackward, Update
from llmtune.training.utilization import utilization

__all__ = ["Assembled", "Counts", "assemble", "check_distribution", "choose_rates", "open_devices"]

FULL_LEARNING_RATE = 2e-5
LORA_LEARNING_RATE = 2e-4
SCRATCH_LEARNING_RATES = ((20_000_000, 1e-3), (100_000_000, 6e-4), (300_000_000, 3e-4))
"""(parameters up to, peak rate): smaller models take larger steps; the last rate holds for all larger ones."""


STRATEGIES = ("auto", "ddp")
"""Ways to share a training between processes that exist: one process alone, or the whole model in each and gradients summed."""

WHAT_WORKS = (
    "use `auto` or `ddp` and start with `torchrun --nproc-per-node N -m llmtune train ...`; "
    "a model too large for one device may fit with `adapter.method: lora` and `model.quantization: 4bit`"
)


@dataclass(frozen=True)
class Counts:
    """Parameters, tied ones counted once."""

    total: int
    trained: int


@dataclass(frozen=True)
class Assembled:
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


def check_distribution(config: Config) -> None:
    """Raise ConfigError for a way to share a training that this version does not have."""
    wanted = config.distributed
    problems = []
    if wanted.strategy not in STRATEGIES:
        what = f"strategy `{wanted.strategy}` does not exist in this version: every process holds the whole model"
        problems.append(Problem(what, "distributed.strategy", WHAT_WORKS))
    if wanted.deepspeed_config is not None:
        what = f"nothing in this version reads the DeepSpeed file `{wanted.deepspeed_config}`"
        problems.append(Problem(what, "distributed.deepspeed_config", "remove the key"))
    if problems:
        raise ConfigError.all(problems)


def check_processes(config: Config, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for several processes where weights move before the gradients of all could be summed."""
    count = environ.get("WORLD_SIZE", "1")
    if config.training.step_in_backward and count != "1":
        what = f"{count} processes were started, and weights that move in the backward pass cannot wait for the gradients of all"
        raise ConfigError(what, where="training.step_in_backward", fix="set it to false, or start one process (without `torchrun`)")


def open_devices(config: Config, options: Options) -> tuple[Devices, list[Decision]]:
    """The device(s) of this process: one alone, or its place among the processes that a launcher started.

    Raises ConfigError, before any process is waited for, for a way to share a training that this version does not have.
    """
    check_distribution(config)
    check_processes(config)
    wanted = config.distributed
    devices = Devices.from_environment(no_cuda=options.no_cuda, timeout_s=wanted.timeout_s)
    _, decision = choose_device(no_cuda=options.no_cuda)
    decisions = [decision]
    if wanted.strategy == "ddp" or devices.world_size > 1:
        count = "1 process: no launcher started more" if devices.world_size == 1 else f"{devices.world_size} processes"
        decisions.append(Decision("distributed.strategy", "ddp", f"{count}; each holds the whole model"))
    return devices, decisions


def choose_rates(training: TrainingConfig, *, scratch: bool, adapter: bool, parameters: int) -> tuple[TrainingConfig, list[Decision]]:
    """Fill in learning rate and weight decay where the config leaves them open, and say why these.

    >>> choose_rates(TrainingConfig(), scratch=False, adapter=True, parameters=135_000_000)[0].learning_rate
    0.0002
    """
    decisions = []
    if training.learning_rate is None:
        if scratch:
            rate = next((rate for limit, rate in SCRATCH_LEARNING_RATES if parameters <= limit), SCRATCH_LEARNING_RATES[-1][1])
            why = f"usual for a model of {parameters / 1e6:.0f} M parameters trained from scratch"
        else:
            rate, why = (
                (LORA_LEARNING_RATE, "usual for LoRA") if adapter else (FULL_LEARNING_RATE, "usual for full tuning of a pretrained model")
            )
        training = replace(training, learning_rate=rate)
        decisions.append(Decision("training.learning_rate", rate, why))
    if training.weight_decay is None:
        decay, why = (0.1, "usual from scratch") if scratch else (0.0, "usual for LoRA") if adapter else (0.01, "usual for full tuning")
        training = replace(training, weight_decay=decay)
        decisions.append(Decision("training.weight_decay", decay, why))
    return training, decisions


def assemble(prepared: Prepared, options: Options, devices: Devices) -> Assembled:
    """Load the model, attach what is trained, choose engine and precision, build the optimizer; weights are those before step 1.

    The random generators are seeded here, once, from `run.seed`; the kernels that torch keeps are bounded. Raises ModelError,
    AdapterError, ConfigError or MachineError.
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
        model, more = adapters.attach_adapter(model, config.adapter, seed=config.run.seed, tokenizer=prepared.tokenizer.tokenizer)
        decisions += more
    parameters = adapters.trained_parameters(model)
    devices.broadcast(parameters.values())
    counts = Counts(total=adapters.count_parameters(model), trained=sum(one.numel() for one in parameters.values()))

    training, more = choose_rates(config.training, scratch=prepared.source.kind == "scratch", adapter=adapter, parameters=counts.total)
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
    return Assembled(
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
    """Seed it, and bound the memory it collects; here, because a program that came by the Python API passes nowhere else."""
    bound_kernel_caches()
    _seed_everything(config.run.seed + devices.rank)
    if config.model.recomputes and devices.device.type == "cpu":
        return [tune_allocator(largest_block=LEAN_LARGEST_BLOCK)]
    return allocator_in_force()


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
    parameters: list[torch.nn.Parameter], optimizer: Optimizer, training: TrainingConfig, precision: Precision, devices: Devices
) -> tuple[Update, list[Decision]]:
    if not training.step_in_backward:
        return AfterBackward(parameters, optimizer, precision, devices, max_grad_norm=training.max_grad_norm), []
    sizes = [one.nbytes for one in parameters]
    reason = f"asked for: a gradient goes once it is complete; all are {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e6:.1f} MB"
    return StepInBackward(parameters, optimizer), [Decision("training.step_in_backward", True, reason)]


def _make_windows(
    prepared: Prepared, engine: Engine, model: Any, parameters: dict[str, torch.nn.Parameter], devices: Devices
) -> tuple[BatchPlan, list[Decision]]:
    def windows(limit: int | None) -> BatchPlan:
        return prepared.batch_plan(layout=engine.layout, max_group_tokens=limit, rank=devices.rank, world_size=devices.world_size)

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
