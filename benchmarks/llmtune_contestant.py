"""llmtune as a contestant: its own engine, windows, optimizer and loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from starting_point import Rows, Step, Training, adapter_of, example_list, load_model
from workloads import Workload

if TYPE_CHECKING:
    from llmtune.data.dataset.batches import MicroBatch, Window


def train(
    workload: Workload,
    rows: Rows,
    device_type: str,
    engine: str = "auto",
    group_tokens: int | None = None,
    optimizer: str = "adamw",
    max_grad_norm: float | None = 1.0,
    step_in_backward: bool = False,
) -> Training:
    """Build a training from the parts that `llmtune train` builds it from: model, adapter, engine, windows, loop."""
    from llmtune.cli.process import prepare_process

    prepare_process(trains=True)  # before torch, as the commands do
    import torch

    from llmtune.config.schema import Config, ModelConfig, TrainingConfig
    from llmtune.data.dataset.batches import BatchPlan
    from llmtune.data.dataset.packing import plan_packs
    from llmtune.engine.devices import Devices
    from llmtune.engine.forward import build_engine
    from llmtune.engine.loop import train_steps
    from llmtune.engine.objective import next_token_objective
    from llmtune.engine.optim import build_optimizer
    from llmtune.engine.precision import Precision
    from llmtune.engine.state import TrainingState
    from llmtune.engine.update import StepAfterBackward, StepInBackward
    from llmtune.models.parameters import trained_parameters

    device = torch.device(device_type)
    precision = Precision("bf16", device)
    model = load_model(workload, device_type)
    parameters = trained_parameters(model)
    config = Config(
        model=ModelConfig(gradient_checkpointing=workload.checkpointing),  # type: ignore[arg-type]
        adapter=adapter_of(workload),
        training=TrainingConfig(engine=engine),  # type: ignore[arg-type]
    )
    built = build_engine(model, config=config, device=device, precision=precision)
    model.train()
    rate = workload.learning_rate
    built_optimizer, _ = build_optimizer(
        optimizer, parameters, learning_rate=rate, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, device=device
    )
    lengths = np.array([len(ids) for ids, _ in rows])
    packing = "none" if workload.pack is None else "best_fit"
    packs = plan_packs(lengths, workload.pack or int(lengths.max()), packing, None)
    windows = BatchPlan(
        example_list(rows),
        packs,
        # A sequence of packed rows is a micro-batch: all those of a step together would be 65,000 tokens of 8B.
        batch_size=workload.rows_a_step if workload.pack is None else 1,
        accumulation=packs_a_step(len(packs), len(rows), workload),
        epochs=1,
        max_steps=None,
        shuffle_seed=None,
        layout=built.layout,
        max_group_tokens=group_tokens or built.max_group_tokens,
    )
    devices, weights = Devices(device), list(parameters.values())
    if step_in_backward:
        update = StepInBackward(weights, built_optimizer)
    else:
        update = StepAfterBackward(
            weights, built_optimizer, precision, devices.sync_gradients, max_grad_norm=max_grad_norm
        )
    results = train_steps(
        objective=next_token_objective(built.nll_sum),
        update=update,
        windows=timed_windows(windows.windows()),
        learning_rate=lambda _step: rate,
        precision=precision,
        state=TrainingState(),
        devices=devices,
        max_skipped_steps=0,
    )
    steps = (Step(result.step_seconds, result.train_mean_nll, result.num_tokens) for result in results)
    return Training(model.config, steps, tuple(map(str, built.decisions)))


def packs_a_step(packs: int, rows: int, workload: Workload) -> int:
    """Micro-batches of a step: so many packs as hold about `rows_a_step` rows; 1 where nothing is packed.

    >>> from workloads import WORKLOADS
    >>> packs_a_step(36, 192, WORKLOADS["gpu-8b"]), packs_a_step(192, 192, WORKLOADS["lora"])
    (3, 1)
    """
    return 1 if workload.pack is None else max(1, round(packs * workload.rows_a_step / rows))


class TimedMicroBatches:
    """Micro-batches whose making is timed, and is a part of its own in a profile."""

    seconds = 0.0
    """Seconds waited for data, windows included, in the whole process."""

    def __init__(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        import torch

        for number in range(len(self.micro_batches)):
            began = time.perf_counter()
            with torch.profiler.record_function("part: data"):
                micro_batch = self.micro_batches[number]
            TimedMicroBatches.seconds += time.perf_counter() - began
            yield micro_batch


def timed_windows(windows: Iterator[Window]) -> Iterator[Window]:
    """Time the making of windows and of their micro-batches as data."""
    import torch

    while True:
        began = time.perf_counter()
        with torch.profiler.record_function("part: data"):
            window = next(windows, None)
        TimedMicroBatches.seconds += time.perf_counter() - began
        if window is None:
            return
        yield replace(window, micro_batches=TimedMicroBatches(window.micro_batches))
