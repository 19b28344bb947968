"""Output head and cross entropy in one: only trained rows, in chunks, never the logits of a whole micro-batch.

The method is that of Liger's fused linear cross entropy (arXiv:2410.10989). For a vocabulary of 50,000 the logits of
2,048 tokens are 400 MB in float32, more than everything else of a small model's step. Here one chunk of rows is alive
at a time, its gradient is computed while its probabilities are at hand, and only the gradient of the hidden states is
saved.

Shapes: N trained rows, E width of the model, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmtune.kernels import liger
from llmtune.kernels.autograd import Context
from llmtune.kernels.chunks import SelectChunks, accumulate_float32, every_chunk

__all__ = ["Head", "find_head", "head_nll_sum", "sequence_log_probs", "token_nll", "trained_rows"]

CHUNK_ROWS = 256
"""Rows of a chunk with a frozen head: fewer read the head's weight too often, more gain nothing."""

SLICE_NUMBERS = 3 << 19
"""Logits that are widened to float32 at a time on a CPU (6 MB): they stay in its cache, where a whole chunk's would
not."""

TRAINED_CHUNK_ROWS = 1024
"""Rows of a chunk when the head is trained: each chunk also updates a gradient as large as the head."""

IN_PLACE_BYTES, TRAINED_IN_PLACE_BYTES = 1 << 28, 1 << 30
"""Logits of a chunk where a kernel writes their gradient over them. Without it a chunk of the rows above makes several
tensors of float32 beside its logits, and takes more memory than these.
"""


@dataclass(frozen=True)
class Head:
    """The output head of a model: logits = cap * tanh(scale * module(hidden) / cap)."""

    module: nn.Module
    scale: float = 1.0
    """Factor of the logits."""
    cap: float | None = None
    """Bound of the logits after that (Gemma 2, arXiv:2408.00118); None for no bound."""
    in_place: bool = False
    """Loss and gradient by Liger's kernel, which writes the gradient over the logits."""

    def rows_of_chunk(self, vocabulary: int, entry_bytes: int, *, is_trained: bool) -> int:
        """Rows whose logits are alive at a time, of so many bytes an entry; is_trained: the head has a gradient.

        >>> Head(nn.Identity(), in_place=True).rows_of_chunk(128256, 2, is_trained=False)
        1024
        """
        if not self.in_place:
            return TRAINED_CHUNK_ROWS if is_trained else CHUNK_ROWS
        rows = (TRAINED_IN_PLACE_BYTES if is_trained else IN_PLACE_BYTES) // (vocabulary * entry_bytes)
        return max(CHUNK_ROWS, rows - rows % CHUNK_ROWS)


def find_head(model: PreTrainedModel, libraries: Collection[str] = ()) -> Head | None:
    """Read a transformers model's head and the rules its config names for logits; None when it has no output head.

    libraries: whose kernels it may use (see `patch_model`).
    """
    module = model.get_output_embeddings()
    if module is None:
        return None
    text = model.config.get_text_config()
    scale, cap = 1.0, None
    for key, rule in LOGIT_RULES.items():
        value = getattr(text, key, None)
        if value is not None:
            factor, bound = rule(float(value))
            # A config may name a factor and a bound.
            scale, cap = scale * factor, cap if bound is None else bound
    return Head(module, scale, cap, liger.LIGER in libraries and type(module) is nn.Linear)


