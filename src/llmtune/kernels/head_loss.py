"""The loss from hidden states: only trained rows, in chunks, without ever holding the logits of a whole micro-batch.

For a vocabulary of 50,000 the logits of 2,048 tokens are 400 MB in float32, more than everything else of a small
model's step; here one chunk of rows is alive at a time, its gradient is computed while its probabilities are at hand,
and what is kept is the gradient of the hidden states.

Shapes: N trained rows, E width of the model, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmtune.kernels.chunks import SelectChunks, accumulate_float32, every_chunk

__all__ = ["Head", "find_head", "head_nll_sum", "sequence_log_probs", "trained_rows"]

CHUNK_ROWS = 256
"""Rows of a chunk with a frozen head: fewer read the head too often, more gain nothing."""

SLICE_NUMBERS = 3 << 19
"""Logits of a chunk that are in float32 at a time: they stay in the processor's cache, so a chunk never exists in
float32.
"""

TRAINED_CHUNK_ROWS = 1024
"""Rows of a chunk when the head is trained: each chunk also updates a gradient as large as the head."""


@dataclass(frozen=True)
class Head:
    """The output head of a model.

    Its logits are multiplied by `scale`, then bent to `cap * tanh(logits / cap)`.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None


def find_head(model: Any) -> Head | None:
    """Read a transformers model's head and the rules its config names for logits; None when it has no output head."""
    module = model.get_output_embeddings()
    if module is None:
        return None
    text = model.config.get_text_config()
    scale, cap = 1.0, None
    for key, rule in LOGIT_RULES.items():
        value = getattr(text, key, None)
        if value is not None:
            factor, cap_value = rule(float(value))
            scale, cap = scale * factor, cap_value if cap_value is not None else cap
    return Head(module, scale, cap)


def trained_rows(weights: Tensor) -> Tensor:
    """Return int64 [N]: the places in a flat row from which a trained token is predicted (one before it).

    weights: float32 [1, T].
    """
    return weights[0, 1:].nonzero().squeeze(1)


def head_nll_sum(
    head: Head,
    hidden_NE: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    device_type: str | None = None,
    select: SelectChunks = every_chunk,
) -> Tensor:
    """Sum of weighted negative log-likelihoods, in nats, of `targets_N` predicted from `hidden_NE`.

    hidden_NE: [N, E]; targets_N: int64 [N]; weights_N: float32 [N]. device_type: whose way is gone, theirs when not
    given (the stand-ins of a plan are nowhere). Returns a 0-d float32 tensor; 0 for no rows, still joined to the graph.
    Logits are computed in the type of the hidden states (or autocast's), everything after them in float32.
    """
    if hidden_NE.shape[0] == 0:
        return hidden_NE.float().sum()
    module = head.module
    if type(module) is not nn.Linear:
        return _checkpointed_sum(head, hidden_NE, targets_N, weights_N, select)
    kind = hidden_NE.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NE.dtype
    with torch.autocast(kind, enabled=False):
        sliced = (device_type or kind) == "cpu"
        return _HeadLoss.apply(
            hidden_NE.to(dtype), module.weight, module.bias, targets_N, weights_N, head.scale, head.cap, sliced, select
        )


def sequence_log_probs(
    head: Head, hidden_NE: Tensor, targets_N: Tensor, weights_N: Tensor, rows_of_sequence_S: Tensor
) -> Tensor:
    """Log-probability of each sequence's trained tokens, log p = sum_n w_n log softmax(logits_n)[target_n]; nats [S].

    The term that preference losses compare (DPO, arXiv:2305.18290). It is differentiable by any function of it, because
    each chunk's logits are computed again in the backward pass; `head_nll_sum` need not, since its loss is linear.

    hidden_NE: [N, E], the rows of one sequence after the other; targets_N: int64 [N]; weights_N: float32 [N].
    rows_of_sequence_S: int64 [S] on the same device, rows of each sequence, sum N; one without rows has 0. Returns
    float32 [S]; the softmax is in float32.
    """
    chunks = range(0, hidden_NE.shape[0], CHUNK_ROWS)
    parts = [
        checkpoint(_chunk_nll, head, hidden_NE[rows], targets_N[rows], use_reentrant=False)
        for rows in (slice(start, start + CHUNK_ROWS) for start in chunks)
    ]
    if not parts:  # still joined to the graph, so that a backward pass gives zeros and not an error
        return hidden_NE.float().sum() + weights_N.new_zeros(len(rows_of_sequence_S))
    log_probs_N = -torch.cat(parts) * weights_N
    # Not `index_add`: its order of sums is another in each run on a CUDA device, and a resumed run repeats every bit.
    log_probs_S: Tensor = torch.segment_reduce(log_probs_N, "sum", lengths=rows_of_sequence_S)
    return log_probs_S


