"""`llmtune predict`: answers to the prompts of a data file, beside the answers in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmtune import durable
from llmtune.cli.evaluate import held_out_rows
from llmtune.cli.generate import (
    Model,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    open_inference_model,
    read_sampling,
)
from llmtune.cli.options import Checkpoint, NoCuda, Score, TemplateArgs
from llmtune.cli.scores import print_scores, refuse_options
from llmtune.common.text import print_line
from llmtune.errors import DataError, UsageError

if TYPE_CHECKING:
    from llmtune.cli.evaluate import HeldOut
    from llmtune.config.schema import Config
    from llmtune.evaluation.inference_model import InferenceModel
    from llmtune.evaluation.predictions import Prediction
    from llmtune.evaluation.sampling import Sampling

__all__ = ["predict"]

RowKind = Literal["pairs", "labels"]
"""Rows of the formats `preference` and `unpaired`, as `evaluation/judged_rows.py` makes them."""


OnlyWrong = Annotated[bool, typer.Option("--only-wrong", help="Print only answers that do not equal their reference.")]
Kind = Annotated[
    RowKind | None,
    typer.Option(
        "--as", help="Print rows to train on: `pairs` of the right answer and a wrong one, or answers with `labels`."
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write the lines to this file, not to the screen.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, help="Longest answer, in tokens; 256 or the longest reference when not given."
    ),
]


def predict(
    model: Model,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows to answer, all of them; may be given again.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="Config whose held-out rows are answered; the run's own when not given."),
    ] = None,
    checkpoint: Checkpoint = None,
    score: Score = None,
    only_wrong: OnlyWrong = False,
    kind: Kind = None,
    output: Output = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows at once; a greedy answer does not depend on it.")
    ] = 8,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    template_args: TemplateArgs = None,
    no_cuda: NoCuda = False,
) -> None:
    """Print one JSON object for each row: prompt, reference and answer; or its score, or its label."""
    if data and config:
        raise UsageError("--data and --config both name rows", "command line", "give one of them")
    if kind is not None:
        _check_kind(data, score, only_wrong=only_wrong)
    if output is not None and output.exists():
        raise UsageError(f"`{output}` exists already", "--output", "choose another name, or move it away")
    loaded = open_inference_model(
        model, checkpoint=checkpoint, no_cuda=no_cuda, template_args=template_args, may_score=True
    )
    from llmtune.evaluation.sampling import Sampling
    from llmtune.evaluation.scores import find_score, scores_of

    sampling = read_sampling(repetition_penalty, temperature, top_k, top_p, seed, stop)
    given = {"--as": kind, "--output": output, "--score": score, "--max-new-tokens": max_new_tokens}
    refuse_options(loaded, given | {"--temperature or --stop": sampling != Sampling()})
    judge = find_score(score) if score is not None else None
    rows, settings = held_out_rows(loaded, data, config)
    if loaded.labels:
        print_scores(loaded, settings, rows, batch_size, only_wrong=only_wrong)
        return
    predictions = _answer(loaded, rows, max_new_tokens, sampling, batch_size)
    scores = scores_of(predictions, judge) if judge is not None else []
    if kind is None:
        _write(_lines(predictions, scores, only_wrong=only_wrong), output)
    if max_new_tokens is not None:
        _say_longer_references(rows, max_new_tokens)
    _say_outcome(predictions, scores, skipped=len(rows) - len(predictions))
    if kind is not None:
        _write(_judged(predictions, settings, kind), output)


def _check_kind(data: list[str] | None, score: str | None, *, only_wrong: bool) -> None:
    if not data:  # the rows that a run holds out are what it is measured by
        raise UsageError("rows to train on are made of rows that --data names", "--as", "give --data ROWS")
    if score is not None or only_wrong:
        raise UsageError("a right answer is an exact one here", "--as", "leave out --score and --only-wrong")


def _write(lines: Sequence[Mapping[str, object]], output: Path | None) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output is None:
        print(text, end="", flush=True)
    else:
        durable.write_text(output, text)
        print_line(f"{len(lines)} lines written to {output}")


def _answer(
    loaded: InferenceModel, rows: HeldOut, max_new_tokens: int | None, sampling: Sampling, batch_size: int
) -> list[Prediction]:
    from llmtune.evaluation.predictions import predict_answers

    return predict_answers(
        loaded.model,
        loaded.tokenizer,
        rows,
        stop_token_ids=loaded.renderer.stop_token_ids,
        pad_id=loaded.tokenizer.pad_token_id or 0,
        max_new_tokens=max_new_tokens or 256,
        fits_references=max_new_tokens is None,
        sampling=sampling,
        batch_size=batch_size,
    )


def _lines(
    predictions: Sequence[Prediction], scores: Sequence[float], *, only_wrong: bool
) -> list[Mapping[str, object]]:
    return [
        _as_dict(prediction) | ({"score": scores[index]} if scores else {})
        for index, prediction in enumerate(predictions)
        if not (only_wrong and prediction.is_exact)
    ]


def _judged(predictions: Sequence[Prediction], settings: Config, kind: RowKind) -> list[dict[str, object]]:
    from llmtune.data.dataset.make_dataset import iter_conversations
    from llmtune.data.reading.parse import BadRow
    from llmtune.data.rows.preferences import every_format
    from llmtune.evaluation.judged_rows import judged_rows

    formats = None if settings.objective.method == "sft" else every_format()
    read = iter_conversations(settings.data, formats)
    conversations = {found[0].source: found[0] for found in read if not isinstance(found, BadRow)}
    rows = list(judged_rows(predictions, conversations, kind))
    made = [row for row in rows if row is not None]
    print_line(f"{len(made)} {kind} made")
    if len(made) < len(rows):
        print_line(f"{len(rows) - len(made)} left out: an empty answer, or a right one that is more than a text")
    if not made:
        fix = "give other rows, or draw answers with --temperature 1"
        raise DataError(f"no answer makes a row of the kind `{kind}`", "--as", fix)
    return made


def _say_outcome(predictions: Sequence[Prediction], scores: Sequence[float], *, skipped: int) -> None:
    exact = sum(prediction.is_exact for prediction in predictions)
    without = f"; {skipped} rows hold no prompt and answer" * (skipped > 0)
    mean = f"; mean score {sum(scores) / len(scores):.4g}" if scores else ""
    print_line(f"{exact} of {len(predictions)} answers exactly right{mean}{without}")


def _say_longer_references(rows: HeldOut, max_new_tokens: int) -> None:
    """Print how many references no answer of this length can equal."""
    from llmtune.evaluation.predictions import split_at_answer

    references = [pair[1] for row in range(len(rows)) if (pair := split_at_answer(rows[row])) is not None]
    longer = sum(len(reference) > max_new_tokens for reference in references)
    if longer:
        print_line(f"{longer} of {len(references)} references have more than {max_new_tokens} tokens")


def _as_dict(prediction: Prediction) -> dict[str, object]:
    return {
        "source": prediction.source,
        "prompt": prediction.prompt,
        "reference": prediction.reference,
        "answer": prediction.answer,
        "exact": prediction.is_exact,
        "num_tokens": prediction.num_tokens,
    }
