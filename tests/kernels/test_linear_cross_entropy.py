"""N15 for the loss from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.kernels import linear_cross_entropy
from llmtune.kernels.linear_cross_entropy import Head, head_nll_sum, sequence_log_probs, trained_rows


class Doubled(nn.Linear):
    """A head that is not a plain Linear."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def problem(
    kind: type[nn.Linear] = nn.Linear, bias: bool = True, frozen: bool = False
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module = kind(24, 61, bias=bias).requires_grad_(not frozen)
    return module, torch.randn(300, 24, requires_grad=True), torch.randint(0, 61, (300,)), torch.rand(300)


def gradients(loss: torch.Tensor, module: nn.Linear, hidden: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(3 * loss, [hidden, *(p for p in module.parameters() if p.requires_grad)]))


@pytest.mark.parametrize("kind", [nn.Linear, Doubled])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 1.5), (3.0, 1.5)])
def test_the_chunked_loss_equals_the_whole_one(
    kind: type[nn.Linear], bias: bool, frozen: bool, scale: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N15: loss 1e-6, gradients 1e-5 relative; several chunks of several slices, the last ones partial."""
    monkeypatch.setattr(linear_cross_entropy, "TRAINED_CHUNK_ROWS", 128)
    monkeypatch.setattr(linear_cross_entropy, "SLICE_NUMBERS", 50 * 61)
    module, hidden, targets, weights = problem(kind, bias, frozen)
    found = head_nll_sum(Head(module, scale, cap), hidden, targets, weights)
    logits = module(hidden) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(gradients(found, module, hidden), gradients(expected, module, hidden), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_in_bf16_the_chunked_loss_stays_within_the_stated_bound() -> None:
    """N15 in bf16: loss 1e-4 of the plain bf16 path, gradients 1e-2 relative of float32."""
    module, hidden, targets, weights = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_nll_sum(Head(module), hidden, targets, weights)
        plain = (functional.cross_entropy(module(hidden).float(), targets, reduction="none") * weights).sum()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(plain.item(), rel=1e-4)
    exact = (functional.cross_entropy(module(hidden), targets, reduction="none") * weights).sum()
    for a, b in zip(gradients(found, module, hidden), gradients(exact, module, hidden), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-2


def test_a_heads_weight_is_rounded_once_for_all_chunks() -> None:
    rounded: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            if function is torch.ops.aten._to_copy.default:
                rounded.append(arguments[0].shape)
            return function(*arguments, **(named or {}))

    module, hidden, targets, weights = problem(frozen=True)
    assert hidden.shape[0] > linear_cross_entropy.CHUNK_ROWS
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        head_nll_sum(Head(module), hidden, targets, weights)
    assert rounded.count(module.weight.shape) == 1


def test_only_the_places_before_a_trained_token_are_rows() -> None:
    assert trained_rows(torch.tensor([[0.0, 1.0, 0.0, 0.5, 1.0]])).tolist() == [0, 2, 3]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_no_rows_give_zero_that_still_has_a_gradient_in_the_head_too(is_wrapped) -> None:
    """Where its gradient is summed over processes, each waits for that of all others."""
    module, hidden, targets, weights = problem()
    head = torch.nn.Sequential(module) if is_wrapped else module
    loss = head_nll_sum(Head(head), hidden[:0], targets[:0], weights[:0])
    assert loss.item() == 0
    loss.backward()
    for tensor in (hidden, *module.parameters()):
        assert tensor.grad is not None
        assert float(tensor.grad.abs().max()) == 0


def test_evaluation_keeps_no_gradient() -> None:
    module, hidden, targets, weights = problem()
    with torch.no_grad():
        assert not head_nll_sum(Head(module), hidden, targets, weights).requires_grad


def test_a_trained_heads_gradient_is_summed_and_handed_over_in_its_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of bf16 products add up in float32, and the sum is rounded nowhere: masters are float32."""
    monkeypatch.setattr(linear_cross_entropy, "TRAINED_CHUNK_ROWS", 16)
    module, hidden, targets, weights = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head_nll_sum(Head(module), hidden, targets, weights)
    _, grad_weight, grad_bias = torch.autograd.grad(loss, [hidden, *module.parameters()])
    for grad in (grad_weight, grad_bias):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())


