"""`llmtune evaluate`: the loss of a run or a model on held-out rows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.generate import Model, open_inference_model
from llmtune.cli.options import Checkpoint, NoCuda, Score, TemplateArgs
from llmtune.cli.scores import measure_scores, refuse_options, score_losses
from llmtune.cli.tasks import ChatTemplate, Limit, Tasks, print_tasks, refuse_beside_tasks, run_tasks
from llmtune.common.text import print_line
from llmtune.config.layers import load_config
from llmtune.config.schema import Config, SourceConfig
from llmtune.errors import ConfigError, DataError, Problem, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from llmtune.data.dataset.store import JoinedExamples, MappedExamples
    from llmtune.evaluation.inference_model import InferenceModel

    HeldOut = MappedExamples | JoinedExamples

__all__ = ["evaluate", "held_out_rows", "measure", "measure_rows"]


BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows at once; the result does not depend on it.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer of --exact-match, in tokens.")
]
ExactMatch = Annotated[bool, typer.Option("--exact-match", help="Also count the answers given character by character.")]
TokenAccuracy = Annotated[
    bool, typer.Option("--token-accuracy", help="Also count the tokens the model would have chosen itself.")
]


def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="Rows to evaluate on, all of them: a path, or {path: ..., columns: ...}; may be given again."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="Config whose held-out rows are used; the run's own when not given."),
    ] = None,
    checkpoint: Checkpoint = None,
    exact_match: ExactMatch = False,
    score: Score = None,
    token_accuracy: TokenAccuracy = False,
    batch_size: BatchSize = 8,
    max_new_tokens: MaxNewTokens = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    template_args: TemplateArgs = None,
    tasks: Tasks = None,
    chat_template: ChatTemplate = False,
    limit: Limit = None,
    no_cuda: NoCuda = False,
) -> None:
    """Measure loss, perplexity and bits per byte on held-out rows, or run benchmarks of lm-eval."""
    if data and config:
        raise UsageError("--data and --config both name rows", "command line", "give one of them")
    loaded = open_inference_model(
        model, checkpoint=checkpoint, no_cuda=no_cuda, template_args=template_args, may_score=True
    )
    answering = {"--exact-match": exact_match, "--score": score, "--token-accuracy": token_accuracy, "--tasks": tasks}
    refuse_options(loaded, answering)
    if tasks:
        refuse_beside_tasks({"--data": data, "--config": config, "--score": score})
        results = run_tasks(loaded, tasks, chat_template=chat_template, batch_size=batch_size, limit=limit)
        print_tasks(results, as_json=as_json)
        return
    rows, settings = held_out_rows(loaded, data, config)
    metrics = _measure(loaded, settings, rows, batch_size)
    if exact_match or score is not None:
        metrics |= _judge(loaded, rows, score, exact_match=exact_match, max_new_tokens=max_new_tokens, batch=batch_size)
    if token_accuracy:
        from llmtune.evaluation import heldout

        pad_id = loaded.tokenizer.pad_token_id or 0
        metrics["eval_token_accuracy"] = heldout.token_accuracy(loaded.model, rows, pad_id=pad_id)
    if as_json:
        print(json.dumps(metrics))
        return
    if sys.stdout.isatty():
        _print_table(metrics)
        return
    width = max(22, *(len(name) for name in metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.6g}" if isinstance(value, float) else f"{name:{width}} {value}")
    if exact_match:
        print(f"exactly right: {metrics['eval_exact_answers']} of {metrics['eval_num_answers']}")


def _measure(loaded: InferenceModel, settings: Config, rows: HeldOut, batch_size: int) -> dict[str, float]:
    # On a GPU the model is held in the type that this multiplies fastest.
    arithmetic = str(loaded.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    print_line(f"{rows.row_count} held-out rows, measured in {arithmetic} arithmetic")
    if loaded.labels:
        return measure_scores(loaded, settings, rows, batch_size)
    return measure(loaded.model, loaded.tokenizer, settings, rows, batch_size)


def _print_table(metrics: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else f"{value:,}"
        of_source = name.endswith("_mean_nll") and name != "eval_mean_nll"
        meaning = "the same, of the rows of one source" if of_source else MEANINGS.get(name, "")
        grid.add_row(Text(name, "cyan"), Text(shown, "bold", justify="right"), Text(meaning, "dim"))
    Console(highlight=False, markup=False, emoji=False).print(grid)


MEANINGS = {
    "eval_mean_nll": "nats per trained token; lower is better",
    "eval_perplexity": "exp of that: among so many tokens it hesitates",
    "eval_bits_per_byte": "of the text; comparable between tokenizers",
    "eval_num_loss_tokens": "trained tokens, by weight",
    "eval_token_accuracy": "share of tokens it would have chosen itself",
    "eval_exact_answers": "answers that equal their reference",
    "eval_num_answers": "answers that were counted",
    "eval_score": "mean of the judge",
    "eval_accuracy": "share of pairs won, or of labels that are right",
    "eval_macro_f1": "mean of the labels' F1",
}


def _judge(
    loaded: InferenceModel, rows: HeldOut, score: str | None, *, exact_match: bool, max_new_tokens: int, batch: int
) -> dict[str, float]:
    """Answer the prompts of the rows, and count the exact answers or judge all of them, as asked."""
    from llmtune.evaluation.predictions import predict_answers
    from llmtune.evaluation.scores import find_score, mean_score

    judge = find_score(score) if score is not None else None
    predictions = predict_answers(
        loaded.model,
        loaded.tokenizer,
        rows,
        stop_token_ids=loaded.renderer.stop_token_ids,
        pad_id=loaded.tokenizer.pad_token_id or 0,
        max_new_tokens=max_new_tokens,
        batch_size=batch,
    )
    metrics: dict[str, float] = {}
    if exact_match:
        exact = sum(prediction.is_exact for prediction in predictions)
        metrics |= {"eval_exact_answers": exact, "eval_num_answers": len(predictions)}
    if judge is not None and predictions:
        metrics["eval_score"] = mean_score(predictions, judge)
    return metrics


def held_out_rows(loaded: InferenceModel, data: list[str] | None, config: str | None) -> tuple[HeldOut, Config]:
    """Return the rows to evaluate on, and the config they were prepared by.

    Raises UsageError where no rows are named, DataError where a file has none.
    """
    from llmtune.data.dataset.make_dataset import prepare_data
    from llmtune.data.rows.preferences import SCORED_FORMATS, every_format
    from llmtune.models.read_config import context_of
    from llmtune.prepare import fit_max_length, overlong_named

    context, origins = context_of(loaded.model.config), {}
    settings = loaded.config or Config()
    if config is not None:
        resolved = load_config(config)
        for note in resolved.notes:
            print_line(note)
        settings, origins = resolved.config, dict(resolved.origins)
    elif loaded.config is not None and context is not None and not context.ends:
        context = None  # it was trained on rows of that length, so it is measured on them
    settings, fitted = fit_max_length(settings, context, origins)
    for decision in fitted:
        print_line(str(decision))
    formats = SCORED_FORMATS if loaded.labels else None if settings.objective.method == "sft" else every_format()
    if data:
        sources = tuple(source for text in data for source in _sources_of(text))
        # Every row counts: nothing is held out, limited or shuffled.
        rows = replace(settings.data, train=sources, eval=(), test_size=0, max_samples=None, shuffle_seed=None)
        if loaded.labels:  # rows without a label have a score too
            rows = replace(rows, format="auto")
        try:
            with overlong_named(fitted):
                examples = prepare_data(rows, loaded.renderer, formats=formats).train
                return examples if loaded.labels else examples.right_answers(), replace(settings, data=rows)
        except DataError as error:
            raise DataError.all(_located_at_option(problem) for problem in error.problems) from error
    if not settings.data.train:
        raise UsageError("no rows are named", "command line", "name a file with --data, or a config with --config")
    try:
        with overlong_named(fitted):
            held_out = prepare_data(settings.data, loaded.renderer, formats=formats).eval
    except DataError as error:
        if config is not None:
            raise
        raise DataError.all(_with_other_rows(problem) for problem in error.problems) from error
    if held_out is None or not len(held_out):
        raise DataError(
            "the config holds out no rows",
            "data.eval / data.test_size",
            "name a file with --data, or set data.test_size",
        )
    return held_out if loaded.labels else held_out.right_answers(), settings


def _sources_of(text: str) -> tuple[SourceConfig, ...]:
    """The source that an option `--data` names: a path, or a mapping as an entry of `data.train` is written."""
    if not text.startswith("{"):
        return (SourceConfig(path=text),)
    try:
        return load_config(None, overrides=[f"data.train=[{text}]"], environ={}).config.data.train
    except ConfigError as error:
        raise UsageError.all(problem._replace(where="--data") for problem in error.problems) from error


def _with_other_rows(problem: Problem) -> Problem:
    """A problem with the rows of a run, with the ways out of this command: the paths may be those of another folder."""
    if problem.where is None or not problem.where.startswith(("data.train", "data.eval")):
        return problem
    return problem._replace(fix=f"start in the folder of the training, or name rows with --data; {problem.fix}")


def _located_at_option(problem: Problem) -> Problem:
    """Name the option `--data`, which the user typed, instead of the config key that its files were put under."""
    where = re.sub(r"data\.train(\[\d+\])?", "--data", problem.where) if problem.where else "--data"
    if problem.fix and "`data.overlong`" in problem.fix:
        fix = "take them out, or name the file in a config that sets `data.overlong`, and give that with --config"
        return problem._replace(where=where, fix=fix)
    columns = re.search(r"`columns: (\{.*?\})`", problem.fix or "")
    if columns:  # an entry of `data.train` would say it; here it stands in the option
        option = f"--data '{{path: FILE, columns: {columns[1]}}}'"
        return problem._replace(where=where, fix=f"say which they are: {option}")
    return problem._replace(where=where)


def measure_rows(
    loaded: InferenceModel, model: PreTrainedModel | PeftModel, settings: Config, rows: HeldOut
) -> npt.NDArray[np.float64]:
    """Return the loss of each row in the arithmetic of the model's weights, nats per trained token (or pair, or row).

    Float64 of shape [rows]. The weights are float32 on a CPU.
    loss = sum_t weight_t (-log p_t) / sum_t weight_t, or that of `score_losses` where the model has a head of scores.
    """
    if loaded.labels:
        return score_losses(replace(loaded, model=model), settings, rows)
    from llmtune.engine.forward import build_engine
    from llmtune.engine.precision import Precision
    from llmtune.evaluation.heldout import row_losses

    device = next(model.parameters()).device
    precision = Precision("fp32", device)
    engine = build_engine(model, config=settings, device=device, precision=precision)
    return row_losses(model, rows, engine=engine, precision=precision, pad_id=loaded.tokenizer.pad_token_id or 0)


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: Config,
    rows: HeldOut,
    batch_size: int,
) -> dict[str, float]:
    """Return the metrics of a model on held-out rows (see `evaluate_examples`)."""
    from llmtune.engine.forward import build_engine
    from llmtune.engine.precision import Precision
    from llmtune.evaluation.heldout import evaluate_examples, trained_bytes

    device = next(model.parameters()).device
    # No autocast: float32 where the weights are, and then the same on every device as far as sums allow.
    precision = Precision("fp32", device)
    return evaluate_examples(
        model,
        rows,
        engine=build_engine(model, config=settings, device=device, precision=precision),
        precision=precision,
        pad_id=tokenizer.pad_token_id or 0,
        batch_size=batch_size,
        total_bytes=trained_bytes(rows, tokenizer),
        sets=rows.by_source(),
    )
