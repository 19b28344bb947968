"""The objective of a training, and the next-token loss of a micro-batch, padded or flat.

The loss of a window is a sum over all its examples, on all devices, divided once by the window's number of trained
tokens: never a mean of means, which would depend on how the window is cut into micro-batches.

A padded micro-batch goes through the library's own forward. A flat one is one row of documents for the library's own
decoder, without padding; only the hidden states from which a trained token is predicted go on to the head, so its
logits are never computed for untrained tokens. Training, evaluation and the memory plan all run these forwards.

Shapes: B rows of a micro-batch, T positions, V vocabulary; of a flat row S documents, N trained tokens, E width of the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmtune.common.memory import copy_to
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.data.dataset.packing import Indices
from llmtune.engine.devices import Devices
from llmtune.kernels.attention import segment_mask
from llmtune.kernels.linear_cross_entropy import Head, head_nll_sum, sequence_log_probs, token_nll, trained_rows
from llmtune.models.parameters import base_model_of

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "IGNORED",
    "WHOLE_ROW",
    "FlatInputs",
    "Objective",
    "RowPart",
    "WindowRows",
    "flat_forward",
    "flat_inputs",
    "flat_log_probs",
    "flat_nll_sum",
    "flat_token_log_probs",
    "next_token_objective",
    "plain_log_probs",
    "plain_nll_sum",
    "plain_token_log_probs",
    "weighted_nll_sum",
]

IGNORED = -100
"""Target of a position that is not trained; `cross_entropy` gives it loss 0 and gradient 0, exactly."""


class WindowRows(Protocol):
    """What an objective may know of a window before its first micro-batch; all held-out rows are one window."""

    @property
    def indices(self) -> Indices:
        """Numbers of this process's examples, int64."""
        ...

    @property
    def all_indices(self) -> Indices:
        """Those of all processes, in the order of the window, int64."""
        ...


@dataclass(frozen=True)
class Objective:
    """A loss as the loop sees it: a sum over a micro-batch, and a name and unit for its mean over a window."""

    loss_sum: Callable[[MicroBatch], Tensor]
    """Sum over the examples of a micro-batch, 0-d float32, joined to the graph unless under `no_grad`."""
    name: str
    """The metrics `train_NAME` and `eval_NAME` are means over a window and over the held-out rows."""
    unit: str
    """Unit of those means."""
    begin_window: Callable[[WindowRows, Devices], float] | None = None
    """Called before a window's first micro-batch, in every process; gives what its loss is divided by, counted over all
    devices. None: its number of trained tokens.
    """
    measure: Callable[[Devices], dict[str, float]] | None = None
    """Called after a window's last micro-batch, in every process: further metrics of the window, over all devices."""
    code: str | None = None
    """The sha256 of the user's own function that computes it."""


def next_token_objective(nll_sum: Callable[[MicroBatch], Tensor]) -> Objective:
    """Make the objective of supervised fine-tuning: the weighted negative log-likelihood of trained tokens.

    nll_sum = sum_n w_n (-log p_n): that sum over a micro-batch, in nats, float32 of shape [].
    """
    return Objective(nll_sum, "mean_nll", "nats per trained token")


