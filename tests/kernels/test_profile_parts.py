"""`benchmarks/profile_step.py`: to which part of a step an operation's time belongs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradient_helpers import adapted, loss_and_gradients
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.forward import build_engine
from llmtune.kernels import weight_prepack

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LORA = AdapterConfig(method="lora", r=4, alpha=8)


@pytest.mark.skipif(not weight_prepack.can_prepack(), reason="this CPU does not multiply bf16 natively")
@pytest.mark.parametrize("is_packed", [False, True])
def test_products_of_frozen_weights_are_linear_and_narrow_ones_the_adapters(
    is_packed: bool,
    monkeypatch: pytest.MonkeyPatch,
    build_model: Callable[..., Any],
    arithmetic: Callable[..., Any],
    flat: MicroBatch,
) -> None:
    """However frozen weights lie, the same number of products is named linear, and of those with A and B adapter."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    part_of = importlib.import_module("profile_step").part_of
    half = arithmetic(bf16=True)
    model = adapted(build_model("llama").bfloat16(), LORA)
    config = Config(adapter=LORA, model=ModelConfig(weights_prepack=is_packed))
    engine = build_engine(model, config=config, device=torch.device("cpu"), precision=half)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler,
        half.autocast(),
    ):
        loss_and_gradients(model, lambda: engine.nll_sum(flat))
    packed, plain = ("mkldnn::_linear_pointwise",), ("aten::mm", "aten::addmm_")
    products = [event for event in profiler.events() if event.name in packed + plain]
    parts = [part_of(event, LORA.r) for event in products]
    assert set(parts) == {"linear", "adapter", "loss"}
    assert (
        sum(part == "linear" for part in parts) == 14 + 11
    )  # with inputs; with gradients but for the first three, whose input wants none
    wide = packed if is_packed else plain
    assert all(event.name in wide for event, part in zip(products, parts, strict=True) if part == "linear")
    assert all(event.name in plain for event, part in zip(products, parts, strict=True) if part == "adapter")
