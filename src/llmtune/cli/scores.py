"""What commands do with a model that gives scores: measure it on held-out rows, and print the scores of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmtune.common.text import print_line
from llmtune.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from llmtune.config.schema import Config
    from llmtune.data.dataset.store import JoinedExamples, MappedExamples
    from llmtune.evaluation.inference_model import InferenceModel

    HeldOut = MappedExamples | JoinedExamples

__all__ = ["measure_scores", "print_scores", "refuse_options", "score_losses"]


def refuse_options(loaded: InferenceModel, options: Mapping[str, object]) -> None:
    """Raise UsageError for the first option about answers that was given for a model that answers nothing."""
    given = next((name for name, value in options.items() if value), None)
    if loaded.labels and given is not None:
        raise UsageError("this model gives scores, and answers nothing", given, "leave it out")


def measure_scores(loaded: InferenceModel, settings: Config, rows: HeldOut, batch_size: int) -> dict[str, float]:
    """Return loss, accuracy and more of the rows, which are pairs or have labels, without autocast."""
    from llmtune.engine.devices import Devices
    from llmtune.engine.forward import build_engine
    from llmtune.engine.precision import Precision
    from llmtune.engine.scoring import scoring_objective
    from llmtune.evaluation.heldout import evaluate_objective

    _check_judged(loaded, rows)
    device = next(loaded.model.parameters()).device
    precision = Precision("fp32", device)
    engine = build_engine(loaded.model, config=settings, device=device, precision=precision)
    return evaluate_objective(
        loaded.model,
        rows,
        scoring_objective(rows, engine.scores, loaded.labels),
        engine=engine,
        precision=precision,
        pad_id=loaded.tokenizer.pad_token_id or 0,
        batch_size=batch_size,
        devices=Devices(device),
    )


def score_losses(loaded: InferenceModel, settings: Config, rows: HeldOut) -> npt.NDArray[np.float64]:
    """Return the loss of each pair, or of each row with a label, nats, float64 [pairs or rows].

    Of a pair: that of `reward_losses`. Of a row: loss = -log softmax(scores)[label].
    """
    import numpy as np
    import torch

    from llmtune.engine.scoring import reward_losses
    from llmtune.evaluation.score_rows import score_examples

    _check_judged(loaded, rows)
    scores_NL = score_examples(loaded, rows, settings).double()
    if len(loaded.labels) == 1:
        margins = torch.from_numpy(rows.margins)
        losses: Tensor = reward_losses(scores_NL[0::2, 0], scores_NL[1::2, 0], margins[0::2])
        return losses.numpy()
    numbers = [loaded.labels.index(str(label)) for label in rows.labels]
    return -scores_NL.log_softmax(dim=1).numpy()[np.arange(len(numbers)), numbers]


def print_scores(loaded: InferenceModel, settings: Config, rows: HeldOut, batch_size: int, *, only_wrong: bool) -> None:
    """Print one JSON object for each row (each side of a pair): its text, and the score or the label it gets."""
    from llmtune.evaluation.score_rows import score_examples

    scores_NL = score_examples(loaded, rows, settings, batch_size=batch_size)
    if len(loaded.labels) == 1:
        lines, wrong = _rewards(loaded, rows, scores_NL[:, 0].tolist())
        of = "pairs have the higher score on their chosen side"
    else:
        lines, wrong = _classes(loaded, rows, scores_NL.softmax(dim=1).tolist())
        of = "labels are right"
    for line, is_wrong in zip(lines, wrong, strict=True):
        if is_wrong or not only_wrong:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    judged = [is_wrong for line, is_wrong in zip(lines, wrong, strict=True) if line.get("side") != "rejected"]
    known = [is_wrong for is_wrong in judged if is_wrong is not None]
    print_line(f"{known.count(False)} of {len(known)} {of}" if known else f"{len(lines)} rows, nothing to compare with")


def _rewards(
    loaded: InferenceModel, rows: HeldOut, scores: list[float]
) -> tuple[list[dict[str, object]], list[bool | None]]:
    """The line of each example; and whether its pair is lost, None for one that is alone."""
    lines: list[dict[str, object]] = []
    wrong: list[bool | None] = []
    for index, (fields, side) in enumerate(_fields(loaded, rows)):
        first = index - (side == "rejected")
        wrong.append(None if side not in ("chosen", "rejected") else not scores[first] > scores[first + 1])
        lines.append({**fields, **({"side": side} if wrong[-1] is not None else {}), "score": scores[index]})
    return lines, wrong


def _classes(
    loaded: InferenceModel, rows: HeldOut, probabilities: list[list[float]]
) -> tuple[list[dict[str, object]], list[bool | None]]:
    lines: list[dict[str, object]] = []
    wrong: list[bool | None] = []
    for (fields, _), own, reference in zip(_fields(loaded, rows), probabilities, rows.labels, strict=True):
        label = loaded.labels[own.index(max(own))]
        wrong.append(None if reference is None else label != reference)
        named = dict(zip(loaded.labels, own, strict=True))
        lines.append({**fields, "reference": reference, "label": label, "probabilities": named})
    return lines, wrong


def _fields(loaded: InferenceModel, rows: HeldOut) -> Iterator[tuple[dict[str, object], str | None]]:
    for index in range(len(rows)):
        example = rows[index]
        text = loaded.tokenizer.decode(example.input_ids.tolist(), clean_up_tokenization_spaces=False)
        yield {"source": example.source, "text": text}, example.side


def _check_judged(loaded: InferenceModel, rows: HeldOut) -> None:
    """Raise DataError for rows that a loss cannot be measured on: no pairs, no label, or one that the model lacks."""
    from llmtune.data.dataset.labels import check_labels
    from llmtune.data.dataset.packing import examples_together

    if len(loaded.labels) > 1:
        check_labels(rows.labels, loaded.labels, [rows[index].source for index in range(len(rows))])
    elif examples_together(rows) != 2:
        fix = "give rows with `chosen` and `rejected`; `llmtune predict` prints the scores of any rows"
        raise DataError("a reward model is measured on pairs", rows[0].source, fix)