def trained_rows(weights: Tensor) -> Tensor:
    """Return int64 [N]: the positions in a flat row from which a trained token is predicted (one before it).

    rows = {t - 1 : weights[0, t] != 0}. weights: float32 [1, T].
    """
    # A document's first token has weight 0, so no position predicts a token of the next document.
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
    """Sum of weighted negative log-likelihoods of `targets_N` predicted from `hidden_NE`, in nats, float32 [].

    nll_sum = sum_n w_n (log sum_v exp(logits_nv) - logits_n[target_n])

    hidden_NE: [N, E]; targets_N: int64 [N]; weights_N: float32 [N]. device_type: the device whose code runs, that of
    the tensors when None (a plan's fake tensors are all of the CPU). select: the chunks that run. Without rows it is 0,
    joined to the graph. Logits are computed in the type of the hidden states (or autocast's), the rest in float32.
    """
    module = head.module
    if hidden_NE.shape[0] == 0:
        # Joined to the head too: processes that sum its gradient wait for that of each of them, zeros here.
        if type(module) is nn.Linear:  # read as below, because weights in parts are gathered in one order
            joined = [module.weight[:1], *([] if module.bias is None else [module.bias[:1]])]
        else:
            joined = [module(hidden_NE.new_zeros(1, hidden_NE.shape[1]))]
        return hidden_NE.float().sum() + 0.0 * sum(part.float().sum() for part in joined)
    if type(module) is not nn.Linear:  # exactly: a subclass may compute something else
        return _checkpointed_sum(head, hidden_NE, targets_N, weights_N, select)
    own_type = hidden_NE.device.type
    dtype = torch.get_autocast_dtype(own_type) if torch.is_autocast_enabled(own_type) else hidden_NE.dtype
    with torch.autocast(own_type, enabled=False):
        sliced = (device_type or own_type) == "cpu"
        return _LinearCrossEntropy.apply(
            hidden_NE.to(dtype), module.weight, module.bias, targets_N, weights_N, head, sliced, select
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
    if hidden_NE.shape[0] == 0:  # joined to the graph, so that a backward pass gives zeros and not an error
        return hidden_NE.float().sum() + weights_N.new_zeros(len(rows_of_sequence_S))
    log_probs_N = -token_nll(head, hidden_NE, targets_N) * weights_N
    # Not `index_add`: its order of sums is another in each run on a CUDA device, and a resumed run repeats every bit.
    log_probs_S: Tensor = torch.segment_reduce(log_probs_N, "sum", lengths=rows_of_sequence_S)
    return log_probs_S


def token_nll(head: Head, hidden_NE: Tensor, targets_N: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Negative log-likelihood of each target, nats, float32 [N], at least one; logits of one chunk are alive at a time.

    nll_n = -log softmax(logits_n / temperature)[target_n]. All logits at once would be the largest tensor of a step
    (arXiv:2411.09009).

    hidden_NE: [N, E]; targets_N: int64 [N].
    """
    chunks = range(0, hidden_NE.shape[0], CHUNK_ROWS)
    parts = [
        checkpoint(_chunk_nll, head, hidden_NE[rows], targets_N[rows], temperature, use_reentrant=False)
        for rows in (slice(start, start + CHUNK_ROWS) for start in chunks)
    ]
    return torch.cat(parts)


def _chunk_nll(head: Head, hidden_CE: Tensor, targets_C: Tensor, temperature: float = 1.0) -> Tensor:
    logits_CV = _scale_and_cap(head.module(hidden_CE).float(), head.scale, head.cap)
    if temperature != 1.0:
        logits_CV = logits_CV / temperature
    return functional.cross_entropy(logits_CV, targets_C, reduction="none")


def _scale_and_cap(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _checkpointed_sum(
    head: Head, hidden_NE: Tensor, targets_N: Tensor, weights_N: Tensor, select: SelectChunks
) -> Tensor:
    """The same sum for any head (with adapters, quantized, wrapped), called chunk by chunk and again in backward.

    Its arithmetic is unknown here, so autograd differentiates it; checkpoints keep one chunk's logits alive at a time.
    """

    def chunk_sum(hidden_CE: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
        return (_chunk_nll(head, hidden_CE, targets_C) * weights_C).sum()

    total = hidden_NE.new_zeros((), dtype=torch.float32)
    for start in select(range(0, hidden_NE.shape[0], TRAINED_CHUNK_ROWS)):
        rows = slice(start, start + TRAINED_CHUNK_ROWS)
        total = total + checkpoint(chunk_sum, hidden_NE[rows], targets_N[rows], weights_N[rows], use_reentrant=False)
    return total


def _nll(logits_CV: Tensor, targets_C1: Tensor, head: Head, *, sliced: bool, with_gradient: bool) -> Tensor:
    """Return the negative log-likelihoods of a chunk's rows, float32 [C].

    sliced: a few rows at a time, so that float32 values stay in a CPU's cache. with_gradient: overwrite the logits with
    their gradient, but for the factor `scale`.
    """
    scale, cap = head.scale, head.cap
    if head.in_place:
        scaled_CV = logits_CV if scale == 1.0 else logits_CV.mul_(scale)
        nll_C: Tensor = torch.ops.llmtune.cross_entropy_(scaled_CV, targets_C1.squeeze(1), cap, with_gradient)
        return nll_C
    rows, vocabulary = logits_CV.shape
    step = max(1, SLICE_NUMBERS // vocabulary) if sliced else rows
    slices = [slice(start, start + step) for start in range(0, rows, step)]
    return torch.cat([_nll_of_slice(logits_CV[part], targets_C1[part], scale, cap, with_gradient) for part in slices])


def _nll_of_slice(
    logits_SV: Tensor, targets_S1: Tensor, scale: float, cap: float | None, with_gradient: bool
) -> Tensor:
    """`_nll` of S rows, in float32; only the gradient written into the logits is rounded to their type."""
    values_SV = logits_SV.float()
    tanh_SV = None
    if scale != 1.0:
        values_SV = values_SV * scale
    if cap is not None:
        tanh_SV = torch.tanh(values_SV / cap)
        values_SV = tanh_SV * cap
    target_logit_S = values_SV.gather(1, targets_S1).squeeze(1)
    largest_logit_S = values_SV.amax(dim=1)
    probabilities_SV = torch.softmax(values_SV, dim=1)
    # log sum exp = largest logit - log largest probability, because that probability is exp(0) / sum exp(logit -
    # largest logit): this saves a second pass of exponentials over the vocabulary.
    nll_S = largest_logit_S - probabilities_SV.amax(dim=1).log() - target_logit_S
    if with_gradient:
        # d nll / d logits = probabilities - one-hot target, written over the probabilities
        grad_SV = probabilities_SV.scatter_add_(1, targets_S1, probabilities_SV.new_full(targets_S1.shape, -1.0))
        if tanh_SV is not None:
            grad_SV.mul_(1 - tanh_SV.square_())
        logits_SV.copy_(grad_SV)
    return nll_S


class _LinearCrossEntropy(torch.autograd.Function):
    """`head_nll_sum` of a linear head; gradients are made chunk by chunk in the forward pass, backward scales them.

    That is possible because the sum is linear in the loss of each row: its gradient is known but for one factor. All
    products are in the type of the hidden states. The head's gradients are summed over chunks in float32 and returned
    in the type of its weight.
    """

    @staticmethod
    def forward(
        ctx: Context,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor,
        head: Head,
        sliced: bool,
        select: SelectChunks,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = hidden_NE.dtype
        # Rounded once: inside the loop autocast would round a weight of V x E numbers for every chunk.
        rounded_VE = weight_VE.to(dtype)
        rounded_V = None if bias_V is None else bias_V.to(dtype)
        grad_hidden = torch.empty_like(hidden_NE) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        chunk = head.rows_of_chunk(len(weight_VE), hidden_NE.element_size(), is_trained=needs_weight)
        sums = []
        for start in select(range(0, hidden_NE.shape[0], chunk)):
            rows = slice(start, start + chunk)
            hidden_CE, targets_C1, weights_C = hidden_NE[rows], targets_N[rows].unsqueeze(1), weights_N[rows]
            logits_CV = functional.linear(hidden_CE, rounded_VE, rounded_V)
            nll_C = _nll(logits_CV, targets_C1, head, sliced=sliced, with_gradient=any(ctx.needs_input_grad))
            # On the device: to read it here would wait for every chunk.
            sums.append((nll_C * weights_C).sum())
            grad_CV = logits_CV  # overwritten where a gradient is needed
            # Applied to the operand or result of width E: C x E numbers are multiplied and not C x V.
            factor_C1 = (weights_C * head.scale).unsqueeze(1)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_CV @ rounded_VE) * factor_C1
            if needs_weight:
                grad_weight = accumulate_float32(grad_weight, grad_CV.t() @ (hidden_CE * factor_C1).to(dtype))
            if needs_bias:
                grad_bias = accumulate_float32(grad_bias, (grad_CV.float() * factor_C1).sum(dim=0))
        # Autograd takes no gradient of another type than its tensor's.
        head_grads = [None if grad is None else grad.to(weight_VE.dtype) for grad in (grad_weight, grad_bias)]
        ctx.save_for_backward(grad_hidden, *head_grads)  # type: ignore[arg-type]  # torch saves None as well
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place, because the head's gradient is large. A second backward pass would scale it twice: autograd notices
        # the overwritten tensors and refuses.
        scaled = [None if grad is None else grad.mul_(grad_output.to(grad.dtype)) for grad in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


LOGIT_RULES: dict[str, Callable[[float], tuple[float, float | None]]] = {
    "final_logit_softcapping": lambda value: (1.0, value),  # Gemma 2
    "logits_scaling": lambda value: (1.0 / value, None),  # Granite
    "logit_scale": lambda value: (value, None),  # Cohere
}
"""Config keys of models that change logits after the head: value -> (factor, cap).

A rule that is missing here makes the engine's probe fail, so that such a model gets the plain engine.
"""
