"""`llmtune predict`: answers to the prompts of a data file, beside the answers in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

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
from llmtune.errors import UsageError

if TYPE_CHECKING:
    from llmtune.cli.evaluate import HeldOut
    from llmtune.evaluation.inference_model import InferenceModel
    from llmtune.evaluation.predictions import Prediction
    from llmtune.evaluation.sampling import Sampling

__all__ = ["predict"]


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
    only_wrong: Annotated[
        bool, typer.Option("--only-wrong", help="Print only answers that do not equal their reference.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows at once; a greedy answer does not depend on it.")
    ] = 8,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="Longest answer, in tokens; 256 or the longest reference when not given."
        ),
    ] = None,
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
    loaded = open_inference_model(
        model, checkpoint=checkpoint, no_cuda=no_cuda, template_args=template_args, may_score=True
    )
    from llmtune.evaluation.sampling import Sampling
    from llmtune.evaluation.scores import find_score, scores_of

    sampling = read_sampling(repetition_penalty, temperature, top_k, top_p, seed, stop)
    given = {"--score": score, "--max-new-tokens": max_new_tokens, "--temperature or --stop": sampling != Sampling()}
    refuse_options(loaded, given)
    judge = find_score(score) if score is not None else None
    rows, settings = held_out_rows(loaded, data, config)
    if loaded.labels:
        print_scores(loaded, settings, rows, batch_size, only_wrong=only_wrong)
        return
    predictions = _answer(loaded, rows, max_new_tokens, sampling, batch_size)
    scores = scores_of(predictions, judge) if judge is not None else []
    _print_rows(predictions, scores, only_wrong=only_wrong)
    if max_new_tokens is not None:
        _say_longer_references(rows, max_new_tokens)
    _say_outcome(predictions, scores, skipped=len(rows) - len(predictions))


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


def _print_rows(predictions: Sequence[Prediction], scores: Sequence[float], *, only_wrong: bool) -> None:
    for index, prediction in enumerate(predictions):
        if only_wrong and prediction.is_exact:
            continue
        score_of_it = {"score": scores[index]} if scores else {}
        print(json.dumps(_as_dict(prediction) | score_of_it, ensure_ascii=False), flush=True)


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
