"""Kernels of the device for parts of a model: on where they are right, off with their reason where not."""

import pytest
import torch
from pretend import numbers


def test_norms_take_torch_s_kernel_and_change_nothing_but_roundings(undisturbed):
    """N15: the kernel's twin here rounds once, as the kernel does; losses and norms stay those of the CPU."""
    found, cpu = undisturbed["gpu"], undisturbed["cpu"]
    assert found.decided["training.kernels"] == "RMS norm"
    assert found.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert found.norms == pytest.approx(cpu.norms, rel=2e-2)


def test_a_kernel_that_is_wrong_or_missing_is_left_out_and_said(train_on, monkeypatch):
    def zeros(grad, x, *_others):
        return torch.zeros_like(x), torch.zeros(0)

    monkeypatch.setitem(numbers.TWINS, torch.ops.llmtune.rms_norm_backward.default, zeros)
    trained = train_on(steps=0)
    assert trained.decided["model.attention"] == "varlen"
    assert "training.kernels" not in trained.decided
    assert "what is faster failed: varlen: its gradient on a probe is" in trained.reasons["model.attention"]
