"""What the GPU's path computes is what the CPU's does; copies that arrive late change nothing."""

import pytest
import torch
from pretend import numbers

from llmtune.errors import DivergedError
from llmtune.kernels import activation_offload, attention
from llmtune.kernels.activation_offload import HostStore


def same(one, other):
    return (
        one.losses == other.losses
        and one.norms == other.norms
        and all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    )


PLACES = (("gpu", "rtx4090"), ("cpu", "cpu"))


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.campaign)])
def test_n15_losses_and_norms_are_those_of_the_cpu(train_on, undisturbed, lora):
    gpu, cpu = ((undisturbed[one] if lora else train_on(card, lora=False)) for one, card in PLACES)
    assert cpu.decided["model.attention"] == "tiles"
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert gpu.norms == pytest.approx(cpu.norms, rel=2e-2)


@pytest.mark.campaign
def test_n13_a_training_repeats_every_bit(train_on):
    assert same(train_on(), train_on())


def test_offload_with_copies_that_arrive_late_repeats_every_bit_of_recomputation(train_on, undisturbed, monkeypatch):
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 12)
    offloaded = train_on(recompute="offload")
    assert offloaded.decided["model.gradient_checkpointing"] == "offload"
    assert same(offloaded, undisturbed["recomputed"])
    # The tester is tested: without the wait the backward pass reads what has not arrived.
    monkeypatch.setattr(HostStore, "_wait", lambda _store, _stored: None)
    with pytest.raises(DivergedError, match="nan"):  # what fresh memory of the pretend device holds
        train_on(recompute="offload")


def test_weights_that_are_tied_stay_tied_on_the_device():
    """The tester is tested: a head of its own would be trained apart, and no file of a tied model may hold one."""
    with numbers.machine():
        body, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
        head.weight = body.weight
        model = torch.nn.Sequential(body, torch.nn.Sequential(head)).to("cuda")
        assert model[1][0].weight is model[0].weight
        assert model[0].weight.device.type == "cuda"


def test_a_tensor_left_on_the_host_is_an_error(train_on, monkeypatch):
    """The tester is tested: what meets on two devices fails here as it does on a GPU."""
    monkeypatch.setattr(attention, "copy_to", lambda tensor, _device: tensor)
    with numbers.machine():
        ends = attention.segment_mask(torch.tensor([0, 2, 5], dtype=torch.int32), 3, torch.device("cuda"))
        with pytest.raises(RuntimeError, match="at least two devices"):
            torch.zeros(1, 1, 3, 3, device="cuda") + ends