def plain_nll_sum(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Sum the weighted negative log-likelihoods of a micro-batch by the library's own forward: nats, float32 [].

    nll_sum = sum_n weights[n] * -log softmax(logits)[n]. The batch is moved to the model's device. A flat batch needs a
    model whose attention keeps documents apart by their restarting `position_ids` (transformers >= 5 does so when no
    mask is given).
    """
    batch = batch.to(next(model.parameters()).device)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    )
    return weighted_nll_sum(output.logits, batch.input_ids, batch.weights)


def plain_log_probs(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Log-probability of the trained tokens of each example by the library's own forward: nats, float32 [S].

    log p = sum over t >= 1 of weights[t] * log softmax(logits[t - 1])[ids[t]], the softmax in float32. `batch` is
    padded, one example a row; it is moved to the model's device.
    """
    batch = batch.to(next(model.parameters()).device)
    return (_plain_log_probs(model, batch) * batch.weights[:, 1:]).sum(dim=1)


def plain_token_log_probs(model: nn.Module, batch: MicroBatch, temperature: float) -> Tensor:
    """Log-probability of each trained token by the library's own forward: nats, float32 [N], example after example.

    log p_n = log softmax(logits[t - 1] / temperature)[ids[t]] of the n-th position t with a weight, in float32.
    """
    batch = batch.to(next(model.parameters()).device)
    return _plain_log_probs(model, batch, temperature)[batch.weights[:, 1:] != 0]


def _plain_log_probs(model: nn.Module, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token but the first of a row, 0 where it is not trained: nats, float32 [B, T - 1]."""
    assert batch.segments is None, "the plain forward tells examples apart by their rows"
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    weights_BT = batch.weights[:, 1:]
    targets = batch.input_ids[:, 1:].masked_fill(weights_BT == 0, IGNORED)
    nats = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float() / temperature, targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -nats.view_as(weights_BT)


def weighted_nll_sum(logits_BTV: Tensor, ids_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Sum the weighted negative log-likelihoods of tokens, in nats, float32 [].

    nll_sum = sum_b sum_{t >= 1} weights[b, t] * -log softmax(logits[b, t - 1])[ids[b, t]]

    Positions of weight 0 are left out, so whatever stands there (NaN too) adds nothing; without any trained token the
    sum is 0, with zero gradients.

    >>> uniform = torch.zeros(1, 3, 4)
    >>> weights = torch.tensor([[0.0, 1.0, 0.5]])
    >>> round(weighted_nll_sum(uniform, torch.tensor([[0, 1, 2]]), weights).item(), 6)  # 1.5 x log 4
    2.079442
    """
    # Masked, and not only multiplied by 0, because 0 x NaN is NaN in the sum and in the gradient.
    weights = weights_BT[:, 1:].flatten()
    targets = ids_BT[:, 1:].flatten().masked_fill(weights == 0, IGNORED)
    logits = logits_BTV[:, :-1].flatten(0, 1).float()
    nats = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return torch.sum(nats * weights)


class FlatInputs(NamedTuple):
    """A flat micro-batch on its device, as decoder and loss take it."""

    input_ids: Tensor
    """int64 [1, T]; T / count where this process computes a part of the row."""
    position_ids: Tensor
    """int64 [1, T], from 0 in each document."""
    mask: Tensor
    """Document boundaries as an attention mask, int32 [1, 1, longest, S+1] (see `segment_mask`)."""
    rows: Tensor
    """int64 [N]: positions from which a trained token is predicted, one before it; counted from the part's first."""
    targets: Tensor
    """int64 [N]: the trained tokens."""
    weights: Tensor
    """float32 [N]: their loss weights."""


@dataclass(frozen=True)
class RowPart:
    """The part of each flat row that this process computes: the whole, unless several share its rows."""

    number: int = 0
    count: int = 1


WHOLE_ROW = RowPart()


def flat_inputs(batch: MicroBatch, device: torch.device, part: RowPart = WHOLE_ROW) -> FlatInputs:
    """Move a flat micro-batch, or a part of its positions, to `device`; the document boundaries are those of the row.

    A part has ceil(T / count) positions. What the last one lacks is filled up with a document of its own, of weight 0.
    """
    assert batch.segments is not None, "the flat engine needs segments"
    if part.count > 1:
        return _part_inputs(batch, batch.segments, device, part)
    # Both are counted on the host before the copy: on a CUDA device each would wait for the stream.
    longest = int(batch.segments.diff().max())
    rows_N = copy_to(trained_rows(batch.weights), device)
    mask = segment_mask(batch.segments, longest, device)
    batch = batch.to(device)
    next_N = rows_N + 1
    return FlatInputs(
        batch.input_ids, batch.position_ids, mask, rows_N, batch.input_ids[0, next_N], batch.weights[0, next_N]
    )


def _part_inputs(batch: MicroBatch, segments: Tensor, device: torch.device, part: RowPart) -> FlatInputs:
    tokens = batch.input_ids.shape[1]
    length = -(-tokens // part.count)
    begin, padding = part.number * length, part.count * length - tokens
    if padding:
        segments = torch.cat([segments, segments[-1:] + padding])

    def own(values_1T: Tensor) -> Tensor:
        return copy_to(functional.pad(values_1T, (0, padding))[:, begin : begin + length].contiguous(), device)

    rows_N = trained_rows(batch.weights)
    rows_N = rows_N[(rows_N >= begin) & (rows_N < begin + length)]
    # Read from the whole row: the token after the last position of this part lies in the next one.
    targets_N, weights_N = batch.input_ids[0, rows_N + 1], batch.weights[0, rows_N + 1]
    return FlatInputs(
        own(batch.input_ids),
        own(batch.position_ids),
        segment_mask(segments, int(segments.diff().max()), device),
        copy_to(rows_N - begin, device),
        copy_to(targets_N, device),
        copy_to(weights_N, device),
    )


def flat_forward(model: PreTrainedModel | PeftModel, inputs: FlatInputs) -> Tensor:
    """Return the hidden states from which trained tokens are predicted, [N, E]: hidden = decoder(ids)[rows].

    `model` (bare or inside peft's wrapper) must have attention by segments, so that documents cannot see each other
    (promise N5).
    """
    decoder: nn.Module = base_model_of(model).get_decoder()
    hidden = decoder(
        input_ids=inputs.input_ids, position_ids=inputs.position_ids, attention_mask=inputs.mask, use_cache=False
    ).last_hidden_state
    # Not `hidden[0, rows]`, whose backward pass copies the whole row once more.
    trained_NE: Tensor = hidden.squeeze(0)[inputs.rows]
    return trained_NE


def flat_nll_sum(
    model: PreTrainedModel | PeftModel,
    batch: MicroBatch,
    *,
    head: Head,
    device: torch.device,
    part: RowPart = WHOLE_ROW,
) -> Tensor:
    """Sum of weighted negative log-likelihoods of one flat micro-batch, or of a part of it: nats, float32 [].

    nll_sum = sum_n weights[n] * -log softmax(head(hidden[n]))[targets[n]]
    """
    inputs = flat_inputs(batch, device, part)
    return head_nll_sum(head, flat_forward(model, inputs), inputs.targets, inputs.weights)


def flat_log_probs(
    model: PreTrainedModel | PeftModel, batch: MicroBatch, *, head: Head, device: torch.device
) -> Tensor:
    """Log-probability of the trained tokens of each document of a flat micro-batch: nats, float32 [S].

    log p = sum over the document's rows n of weights[n] * log softmax(head(hidden[n]))[targets[n]]
    """
    inputs = flat_inputs(batch, device)
    rows_of_sequence_S = copy_to(batch.trained_tokens_per_example, device)
    return sequence_log_probs(head, flat_forward(model, inputs), inputs.targets, inputs.weights, rows_of_sequence_S)


def flat_token_log_probs(
    model: PreTrainedModel | PeftModel, batch: MicroBatch, temperature: float, *, head: Head, device: torch.device
) -> Tensor:
    """Log-probability of each trained token of a flat micro-batch: nats, float32 [N], document after document.

    log p_n = log softmax(head(hidden[n]) / temperature)[targets[n]]
    """
    inputs = flat_inputs(batch, device)
    hidden_NE = flat_forward(model, inputs)
    if hidden_NE.shape[0] == 0:  # joined to the graph, so that a backward pass gives zeros and not an error
        return hidden_NE.float().sum(dim=1)
    return -token_nll(head, hidden_NE, inputs.targets, temperature=temperature)
