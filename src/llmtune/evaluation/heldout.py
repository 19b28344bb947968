"""Held-out loss: what the model would pay, in nats, for rows it was never trained on.

With the sum of weighted negative log-likelihoods L (nats), the sum of weights W and the weighted bytes B of the trained
tokens' text:

    eval_mean_nll       L / W             nats per trained token, over all held-out rows; never a mean of means
    eval_perplexity     exp(L / W)
    eval_bits_per_byte  L / (ln 2 * B)    the same whatever the tokenizer: what it costs to send one byte of the text

B counts the bytes of text only. A control token (end of turn) costs nats and brings no bytes, so an answer's end is
part of its price.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.data.example import ExampleSet
from llmtune.errors import DataError
from llmtune.evaluation.eval_mode import eval_mode

__all__ = ["evaluate", "token_bytes", "trained_bytes"]


def evaluate(
    nll_sum: Callable[[MicroBatch], Tensor],
    batches: Iterable[MicroBatch],
    *,
    model: nn.Module,
    total_bytes: float | None = None,
    sum_over_devices: Callable[[float], float] = float,
) -> dict[str, float]:
    """Return the evaluation metrics over `batches`, and leave the model, its gradients and all random states as they
    were.

    nll_sum: sum of weighted negative log-likelihoods of one micro-batch, nats, shape []. total_bytes: weighted bytes of
    the trained tokens' text over *all* devices (`trained_bytes`); without it there is no bits per byte.
    sum_over_devices: adds a number over all processes, when each of them evaluates its share.

    Raises DataError when no held-out row has a trained token.
    """
    nats: Tensor | float = 0.0
    weight = 0.0
    with eval_mode(model):
        for batch in batches:
            # In float64 and on the device: reading the number here would wait for the device at every batch.
            nats = nats + nll_sum(batch).detach().to(torch.float64)
            weight += batch.loss_weight
    total_nats, total_weight = sum_over_devices(float(nats)), sum_over_devices(weight)
    if total_weight == 0:
        raise DataError(
            "the held-out rows have no trained token",
            where="data.eval / data.test_size",
            fix="see `llmtune data preview`",
        )
    mean = total_nats / total_weight
    metrics = {"eval_mean_nll": mean, "eval_perplexity": _exp(mean)}
    if total_bytes:
        metrics["eval_bits_per_byte"] = total_nats / (math.log(2) * total_bytes)
    return metrics | {"eval_num_loss_tokens": total_weight}


def trained_bytes(examples: ExampleSet, tokenizer: Any) -> float:
    """Return the weighted bytes of text of all trained tokens: the sum of `weights[i] * bytes(input_ids[i])`.

    Counted once for each set of held-out rows. Raises nothing; a control token has no bytes.
    """
    bytes_V = token_bytes(tokenizer)
    total = 0.0
    for index in range(len(examples)):
        example = examples[index]
        total += float(np.dot(example.weights.astype(np.float64), bytes_V[example.input_ids].astype(np.float64)))
    return total


def token_bytes(tokenizer: Any) -> npt.NDArray[np.int64]:
    """Return how many bytes of UTF-8 text each token id stands for, int64 [V].

    0 for control tokens and ids that are no token.

    Byte-level tokenizers spell a byte as one character, sentencepiece ones a space as U+2581 and a lone byte as
    `<0x0A>`.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    count = _piece_bytes_of(tokenizer)
    for piece, index in vocabulary.items():
        counts[index] = count(piece)
    for index, added in tokenizer.added_tokens_decoder.items():
        counts[index] = 0 if added.special else len(added.content.encode())
    counts[list(tokenizer.all_special_ids)] = 0
    return counts


def _piece_bytes_of(tokenizer: Any) -> Callable[[str], int]:
    decoder = (
        json.loads(tokenizer.backend_tokenizer.decoder.__getstate__()) if tokenizer.backend_tokenizer.decoder else {}
    )
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    return len if "ByteLevel" in kinds else _sentencepiece_bytes


def _sentencepiece_bytes(piece: str) -> int:
    """Return the bytes of a sentencepiece piece.

    >>> _sentencepiece_bytes("\u2581caf\u00e9"), _sentencepiece_bytes("<0x0A>")
    (6, 1)
    """
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("\u2581", " ").encode("utf-8", "surrogatepass"))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