def _chunk_nll(head: Head, hidden_CE: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = _bend(head.module(hidden_CE).float(), head.scale, head.cap)
    return functional.cross_entropy(logits_CV, targets_C, reduction="none")


def _bend(logits: Tensor, head_scale: float, cap: float | None) -> Tensor:
    if head_scale != 1.0:
        logits = logits * head_scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _checkpointed_sum(
    head: Head, hidden_NE: Tensor, targets_N: Tensor, weights_N: Tensor, select: SelectChunks
) -> Tensor:
    """The loss of any head (with adapters, quantized, wrapped).

    It is called on chunks of rows, and again in the backward pass.
    """

    def chunk_sum(hidden_CE: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
        return (_chunk_nll(head, hidden_CE, targets_C) * weights_C).sum()

    total = hidden_NE.new_zeros((), dtype=torch.float32)
    for start in select(range(0, hidden_NE.shape[0], TRAINED_CHUNK_ROWS)):
        rows = slice(start, start + TRAINED_CHUNK_ROWS)
        total = total + checkpoint(chunk_sum, hidden_NE[rows], targets_N[rows], weights_N[rows], use_reentrant=False)
    return total


def _nll(
    logits_CV: Tensor, targets_C1: Tensor, scale: float, cap: float | None, *, sliced: bool, with_gradient: bool
) -> Tensor:
    """Return the negative log-likelihoods of a chunk's rows, float32 [C].

    On request overwrite the logits with their gradient.

    sliced: a few rows at a time, as a processor's cache likes it.
    """
    rows, vocabulary = logits_CV.shape
    step = max(1, SLICE_NUMBERS // vocabulary) if sliced else rows
    slices = [slice(start, start + step) for start in range(0, rows, step)]
    return torch.cat([_nll_of_slice(logits_CV[part], targets_C1[part], scale, cap, with_gradient) for part in slices])


def _nll_of_slice(
    logits_SV: Tensor, targets_S1: Tensor, scale: float, cap: float | None, with_gradient: bool
) -> Tensor:
    """Negative log-likelihoods of a few rows, in float32 throughout.

    Only the gradient (without the factor `scale`) is rounded.
    """
    values_SV = logits_SV.float()
    bent_SV = None
    if scale != 1.0:
        values_SV = values_SV * scale
    if cap is not None:
        bent_SV = torch.tanh(values_SV / cap)
        values_SV = bent_SV * cap
    picked_S = values_SV.gather(1, targets_S1).squeeze(1)
    highest_S = values_SV.amax(dim=1)
    probabilities_SV = torch.softmax(values_SV, dim=1)
    # the largest probability is 1 / sum(exp(logit - largest logit)): this saves a pass of exponentials
    nll_S = highest_S - probabilities_SV.amax(dim=1).log() - picked_S
    if with_gradient:
        grad_SV = probabilities_SV.scatter_add_(1, targets_S1, probabilities_SV.new_full(targets_S1.shape, -1.0))
        if bent_SV is not None:
            grad_SV.mul_(1 - bent_SV.square_())
        logits_SV.copy_(grad_SV)
    return nll_S


class _HeadLoss(torch.autograd.Function):
    """Loss of a linear head; gradients are made chunk by chunk in the forward pass and scaled in the backward one.

    All is computed in the type of the hidden states. The head's own gradients are summed in float32 and handed over in
    its type, which is the masters' where it is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor,
        scale: float,
        cap: float | None,
        sliced: bool,
        select: SelectChunks,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = hidden_NE.dtype
        rounded_VE = weight_VE.to(dtype)
        rounded_V = None if bias_V is None else bias_V.to(dtype)
        grad_hidden = torch.empty_like(hidden_NE) if wants_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        chunk = TRAINED_CHUNK_ROWS if wants_weight else CHUNK_ROWS
        sums = []
        for start in select(range(0, hidden_NE.shape[0], chunk)):
            rows = slice(start, start + chunk)
            hidden_CE, targets_C1, weights_C = hidden_NE[rows], targets_N[rows].unsqueeze(1), weights_N[rows]
            logits_CV = functional.linear(hidden_CE, rounded_VE, rounded_V)
            nll_C = _nll(logits_CV, targets_C1, scale, cap, sliced=sliced, with_gradient=any(ctx.needs_input_grad))
            sums.append((nll_C * weights_C).sum())
            grad_CV = logits_CV  # overwritten where a gradient is wanted
            factor_C1 = (weights_C * scale).unsqueeze(1)  # put on the narrow side of each product, not on the chunk
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_CV @ rounded_VE) * factor_C1
            if wants_weight:
                grad_weight = accumulate_float32(grad_weight, grad_CV.t() @ (hidden_CE * factor_C1).to(dtype))
            if wants_bias:
                grad_bias = accumulate_float32(grad_bias, (grad_CV.float() * factor_C1).sum(dim=0))
        own = [None if grad is None else grad.to(weight_VE.dtype) for grad in (grad_weight, grad_bias)]
        ctx.save_for_backward(grad_hidden, *own)
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # in place, since the head's is large: autograd refuses a second backward pass then, and does not give a wrong
        # one
        scaled = [None if grad is None else grad.mul_(grad_output.to(grad.dtype)) for grad in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None, None)


LOGIT_RULES = {
    "final_logit_softcapping": lambda value: (1.0, value),
    "logits_scaling": lambda value: (1.0 / value, None),
    "logit_scale": lambda value: (value, None),
}
"""Config keys of models that change logits after the head: (factor, cap).

Rules not listed here show up in the engine's probe.
"""
