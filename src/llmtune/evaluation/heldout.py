"""Held-out loss: negative log-likelihood, perplexity and bits per byte of rows outside of the training data.

With the sum of weighted negative log-likelihoods L (nats), the sum of weights W and the weighted bytes B of the trained
tokens' text:

    eval_mean_nll       L / W             nats per trained token, over all held-out rows; never a mean of means
    eval_perplexity     exp(L / W)
    eval_bits_per_byte  L / (ln 2 * B)    comparable between tokenizers (Gao et al. 2020, arXiv:2101.00027, section 3.1)

Where held-out rows come from several sources, eval_NAME_mean_nll is L / W of the rows of the source NAME.

B counts the bytes of text only. A control token (end of turn) costs nats and brings no bytes, so an answer's end is
part of its price.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmtune.data.dataset.batches import eval_batches
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.data.dataset.packing import examples_together
from llmtune.data.example import ExampleSet
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine
from llmtune.engine.objective import Objective
from llmtune.engine.precision import Precision
from llmtune.errors import DataError
from llmtune.models.parameters import base_model_of, eval_mode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "evaluate",
    "evaluate_examples",
    "evaluate_objective",
    "row_losses",
    "token_accuracy",
    "token_bytes",
    "trained_bytes",
]


def evaluate_examples(
    model: nn.Module,
    examples: ExampleSet,
    *,
    engine: Engine,
    precision: Precision,
    pad_id: int,
    batch_size: int,
    total_bytes: float,
    devices: Devices | None = None,
    sets: Mapping[str, ExampleSet] | None = None,
) -> dict[str, float]:
    """Return the evaluation metrics over `examples`, in the arithmetic of `precision` (see `evaluate`).

    devices: the processes that share the examples; this one alone when None. sets: the same examples by source; where
    there are several, each is evaluated by itself, also gets a mean of its own, and the sums are added up. Raises
    DataError when no example has a trained token.
    """
    named = sets if sets and len(sets) > 1 else {"": examples}
    sums: dict[str, _Sums] = {}
    for name, own in named.items():
        batches = eval_batches(
            own,
            batch_size=batch_size,
            layout=engine.layout,
            pad_id=pad_id,
            max_group_tokens=engine.max_group_tokens,
            world_size=devices.readers if devices else 1,
            rank=devices.reader if devices else 0,
            equal_counts=engine.equal_counts,
        )
        with precision.autocast():
            sums[name] = _add_up(
                engine.nll_sum,
                batches,
                model=model,
                sum_over_devices=(lambda number: devices.sum(number)[0]) if devices else float,
                count_over_devices=(lambda number: devices.count(number)[0]) if devices else float,
            )
    pooled = _Sums(sum(each.nats for each in sums.values()), sum(each.weight for each in sums.values()))
    own_means = {
        f"eval_{name}_mean_nll": each.nats / each.weight for name, each in sums.items() if each.weight and name
    }
    return _metrics(pooled, total_bytes) | own_means


def row_losses(
    model: nn.Module, examples: ExampleSet, *, engine: Engine, precision: Precision, pad_id: int
) -> npt.NDArray[np.float64]:
    """Return the loss of each example by itself, nats per trained token, float64 [rows]; NaN for one without any.

    loss = sum_t weight_t (-log p_t) / sum_t weight_t
    """
    losses_R = np.full(len(examples), np.nan)
    with eval_mode(model), precision.autocast():
        for batch in eval_batches(examples, batch_size=1, layout=engine.layout, pad_id=pad_id):
            assert batch.indices is not None, "a batch of an example set has their numbers"
            if batch.loss_weight:
                losses_R[batch.indices[0]] = float(engine.nll_sum(batch)) / batch.loss_weight
    return losses_R


def token_accuracy(model: PreTrainedModel | PeftModel, examples: ExampleSet, *, pad_id: int) -> float:
    """Return the share of trained tokens that the model holds for the most likely one, given all that comes before.

    Every trained token counts once, whatever its weight. Raises DataError when no example has a trained token.
    """
    base = base_model_of(model)
    head = base.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    right, count = 0, 0
    with eval_mode(model):
        for batch in eval_batches(examples, batch_size=1, layout="padded", pad_id=pad_id):
            batch = batch.to(next(model.parameters()).device)
            trained_N = batch.weights[0, 1:].nonzero().squeeze(1)
            hidden_TD = base.base_model(input_ids=batch.input_ids, use_cache=False)[0][0]
            # The head on trained tokens alone, in pieces: all logits of a long row are hundreds of megabytes.
            for piece in trained_N.split(HEAD_ROWS):
                guess = head(hidden_TD[piece]).argmax(-1)
                right += int((guess == batch.input_ids[0, piece + 1]).sum())
                count += len(piece)
    if not count:
        raise _no_trained_token()
    return right / count


HEAD_ROWS = 512


class _HeldoutRows(NamedTuple):
    """All held-out rows as one window, of which each process counts a share."""

    indices: npt.NDArray[np.int64]
    all_indices: npt.NDArray[np.int64]


def evaluate_objective(
    model: nn.Module,
    examples: ExampleSet,
    objective: Objective,
    *,
    engine: Engine,
    precision: Precision,
    pad_id: int,
    batch_size: int,
    devices: Devices,
) -> dict[str, float]:
    """Return the metrics of an objective that compares answers, `eval_` before each; nothing of the model changes.

    All examples count as one window: their loss is a sum over all of them, divided once.
    """
    assert objective.begin_window is not None
    assert objective.measure is not None
    together = examples_together(examples)
    batches = eval_batches(
        examples,
        batch_size=batch_size,
        layout=engine.layout,
        pad_id=pad_id,
        max_group_tokens=engine.max_group_tokens,
        world_size=devices.world_size,
        rank=devices.rank,
        together=together,
        equal_counts=engine.equal_counts,
    )
    order = np.arange(len(examples), dtype=np.int64)
    mine = order.reshape(-1, together)[devices.rank :: devices.world_size].reshape(-1)
    with eval_mode(model):
        count = objective.begin_window(_HeldoutRows(mine, order), devices)
        total = torch.zeros((), dtype=torch.float64, device=devices.device)
        with precision.autocast():
            for batch in batches:
                total += objective.loss_sum(batch).detach().double()
        mean = float(devices.sum_tensor(total)) / count
        metrics = {objective.name: mean, **objective.measure(devices)}
    return {f"eval_{name}": value for name, value in metrics.items()}


def evaluate(
    nll_sum: Callable[[MicroBatch], Tensor],
    batches: Iterable[MicroBatch],
    *,
    model: nn.Module,
    total_bytes: float | None = None,
    sum_over_devices: Callable[[float], float] = float,
) -> dict[str, float]:
    """Return the evaluation metrics over `batches`; the model, its gradients and all random states stay as they were.

    nll_sum: sum of weighted negative log-likelihoods of one micro-batch, nats, shape []. total_bytes: weighted bytes of
    the trained tokens' text over *all* devices (`trained_bytes`); without it there is no `eval_bits_per_byte`.
    sum_over_devices: adds a number over all processes, when each of them evaluates its share.

    eval_mean_nll = L / W, eval_perplexity = exp(L / W), eval_bits_per_byte = L / (ln 2 * B); see the top of this file.
    Raises DataError when no held-out row has a trained token.
    """
    sums = _add_up(
        nll_sum, batches, model=model, sum_over_devices=sum_over_devices, count_over_devices=sum_over_devices
    )
    return _metrics(sums, total_bytes)


class _Sums(NamedTuple):
    """L and W of some rows over all processes: nats, and the sum of weights."""

    nats: float
    weight: float


def _add_up(
    nll_sum: Callable[[MicroBatch], Tensor],
    batches: Iterable[MicroBatch],
    *,
    model: nn.Module,
    sum_over_devices: Callable[[float], float],
    count_over_devices: Callable[[float], float],
) -> _Sums:
    """Add up the rows of all processes; those that share a row have a part of its nats each, and all of its weight."""
    nats: Tensor | float = 0.0
    weight = 0.0
    with eval_mode(model):
        for batch in batches:
            # In float64 and on the device: reading the number here would wait for the device at every batch.
            nats = nats + nll_sum(batch).detach().to(torch.float64)
            weight += batch.loss_weight
    return _Sums(sum_over_devices(float(nats)), count_over_devices(weight))


def _metrics(sums: _Sums, total_bytes: float | None) -> dict[str, float]:
    if sums.weight == 0:
        raise _no_trained_token()
    mean = sums.nats / sums.weight
    # One division, after all sums: a mean over batches would weigh short batches too much.
    metrics = {"eval_mean_nll": mean, "eval_perplexity": _exp(mean)}
    if total_bytes:
        metrics["eval_bits_per_byte"] = sums.nats / (math.log(2) * total_bytes)
    return metrics | {"eval_num_loss_tokens": sums.weight}


def _no_trained_token() -> DataError:
    where, fix = "data.eval / data.test_size", "see `llmtune data preview`"
    return DataError("the held-out rows have no trained token", where=where, fix=fix)


def trained_bytes(examples: ExampleSet, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the weighted bytes of text of all trained tokens, B = sum over i of weights[i] * bytes(input_ids[i]).

    A control token has no bytes.
    """
    bytes_V = token_bytes(tokenizer)
    total = 0.0
    for index in range(len(examples)):
        example = examples[index]
        # In float64: the sum over many rows would lose whole bytes in float32.
        total += float(np.dot(example.weights.astype(np.float64), bytes_V[example.input_ids].astype(np.float64)))
    return total


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int64]:
    """Return the number of bytes of UTF-8 text of each token id, int64 [V]; 0 for control tokens and unused ids.

    Byte-level tokenizers spell a byte as one character (GPT-2, https://github.com/openai/gpt-2), sentencepiece ones
    (arXiv:1808.06226) a space as U+2581 and a lone byte as `<0x0A>`.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    piece_bytes = _piece_bytes(tokenizer)
    for piece, index in vocabulary.items():
        counts[index] = piece_bytes(piece)
    for index, added in tokenizer.added_tokens_decoder.items():
        # Added tokens are spelled as they are, without the alphabet of the other pieces.
        counts[index] = 0 if added.special else len(added.content.encode())
    counts[list(tokenizer.all_special_ids)] = 0
    return counts


def _piece_bytes(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], int]:
    """Return the function from a piece of the vocabulary to its bytes, by the tokenizer's decoder."""
    backend = tokenizer.backend_tokenizer
    # The library has no other way to ask a decoder for its kind.
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
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
    # math.exp raises above 709; a diverged model has no finite perplexity.
    return math.exp(nats) if nats < 700 else math.inf