def test_a_second_backward_pass_is_refused() -> None:
    """The first one scales the gradients where they are."""
    module, hidden, targets, weights = problem()
    loss = head_nll_sum(Head(module), hidden, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ROWS = torch.tensor([70, 0, 130, 1, 99])
"""Rows of five sequences: 300 in all, one without any, and chunks of 256 that begin within one."""


def preference_loss(log_probs: torch.Tensor) -> torch.Tensor:
    """A loss that is not linear in the log-probabilities: DPO's on two pairs, and one sequence squared."""
    return -functional.logsigmoid(0.1 * (log_probs[0] - log_probs[2])) + (log_probs[3] - log_probs[4] / 50).square()


def plain_log_probs(
    module: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    logits = module(hidden).float() * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    picked = torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1) * weights
    return torch.stack([part.sum() for part in picked.split(ROWS.tolist())])


def differences_of_log_probs(
    kind: type[nn.Linear] = nn.Linear,
    bias: bool = True,
    frozen: bool = False,
    scale: float = 0.25,
    cap: float | None = 1.5,
) -> tuple[float, float]:
    """Largest relative difference from the plain path: of the log-probabilities, and of gradients through a loss."""
    module, hidden, targets, weights = problem(kind, bias, frozen)
    found = sequence_log_probs(Head(module, scale, cap), hidden, targets, weights, ROWS)
    expected = plain_log_probs(module, hidden, targets, weights, scale, cap)
    pairs = zip(
        gradients(preference_loss(found), module, hidden),
        gradients(preference_loss(expected), module, hidden),
        strict=True,
    )
    assert found.dtype == torch.float32
    assert float(found[1].detach()) == 0
    apart = float((found - expected).detach().abs().max() / expected.detach().abs().max())
    return apart, max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("kind", [nn.Linear, Doubled])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (3.0, 1.5)])
def test_log_probabilities_of_sequences_equal_the_plain_ones_through_any_loss(
    kind: type[nn.Linear], bias: bool, frozen: bool, scale: float, cap: float | None
) -> None:
    """N15: values 1e-6, gradients 1e-5 relative, through a loss that is not linear in them."""
    value, gradient = differences_of_log_probs(kind, bias, frozen, scale, cap)
    assert value < 1e-6
    assert gradient < 1e-5


def test_log_probabilities_sum_to_the_loss() -> None:
    module, hidden, targets, weights = problem()
    log_probs = sequence_log_probs(Head(module), hidden, targets, weights, ROWS)
    assert -log_probs.sum().item() == pytest.approx(
        head_nll_sum(Head(module), hidden, targets, weights).item(), rel=1e-6
    )


def test_logits_of_sequences_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the forward nor in the backward pass."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", 32)
    rows: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            result = function(*arguments, **(named or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == 61:
                rows.append(result.shape[0])
            return result

    module, hidden, targets, weights = problem(frozen=True)
    with Watch():
        preference_loss(sequence_log_probs(Head(module), hidden, targets, weights, ROWS)).backward()
    assert sorted(set(rows)) == [12, 24, 32]  # nine chunks and a last one; 24 is the weight, transposed


def test_sequences_without_rows_have_log_probability_0_and_a_gradient() -> None:
    module, hidden, targets, weights = problem()
    log_probs = sequence_log_probs(
        Head(module), hidden[:0], targets[:0], weights[:0], torch.zeros(3, dtype=torch.int64)
    )
    assert log_probs.tolist() == [0, 0, 0]
    log_probs.sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) == 0


def _no_scale(head: Head, hidden: torch.Tensor, targets: torch.Tensor, _temperature: float) -> torch.Tensor:
    return functional.cross_entropy(
        linear_cross_entropy._scale_and_cap(head.module(hidden), 1.0, head.cap), targets, reduction="none"
    )


def _no_gradient(head: Head, hidden: torch.Tensor, targets: torch.Tensor, _temperature: float) -> torch.Tensor:
    logits = linear_cross_entropy._scale_and_cap(head.module(hidden.detach()), head.scale, head.cap)
    return functional.cross_entropy(logits, targets, reduction="none") + 0 * hidden.sum(dim=1)


def _half_softmax(head: Head, hidden: torch.Tensor, targets: torch.Tensor, _temperature: float) -> torch.Tensor:
    logits = linear_cross_entropy._scale_and_cap(head.module(hidden), head.scale, head.cap).bfloat16()
    return functional.cross_entropy(logits, targets, reduction="none").float()


@pytest.mark.parametrize("broken", [_no_scale, _no_gradient, _half_softmax])
def test_a_broken_log_probability_is_caught(
    broken: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law above fails without the head's scale, without a gradient to the model, and with a softmax in bf16."""
    monkeypatch.setattr(linear_cross_entropy, "_chunk_nll", broken)
    value, gradient = differences_of_log_probs()
    assert value > 1e-6 or gradient > 1e-5
