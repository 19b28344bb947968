"""Scores of rows, and the objectives of `reward` and `classification`, sums over a window that are divided once.

The head reads the last token of a row that is not the padding token: in every layout, so that a packed row has the
scores that it has alone, and those that transformers gives it.

Shapes: S examples of a micro-batch, N of a set, T positions, E width of the model, L units of the head, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmtune.common.memory import copy_to
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.data.example import SIDES, ExampleSet
from llmtune.engine.devices import Devices
from llmtune.engine.objective import Objective, WindowRows
from llmtune.kernels.attention import segment_mask
from llmtune.models.parameters import base_model_of, find_score_head

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "ClassificationObjective",
    "JudgedExamples",
    "RewardObjective",
    "Scores",
    "flat_scores",
    "last_tokens",
    "macro_f1",
    "plain_scores",
    "reward_losses",
    "scores_of",
    "scoring_objective",
]

Scores = Callable[[MicroBatch], Tensor]
"""Scores of a micro-batch's examples, float32 [S, L]."""


def last_tokens(batch: MicroBatch, pad_id: int | None) -> Tensor:
    """Position of the token of each example that the head reads, int64 [S], in the row that the example lies in.

    position = max of the t with id_t != pad_id, and the first of the example where there is none, as in transformers.
    """
    ids, segments = batch.input_ids.cpu(), batch.segments
    is_read = torch.ones_like(ids, dtype=torch.bool) if pad_id is None else ids != pad_id
    if segments is None:
        if batch.attention_mask is not None:
            is_read &= batch.attention_mask.cpu()
        return (torch.arange(ids.shape[1]) * is_read).argmax(dim=1)
    starts, ends = segments[:-1].long(), segments[1:].long()
    # The running maximum of read positions, taken at each example's end; a maximum of an earlier example is none.
    latest_T = (torch.arange(ids.shape[1]) * is_read[0]).cummax(dim=0).values
    return torch.maximum(latest_T[ends - 1], starts)


