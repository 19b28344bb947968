"""Frozen weights that wait in host memory: the bits of resident ones, with copies that arrive late."""

from contextlib import suppress

import pytest
import torch
import transformers
from pretend import numbers
from pretend.machine import BLOCK_BYTES

from conftest import FAMILIES
from llmtune.adapters.attach import attach_adapter
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.errors import DivergedError
from llmtune.kernels import activation_offload
from llmtune.kernels.activation_offload import HostStore
from llmtune.kernels.weight_offload import offload_weights
from llmtune.plan.meta_model import count_sizes


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 12)


def same(one, other):
    return (one.losses, one.norms) == (other.losses, other.norms) and all(map(torch.equal, one.weights, other.weights))


@pytest.mark.parametrize("recompute", [True, "offload"])
def test_n15_offloaded_weights_repeat_every_bit_with_copies_that_arrive_late(train_on, undisturbed, recompute):
    trained = train_on(family="deep", recompute=recompute, offload_weights=True)
    assert same(trained, undisturbed["deep"])
    assert sum(trained.waits.values()) == sum(undisturbed["deep"].waits.values()) == 2, "one a step"
    assert not trained.pageable


def test_without_the_wait_another_training_comes_out(train_on, undisturbed, monkeypatch):
    """The tester is tested: a block that does not wait for its weights computes with what lay there before."""
    monkeypatch.setattr(HostStore, "_wait", lambda _store, _stored: None)
    with suppress(DivergedError):
        assert not same(train_on(family="deep", recompute=True, offload_weights=True), undisturbed["deep"])


def test_where_page_locked_memory_is_refused_they_wait_in_ordinary_memory(train_on, undisturbed):
    with pytest.warns(RuntimeWarning, match="waits in ordinary memory"):
        trained = train_on(family="deep", recompute=True, offload_weights=True, pinned_limit=1 << 14)
    assert same(trained, undisturbed["deep"])
    assert trained.pageable


@pytest.mark.parametrize("recompute", [True, "offload"])
def test_the_card_holds_what_is_planned(recompute):
    """All but the frozen matrices of blocks, and of these two blocks'."""
    adapter = AdapterConfig(method="lora", r=4)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["deep"](), dtype=torch.bfloat16)
    model, _ = attach_adapter(model, adapter, seed=0)
    sizes = count_sizes(model, Config(model=ModelConfig(offload_weights=True), adapter=adapter))
    with numbers.machine() as device:
        offload_weights(model, torch.device("cuda", 0))
        blocks = model.get_base_model().model.layers
        with torch.no_grad():
            model(input_ids=torch.arange(3, 12, device="cuda")[None])
        held = device.now
        tensors = sum(1 for one in model.parameters()) + sum(1 for _ in model.buffers())
        planned = sizes.base_bytes + sizes.adapter_bytes - sizes.offloaded_bytes + sizes.two_offloaded_bytes
        assert len(blocks) == 4
        assert abs(held - planned) <= tensors * BLOCK_BYTES
