"""`verify batching` and `verify packing`: loss and gradients of the user's model and rows, cut or packed in any way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from llmtune.common.text import PrintLine
from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options
from llmtune.config.schema import Config, ObjectiveConfig
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.devices import open_devices
from llmtune.engine.objective import plain_nll_sum
from llmtune.errors import ConfigError, DataError
from llmtune.prepare import Prepared, prepare
from llmtune.training.build import TrainingSetup, build_setup
from llmtune.verify.result import Verdict

__all__ = [
    "CUT_BOUND",
    "LOSS_BOUND",
    "PATH_BOUND",
    "WindowResult",
    "compare_windows",
    "in_float32",
    "train_window",
    "verify_batching",
    "verify_packing",
]

CUT_BOUND = 1e-6
"""Largest relative difference of gradients between two cuts of a window, float32: norm of the difference over norm of
the gradient (N1).
"""
PATH_BOUND = 1e-5
"""The same between two ways of computing, such as packed and alone, or the fast path and the plain one (N5, N15)."""
LOSS_BOUND = 1e-6
"""Largest relative difference of the loss."""
_MOST_ROWS = 12


class WindowResult(NamedTuple):
    """The loss of a window in nats per trained token, and its gradients by parameter name."""

    loss: float
    gradients: dict[str, torch.Tensor]


def verify_batching(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine) -> Verdict:
    """Compare one window cut into micro-batches (N1), reordered and padded (N4) in several ways.

    Float32, no dropout.
    """
    prepared, setup, examples = _build(resolved, options, print_line)
    verdict = Verdict("batching")
    layout, pad_id = setup.engine.layout, prepared.tokenizer.tokenizer.pad_token_id or 0
    reference = train_window(setup, setup.engine.nll_sum, [make_micro_batch(examples, layout, pad_id)])
    cuts = {"one row a micro-batch": 1, "two rows a micro-batch": 2, "three rows a micro-batch": 3}
    for name, size in cuts.items():
        batches = [
            make_micro_batch(examples[begin : begin + size], layout, pad_id) for begin in range(0, len(examples), size)
        ]
        cut = train_window(setup, setup.engine.nll_sum, batches)
        compare_windows(verdict, f"{len(examples)} rows at once = {name}", reference, cut, CUT_BOUND)
    reversed_rows = train_window(setup, setup.engine.nll_sum, [make_micro_batch(examples[::-1], layout, pad_id)])
    compare_windows(verdict, "rows in another order", reference, reversed_rows, CUT_BOUND)
    padded = [make_micro_batch(examples, "padded", pad_id)]
    plain = train_window(setup, lambda batch: plain_nll_sum(setup.model, batch), padded)
    compare_windows(verdict, "the library's own forward on a padded batch", reference, plain, PATH_BOUND)
    return verdict


def verify_packing(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine) -> Verdict:
    """Compare packed rows with rows alone, and change one row to see whether a neighbour moves (N5).

    Float32, no dropout.
    """
    prepared, setup, examples = _build(resolved, options, print_line)
    verdict = Verdict("packing")
    if setup.engine.layout != "flat":
        reasons = (str(decision) for decision in setup.engine.decisions if decision.key == "training.engine")
        verdict.add("packed rows are laid in one sequence", next(reasons, "the plain engine runs"), False)
        return verdict
    pad_id = prepared.tokenizer.tokenizer.pad_token_id or 0
    alone = [make_micro_batch([example], "padded", pad_id) for example in examples]
    plain = train_window(setup, lambda batch: plain_nll_sum(setup.model, batch), alone)
    packed = train_window(setup, setup.engine.nll_sum, [make_micro_batch(examples, "flat", pad_id)])
    compare_windows(verdict, f"{len(examples)} packed rows = each alone", plain, packed, PATH_BOUND)
    moved = _moved_neighbours(setup, examples, pad_id)
    measured = f"{moved} of {len(examples) - 1} neighbours moved"
    verdict.add("changing one row changes no bit of its neighbours", measured, moved == 0)
    return verdict


def _build(
    resolved: ResolvedConfig, options: Options, print_line: PrintLine
) -> tuple[Prepared, TrainingSetup, list[Example]]:
    """Build the config's model in float32 without dropout, and choose up to twelve rows of all lengths."""
    config = resolved.config
    if config.objective.method == "grpo":
        problem = "the prompts of grpo have no answers before they are drawn, so there are no rows to compare"
        raise ConfigError(problem, where="objective.method", fix="verify it with rows that have answers, as sft")
    if config.objective.trains_head:
        problem = f"{config.objective.method} trains a head of scores, and losses of tokens are compared here"
        fix = "verify the model with rows that have answers, as sft; `llmtune verify preference` takes reward"
        raise ConfigError(problem, where="objective.method", fix=fix)
    config = in_float32(config)
    prepared = prepare(replace(resolved, config=config), options)
    if config.objective.method != "sft":
        print_line(f"rows of {config.objective.method}: the loss of their answers' tokens is compared, side by side")
        prepared = replace(prepared, config=replace(prepared.config, objective=ObjectiveConfig()))
    devices, _ = open_devices(config, options)
    setup = build_setup(prepared, options, devices)
    _randomize_zero_weights(setup)
    by_length = np.argsort(prepared.data.train.lengths, kind="stable")
    # Short and long ones: rows of one length would hide what depends on padding.
    ranks = np.unique(np.linspace(0, len(by_length) - 1, min(_MOST_ROWS, len(by_length))).round().astype(int))
    examples = [prepared.data.train[int(by_length[rank])] for rank in ranks]
    if len(examples) < 2:
        raise DataError("a comparison needs at least two rows", where="data.train", fix="name a file with more rows")
    lengths = f"{min(map(len, examples))} to {max(map(len, examples))} tokens"
    print_line(f"{len(examples)} rows of {lengths}, engine {setup.engine.layout}")
    return prepared, setup, examples


