"""`benchmarks/profile_step.py`: to which part of a step an operation's time belongs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradient_helpers import adapted, loss_and_gradients
from llmtune.config.schema import AdapterConfig, Config
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.forward import build_engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LORA = AdapterConfig(method="lora", r=4, alpha=8)


def test_products_of_frozen_weights_are_linear_and_narrow_ones_the_adapters(
    monkeypatch: pytest.MonkeyPatch,
    build_model: Callable[..., Any],
    arithmetic: Callable[..., Any],
    flat: MicroBatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    part_of = importlib.import_module("profile_step").part_of
    half = arithmetic(bf16=True)
    model = adapted(build_model("llama").bfloat16(), LORA)
    engine = build_engine(model, config=Config(adapter=LORA), device=torch.device("cpu"), precision=half)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler,
        half.autocast(),
    ):
        loss_and_gradients(model, lambda: engine.nll_sum(flat))
    products = [event for event in profiler.events() if event.name in ("aten::mm", "aten::addmm_")]
    parts = [part_of(event, LORA.r) for event in products]
    assert set(parts) == {"linear", "adapter", "loss"}
    assert (
        sum(part == "linear" for part in parts) == 14 + 11
    )  # with inputs; with gradients but for the first three, whose input wants none
