"""Kernels of the device for parts of a model: on where they are right, off with their reason where not."""

import pytest
import torch
from pretend import numbers

from llmtune.kernels import patch_model as table

ALL = "RMS norm, SwiGLU by Liger, rotary positions by Liger, cross-entropy by Liger"


@pytest.fixture
def with_liger(monkeypatch):
    """Liger as if it was installed: its kernels have twins here."""
    monkeypatch.setattr(table, "is_installed", lambda: True)


@pytest.fixture
def without_liger(monkeypatch):
    monkeypatch.setattr(table, "is_installed", lambda: False)


def test_norms_take_torch_s_kernel_and_change_nothing_but_roundings(undisturbed):
    """N15: the kernel's twin here rounds once, as the kernel does; losses and norms stay those of the CPU."""
    found, cpu = undisturbed["gpu"], undisturbed["cpu"]
    assert found.decided["training.kernels"].split(", ")[0] == "RMS norm"
    assert found.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert found.norms == pytest.approx(cpu.norms, rel=2e-2)


def test_n15_liger_s_kernels_change_nothing_but_roundings(train_on, undisturbed, with_liger):
    found, cpu = train_on(), undisturbed["cpu"]
    assert found.decided["training.kernels"] == ALL
    assert found.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert found.norms == pytest.approx(cpu.norms, rel=2e-2)


@pytest.mark.campaign
@pytest.mark.parametrize("options", [{"recompute": True}, {"recompute": "offload"}, {"lora": False}, {"dropout": 0.1}])
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "mixtral", "gemma3"])
def test_n15_with_and_without_them(train_on, monkeypatch, family, options):
    trained = []
    for is_installed in (True, False):
        monkeypatch.setattr(table, "is_installed", lambda answer=is_installed: answer)
        trained.append(train_on("h100", family, **options))
    with_them, without = trained
    assert "rotary positions by Liger" in with_them.decided["training.kernels"]
    assert "Liger" not in str(without.decided.get("training.kernels"))
    if "dropout" not in options:
        assert with_them.losses == pytest.approx(without.losses, rel=2e-3)
        assert with_them.norms == pytest.approx(without.norms, rel=4e-2)


def test_a_kernel_that_is_wrong_or_missing_is_left_out_and_said(train_on, monkeypatch, without_liger):
    def halved(grad, x, inverse_rms, weight, needs_weight):
        grad_x, grad_weight = numbers._rms_norm_backward(grad, x, inverse_rms, weight, needs_weight)
        return grad_x / 2, grad_weight

    monkeypatch.setitem(numbers.TWINS, torch.ops.llmtune.rms_norm_backward.default, halved)
    trained = train_on(steps=0)
    assert trained.decided["model.attention"] == "varlen"
    assert "training.kernels" not in trained.decided
    assert "what is faster failed: varlen: its gradient on a probe is" in trained.reasons["model.attention"]


def _wrong_swiglu(grad, gate, up):
    numbers._swiglu_backward(grad, gate, up)
    gate.mul_(2)


def _wrong_rotary(query, key, cos, sin, backward):
    numbers._rotate(query, key, cos, sin, backward=False)


WRONG = {
    "rotate_": _wrong_rotary,
    "swiglu_backward_": _wrong_swiglu,
    "cross_entropy_": lambda logits, *others: numbers._cross_entropy(logits.clone(), *others),
}


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_kernel_of_liger_that_is_wrong_costs_those_of_liger_only(train_on, monkeypatch, with_liger, name, lora):
    """Both ways through such a kernel would agree with each other: the probe compares with the library's own.

    The wrong rotation shows in queries and keys only, whose gradients are a hundredth of all.
    """
    monkeypatch.setitem(numbers.TWINS, getattr(torch.ops.llmtune, name).default, WRONG[name])
    trained = train_on(steps=0, lora=lora)
    assert trained.decided["model.attention"] == "varlen"
    assert trained.decided["training.kernels"] == "RMS norm"
    assert "varlen with Liger's kernels: its gradient on a probe is" in trained.reasons["model.attention"]


def test_what_is_not_installed_is_said_with_its_command(train_on, without_liger):
    assert "pip install 'llmtune[gpu]'" in train_on(steps=0).reasons["training.kernels"]


def test_a_second_backward_pass_through_what_the_first_overwrote_is_refused(with_liger):
    from llmtune.kernels.swiglu import _KernelSwiglu

    with numbers.machine():
        gate, up = (torch.ones(1, 3, 8, device="cuda", requires_grad=True) for _ in range(2))
        output = _KernelSwiglu.apply(gate * 1, up * 1).sum()
        output.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward pass through SwiGLU"):
            output.backward()