def in_float32(config: Config) -> Config:
    """The config in float32, without dropout and noise: what is compared then differs by rounding alone."""
    return replace(
        config,
        adapter=replace(config.adapter, dropout=0.0),
        # Rates are needed to build an optimizer and its schedule.
        training=replace(
            config.training,
            precision="fp32",
            neftune_alpha=None,
            batch_size=1,
            learning_rate=1.0,
            lr_schedule="constant",
            warmup_steps=None,
            warmup_ratio=None,
            weight_decay=0.0,
        ),
        model=replace(config.model, dtype="float32"),
    )


def _randomize_zero_weights(setup: TrainingSetup) -> None:
    """Give a new adapter an effect: its B is zero, and with it most gradients, which then would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in setup.parameters.items():
            if setup.is_adapted and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                assert parameter.any(), name


def train_window(
    setup: TrainingSetup,
    loss_sum: Callable[[MicroBatch], torch.Tensor],
    batches: Iterable[MicroBatch],
    divisor: float | None = None,
) -> WindowResult:
    """Return the mean loss of one window and its gradients, in the shapes of the weights, as the training loop does.

    loss = sum_b loss_sum(b) / divisor, over the micro-batches b. divisor: None for the number of trained tokens.
    """
    batches = list(batches)
    divisor = divisor or sum(batch.loss_weight for batch in batches)
    setup.model.train()
    total_loss = 0.0
    for parameter in setup.parameters.values():
        parameter.grad = None
    for batch in batches:
        loss = loss_sum(batch.to(setup.devices.device))
        (loss / divisor).backward()
        total_loss += float(loss.detach())
    gradients = {
        name: parameter.grad.clone() for name, parameter in setup.parameters.items() if parameter.grad is not None
    }
    return WindowResult(total_loss / divisor, gradients)


def compare_windows(
    verdict: Verdict,
    claim: str,
    reference: WindowResult,
    result: WindowResult,
    gradient_bound: float,
    loss_bound: float = LOSS_BOUND,
) -> None:
    """Add a finding: the loss within `loss_bound`, the gradient of all parameters together within `gradient_bound`."""
    loss = abs(reference.loss - result.loss) / max(abs(reference.loss), 1e-12)
    squared_difference = sum(
        float((gradient.double() - result.gradients[name].double()).square().sum())
        for name, gradient in reference.gradients.items()
    )
    squared_norm = sum(float(gradient.double().square().sum()) for gradient in reference.gradients.values())
    gradient = (squared_difference / squared_norm) ** 0.5 if squared_norm else float("inf")
    measured = (
        f"loss {loss:.1e} (bound {loss_bound:.0e}), gradient {gradient:.1e} (bound {gradient_bound:.0e}), relative"
    )
    verdict.add(claim, measured, loss <= loss_bound and gradient <= gradient_bound)


def _moved_neighbours(setup: TrainingSetup, examples: list[Example], pad_id: int) -> int:
    """Change every token of the middle row and return how many packed neighbours then have another loss, in any bit."""
    middle = len(examples) // 2
    changed = replace(examples[middle], input_ids=(examples[middle].input_ids + 1) % 100)
    packs = [[*examples[:middle], row, *examples[middle + 1 :]] for row in (examples[middle], changed)]
    moved = 0
    setup.model.eval()
    for index in range(len(examples)):
        if index == middle:
            continue
        losses = []
        for rows in packs:
            # Only the row of `index` has weights, so that the sum is its loss alone.
            weighted = [
                row if position == index else replace(row, weights=np.zeros_like(row.weights))
                for position, row in enumerate(rows)
            ]
            with torch.no_grad():
                losses.append(setup.engine.nll_sum(make_micro_batch(weighted, "flat", pad_id).to(setup.devices.device)))
        moved += not torch.equal(losses[0], losses[1])
    return moved