def flat_scores(model: PreTrainedModel | PeftModel, batch: MicroBatch, *, device: torch.device) -> Tensor:
    """Scores of the examples of one flat micro-batch, float32 [S, L]: scores = W h, h of the example's last token.

    The model's attention is by segments, so that documents cannot see each other (promise N5).
    """
    base = base_model_of(model)
    head = find_score_head(base)
    assert head is not None
    assert batch.segments is not None, "the flat engine needs segments"
    rows_S = copy_to(last_tokens(batch, base.config.get_text_config().pad_token_id), device)
    mask = segment_mask(batch.segments, int(batch.segments.diff().max()), device)
    batch = batch.to(device)
    decoder: nn.Module = base.get_decoder()
    hidden = decoder(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return scores_of(head, hidden[0, rows_S])


def plain_scores(model: PreTrainedModel | PeftModel, batch: MicroBatch) -> Tensor:
    """Scores of the examples of one padded micro-batch by the library's own decoder, float32 [S, L].

    scores = W h, with the last hidden state h of the example's last token.
    """
    base = base_model_of(model)
    head, device = find_score_head(base), next(model.parameters()).device
    assert head is not None
    assert batch.segments is None, "the plain forward tells examples apart by their rows"
    rows_S = copy_to(last_tokens(batch, base.config.get_text_config().pad_token_id), device)
    batch = batch.to(device)
    hidden = base.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    return scores_of(head, hidden[torch.arange(len(rows_S), device=device), rows_S])


def scores_of(head: nn.Module, hidden_SE: Tensor) -> Tensor:
    """Scores of hidden states [S, E], float32 [S, L]: scores = hidden W^T.

    Not in autocast's type: the difference of two scores near 10 has 8 bits less than they have.
    """
    # The last one is what is trained, where peft keeps the first weights beside it.
    dtype = list(head.parameters())[-1].dtype
    with torch.autocast(hidden_SE.device.type, enabled=False):
        scores: Tensor = head(hidden_SE.to(dtype))
    return scores.float()


def reward_losses(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Bradley-Terry losses of pairs, in nats, from their scores and margins, [P] each; returns [P].

    loss = -log sigmoid(s_chosen - s_rejected - margin): Bradley and Terry 1952; with a margin Touvron et al. 2023,
    arXiv:2307.09288, equation 2.

    >>> zero = torch.zeros(1)
    >>> round(reward_losses(zero, zero, zero).item(), 6)  # log 2
    0.693147
    """
    return -functional.logsigmoid(chosen - rejected - margin)


def macro_f1(counts_L3: npt.NDArray[np.float64]) -> float:
    """Mean F1 of the labels that occur among the right or the given ones; float64 [L, 3] holds right, given, of rows.

    F1 = 2 right / (given + of rows), with the numbers of rows of each label that got it, that were given it, and that
    have it.

    >>> macro_f1(np.array([[1.0, 1.0, 2.0], [1.0, 2.0, 1.0], [0.0, 0.0, 0.0]]))  # twice 2/3, and a label of no row
    0.6666666666666666
    """
    right_L, given_L, own_L = counts_L3.T
    occurs_L = given_L + own_L > 0
    return float(np.mean(2 * right_L[occurs_L] / (given_L + own_L)[occurs_L])) if occurs_L.any() else 0.0


class RewardObjective:
    """Bradley-Terry over one set of pairs. margins_N: float64, by the number of the example."""

    def __init__(self, examples: ExampleSet, scores: Scores, margins_N: npt.NDArray[np.float64]) -> None:
        self._is_chosen = examples.sides == SIDES.index("chosen")
        self._scores, self._margins_N = scores, torch.from_numpy(margins_N)
        self._count = 0.0
        self._sums: list[Tensor] = []

    def as_objective(self) -> Objective:
        """Give the objective as the loop takes it."""
        return Objective(self.loss_sum, "loss", "per pair", begin_window=self.begin_window, measure=self.measure)

    def begin_window(self, window: WindowRows, devices: Devices) -> float:
        """Count the window's pairs over all devices: the divisor of its loss."""
        (self._count,) = devices.sum(float(self._is_chosen[window.indices].sum()))
        self._sums = []
        return self._count

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Sum of the losses of a micro-batch's pairs, float32 of shape [].

        loss = sum_p -log sigmoid(s_chosen - s_rejected - margin), as in `reward_losses`.
        """
        assert batch.sides == ("chosen", "rejected") * (len(batch.sides) // 2)
        assert batch.indices is not None
        scores_S = self._scores(batch)[:, 0]
        chosen, rejected = scores_S[0::2], scores_S[1::2]
        margin = self._margins_N[torch.from_numpy(batch.indices[0::2])].to(scores_S.device, scores_S.dtype)
        with torch.no_grad():
            sums = [values.double().sum() for values in (chosen, rejected, chosen > rejected)]
            self._sums.append(torch.stack(sums))
        return reward_losses(chosen, rejected, margin).sum()

    def measure(self, devices: Devices) -> dict[str, float]:
        """Means over the window and all devices: the score of each side, their difference, and the part of pairs won.

        A pair is won where its chosen side has the higher score: ties are not.
        """
        zero = torch.zeros(3, dtype=torch.float64, device=devices.device)
        sums = devices.sum_tensor(torch.stack([zero, *self._sums]).sum(dim=0)).tolist()
        self._sums = []
        chosen, rejected, accuracy = (value / (self._count or 1.0) for value in sums)
        return {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "rewards_margin": chosen - rejected,
            "accuracy": accuracy,
            "num_pairs": self._count,
        }


class ClassificationObjective:
    """Cross-entropy of the label of each row of one set. labels_N: the number of each row's label, int64."""

    def __init__(self, scores: Scores, labels_N: npt.NDArray[np.int64], num_labels: int) -> None:
        self._scores, self._labels_N, self._num_labels = scores, torch.from_numpy(labels_N), num_labels
        self._count = 0.0
        self._counts: list[Tensor] = []

    def as_objective(self) -> Objective:
        """Give the objective as the loop takes it."""
        return Objective(self.loss_sum, "loss", "per row", begin_window=self.begin_window, measure=self.measure)

    def begin_window(self, window: WindowRows, devices: Devices) -> float:
        """Count the window's rows over all devices: the divisor of its loss."""
        (self._count,) = devices.sum(float(len(window.indices)))
        self._counts = []
        return self._count

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Sum of the losses of a micro-batch's rows in nats, 0-d float32: loss = -log softmax(scores)[label]."""
        assert batch.indices is not None
        scores_SL = self._scores(batch)
        labels_S = self._labels_N[torch.from_numpy(batch.indices)].to(scores_SL.device)
        with torch.no_grad():
            given_S = scores_SL.argmax(dim=1)
            of_label = [functional.one_hot(found, self._num_labels).double() for found in (given_S, labels_S)]
            right_L = (of_label[0] * of_label[1]).sum(dim=0)
            self._counts.append(torch.stack([right_L, of_label[0].sum(dim=0), of_label[1].sum(dim=0)], dim=1))
        return functional.cross_entropy(scores_SL, labels_S, reduction="sum")

    def measure(self, devices: Devices) -> dict[str, float]:
        """Over the window and all devices: the part of rows that got their label, and the mean F1 of the labels."""
        zero = torch.zeros(self._num_labels, 3, dtype=torch.float64, device=devices.device)
        counts_L3 = devices.sum_tensor(torch.stack([zero, *self._counts]).sum(dim=0)).cpu().numpy()
        self._counts = []
        accuracy = float(counts_L3[:, 0].sum()) / (self._count or 1.0)
        return {"accuracy": accuracy, "macro_f1": macro_f1(counts_L3), "num_rows": self._count}


class JudgedExamples(ExampleSet, Protocol):
    """Examples with what their rows say of them."""

    @property
    def labels(self) -> list[str | None]:
        """The label of each, in order."""
        ...

    @property
    def margins(self) -> npt.NDArray[np.float64]:
        """The margin of each, float64 [N]."""
        ...


def scoring_objective(examples: JudgedExamples, scores: Scores, names: Sequence[str]) -> Objective:
    """Build the objective over one set of examples; `names` are the labels of the head's units.

    With one unit the examples are pairs, else each has one of the labels.
    """
    if len(names) == 1:
        return RewardObjective(examples, scores, examples.margins).as_objective()
    numbers = {name: number for number, name in enumerate(names)}
    labels_N = np.array([numbers[label] for label in examples.labels if label is not None], dtype=np.int64)
    return ClassificationObjective(scores, labels_N, len(names)).as_objective()
