"""`verify batching` and `verify packing`: the numbers of the user's own model and rows, however a window is cut or
packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llmtune.common.printing import PrintLine
from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.devices import open_devices
from llmtune.engine.objective import plain_nll_sum
from llmtune.errors import DataError
from llmtune.prepare import Prepared, prepare
from llmtune.training.build import TrainingSetup, build_setup
from llmtune.verify.result import Verdict

__all__ = ["CUT_BOUND", "LOSS_BOUND", "PATH_BOUND", "verify_batching", "verify_packing"]

CUT_BOUND = 1e-6
"""Largest relative difference of gradients between two cuts of a window, float32: norm of the difference over norm of
the gradient (N1).
"""
PATH_BOUND = 1e-5
"""The same between two ways of computing, such as packed and alone, or the fast path and the plain one (N5, N15)."""
LOSS_BOUND = 1e-6
_MOST_ROWS = 12


def verify_batching(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine) -> Verdict:
    """One window's loss and gradients must not depend on how it is cut into micro-batches (N1) or padded (N4).

    Float32, no dropout.
    """
    prepared, setup, examples = _assemble(resolved, options, print_line)
    verdict = Verdict("batching")
    layout, pad = setup.engine.layout, prepared.tokenizer.tokenizer.pad_token_id or 0
    whole = [make_micro_batch(examples, layout, pad)]
    reference = _gradients(setup, setup.engine.nll_sum, whole)
    cuts = {"one row a micro-batch": 1, "two rows a micro-batch": 2, "three rows a micro-batch": 3}
    for name, size in cuts.items():
        batches = [
            make_micro_batch(examples[begin : begin + size], layout, pad) for begin in range(0, len(examples), size)
        ]
        cut = _gradients(setup, setup.engine.nll_sum, batches)
        _compare(verdict, f"{len(examples)} rows at once = {name}", reference, cut, CUT_BOUND)
    turned = [make_micro_batch(examples[::-1], layout, pad)]
    _compare(verdict, "rows in another order", reference, _gradients(setup, setup.engine.nll_sum, turned), CUT_BOUND)
    padded = [make_micro_batch(examples, "padded", pad)]
    plain = _gradients(setup, lambda batch: plain_nll_sum(setup.model, batch), padded)
    _compare(verdict, "the library's own forward on a padded batch", reference, plain, PATH_BOUND)
    return verdict


def verify_packing(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine) -> Verdict:
    """Packed rows must train as rows alone, and no row may see another (N5). Float32, no dropout."""
    prepared, setup, examples = _assemble(resolved, options, print_line)
    verdict = Verdict("packing")
    if setup.engine.layout != "flat":
        reason = next(
            (str(one) for one in setup.engine.decisions if one.key == "training.engine"), "the plain engine runs"
        )
        verdict.add("packed rows are laid in one sequence", reason, False)
        return verdict
    pad = prepared.tokenizer.tokenizer.pad_token_id or 0
    packed = [make_micro_batch(examples, "flat", pad)]
    alone = [make_micro_batch([example], "padded", pad) for example in examples]
    plain = _gradients(setup, lambda batch: plain_nll_sum(setup.model, batch), alone)
    _compare(
        verdict,
        f"{len(examples)} packed rows = each alone",
        plain,
        _gradients(setup, setup.engine.nll_sum, packed),
        PATH_BOUND,
    )
    verdict.add(*_isolation(setup, examples, pad))
    return verdict


def _assemble(
    resolved: ResolvedConfig, options: Options, print_line: PrintLine
) -> tuple[Prepared, TrainingSetup, list[Example]]:
    """The config's model in float32 without dropout, and up to twelve of its rows, of lengths as different as there
    are.
    """
    config = resolved.config
    config = replace(
        config,
        adapter=replace(config.adapter, dropout=0.0),
        training=replace(config.training, precision="fp32", neftune_alpha=None, batch_size=1),
        model=replace(config.model, dtype="float32"),
    )
    prepared = prepare(replace(resolved, config=config), options)
    devices, _ = open_devices(config, options)
    setup = build_setup(prepared, options, devices)
    _wake_adapter(setup)
    order = np.argsort(prepared.data.train.lengths, kind="stable")
    chosen = np.unique(np.linspace(0, len(order) - 1, min(_MOST_ROWS, len(order))).round().astype(int))
    examples = [prepared.data.train[int(order[place])] for place in chosen]
    if len(examples) < 2:
        raise DataError("a comparison needs at least two rows", where="data.train", fix="name a file with more rows")
    print_line(
        f"{len(examples)} rows of {min(map(len, examples))} to {max(map(len, examples))} tokens, engine {setup.engine.layout}"
    )
    return prepared, setup, examples


def _wake_adapter(setup: TrainingSetup) -> None:
    """Give a fresh adapter an effect: its B is zero, and a zero gradient would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in setup.parameters.items():
            if setup.is_adapted and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                assert parameter.any(), name


def _gradients(
    setup: TrainingSetup, nll_sum: Callable[[MicroBatch], torch.Tensor], batches: Iterable[MicroBatch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss (nats per trained token) and gradients of one window, as the training loop computes them."""
    batches = list(batches)
    weight = sum(batch.loss_weight for batch in batches)
    setup.model.train()
    total = 0.0
    for parameter in setup.parameters.values():
        parameter.grad = None
    for batch in batches:
        nats = nll_sum(batch.to(setup.devices.device))
        (nats / weight).backward()
        total += float(nats.detach())
    gradients = {
        name: parameter.grad.clone() for name, parameter in setup.parameters.items() if parameter.grad is not None
    }
    return total / weight, gradients


def _compare(
    verdict: Verdict,
    claim: str,
    one: tuple[float, dict[str, Any]],
    two: tuple[float, dict[str, Any]],
    gradient_bound: float,
) -> None:
    """Add a finding: the loss within 1e-6 relative, the whole gradient within its bound."""
    loss = abs(one[0] - two[0]) / max(abs(one[0]), 1e-12)
    difference = sum(float((one[1][name].double() - two[1][name].double()).square().sum()) for name in one[1])
    scale = sum(float(gradient.double().square().sum()) for gradient in one[1].values())
    gradient = (difference / scale) ** 0.5 if scale else float("inf")
    measured = (
        f"loss {loss:.1e} (bound {LOSS_BOUND:.0e}), gradient {gradient:.1e} (bound {gradient_bound:.0e}), relative"
    )
    verdict.add(claim, measured, loss <= LOSS_BOUND and gradient <= gradient_bound)


def _isolation(setup: TrainingSetup, examples: list[Example], pad: int) -> tuple[str, str, bool]:
    """Change every token of one row and require the losses of all others, packed beside it, to keep every bit."""
    middle = len(examples) // 2
    changed = replace(examples[middle], input_ids=(examples[middle].input_ids + 1) % 100)
    neighbours = [[*examples[:middle], one, *examples[middle + 1 :]] for one in (examples[middle], changed)]
    moved = 0
    setup.model.eval()
    for index in range(len(examples)):
        if index == middle:
            continue
        losses = []
        for rows in neighbours:
            silent = [
                one if place == index else replace(one, weights=np.zeros_like(one.weights))
                for place, one in enumerate(rows)
            ]
            with torch.no_grad():
                losses.append(setup.engine.nll_sum(make_micro_batch(silent, "flat", pad).to(setup.devices.device)))
        moved += not torch.equal(losses[0], losses[1])
    return (
        "changing one row changes no bit of its neighbours",
        f"{moved} of {len(examples) - 1} neighbours moved",
        moved == 0,
    )
