"""What a colleague asks first about a run: what was trained, is it better, what did it cost, what went wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from llmtune.common.records import is_better
from llmtune.common.text import readable_bytes, readable_duration
from llmtune.watch.report.markup import Markup, number, table, text
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["Fact", "Result", "facts", "overview_html", "results", "spent_seconds", "trained_tokens"]


class Fact(NamedTuple):
    """A tile of the overview."""

    label: str
    value: str
    detail: str = ""


class Result(NamedTuple):
    """A held-out metric before, at its best, and after the training."""

    metric: str
    first: tuple[float, float]
    best: tuple[float, float]
    last: tuple[float, float]

    @property
    def is_improved(self) -> bool:
        """Whether the last value is better than the first."""
        return is_better(self.metric, self.last[1], self.first[1])


def results(run: RunData) -> list[Result]:
    """Every held-out metric, the main loss first; (step, value) each."""
    main = [run.heldout_metric] if run.heldout_metric in run.metrics else []
    counts = ("_num_loss_tokens", "_num_answers", "_num_pairs")
    names = [name for name in run.metrics if name.startswith("eval_") and not name.endswith(counts)]
    found = []
    for name in dict.fromkeys([*main, *names]):
        series = run.metrics[name].finite()
        points = list(series)
        if points:
            best = points[0]
            for point in points:
                best = point if is_better(name, point[1], best[1]) else best
            found.append(Result(name, points[0], best, points[-1]))
    return found


def trained_tokens(run: RunData) -> float | None:
    """Real tokens trained on; None where not every step was logged, so that the sum would be too small."""
    series = run.metrics.get("num_tokens")
    every = run.flat_config.get("tracking.every_steps", 1)
    return sum(series.finite().values) if series and every == 1 else None


def spent_seconds(run: RunData) -> float | None:
    """Time spent in steps, those that were not logged counted as the mean of the others."""
    series = run.metrics.get("step_seconds", Series()).finite()
    return math.fsum(series.values) / len(series) * series.xs[-1] if len(series) and series.xs[-1] else None


def facts(run: RunData) -> list[Fact]:
    """The tiles of one run."""
    total, config, tiles = run.total_steps, run.flat_config, []
    for result in results(run)[:1]:
        first, last = result.first[1], result.last[1]
        is_loss = run.measured == "loss" and bool(first)  # of a reward, which may be below 0, a share says nothing
        change = f"{last / first - 1:+.1%} from {number(first)} before" if is_loss else f"{number(first)} before"
        best = f"; best {number(result.best[1])} at step {int(result.best[0]):,}"
        tiles.append(Fact(f"held-out {run.measured}", number(last), change + (best if result.best[1] != last else "")))
    exact = run.metrics.get("eval_exact_answers", Series()).finite()
    answers = run.metrics.get("eval_num_answers", Series()).last
    if len(exact) and answers is not None:
        tiles.append(
            Fact(
                "answers exactly right", f"{exact.values[-1]:.0f} of {answers[1]:.0f}", f"{exact.values[0]:.0f} before"
            )
        )
    train = run.metrics.get(run.loss_metric, Series()).finite()
    if len(train):
        before = f"{number(train.values[0])} at the first step"
        tiles.append(Fact(f"training {run.measured}", number(train.values[-1]), before))
    of = f"of {total:,}" if total is not None else ""
    epochs = config.get("training.epochs")
    tiles.append(
        Fact("steps", f"{run.step:,}", f"{of}{f', {number(epochs)} epochs' if isinstance(epochs, int | float) else ''}")
    )
    tokens, seconds = trained_tokens(run), spent_seconds(run)
    if tokens:
        tiles.append(Fact("tokens", number(tokens), f"{tokens / seconds:,.0f} a second" if seconds else ""))
    if seconds is not None:
        tiles.append(Fact("time in steps", readable_duration(seconds), f"on {text_of(run, 'device')}"))
    memory = run.metrics.get("memory_bytes", Series()).last
    if memory is not None:
        tiles.append(Fact("peak memory", readable_bytes(round(memory[1]))))
    return tiles


def text_of(run: RunData, key: str) -> str:
    """A value of the run's identity as text."""
    identity = run.info.get("identity")
    return str(identity.get(key, "unknown")) if isinstance(identity, dict) else "unknown"


def what_it_is(run: RunData) -> str:
    """One sentence: model, method, rows."""
    config, counts = run.flat_config, run.info.get("parameters")
    method = config.get("adapter.method")
    how = f"LoRA of rank {config.get('adapter.r')}" if method == "lora" else "all weights trained"
    objective = config.get("objective.method", "sft")
    data = run.info.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    rows = f" on {train['used'] + train['cut']:,} rows" if _has_counts(train) else ""
    trained = ""
    if isinstance(counts, dict) and isinstance(counts.get("total"), int) and isinstance(counts.get("trained"), int):
        trained = f" ({counts['trained']:,} of {counts['total']:,} parameters)"
    purpose = "" if objective == "sft" else f" with {objective}"
    return f"{config.get('model.name', 'a model')}, {how}{trained}{purpose}{rows}"


def _has_counts(part: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(part, dict) and all(isinstance(part.get(key), int) for key in ("used", "cut"))


def overview_html(runs: Sequence[RunData]) -> Markup:
    """The head of the page: each run's name, state, sentence and tiles; side by side as a table where several."""
    if len(runs) == 1:
        return _head(runs[0], 0, several=False) + _tiles(facts(runs[0]))
    heads = "".join(_head(run, place, several=True) for place, run in enumerate(runs))
    by_run = [{fact.label: fact for fact in facts(run)} for run in runs]
    labels = list(dict.fromkeys(label for found in by_run for label in found))
    rows = [[text(label), *(_cell(found.get(label)) for found in by_run)] for label in labels]
    return heads + table(["", *(run.name for run in runs)], rows, kind="facts")


def _cell(fact: Fact | None) -> Markup:
    return "–" if fact is None else f"<b>{text(fact.value)}</b><small>{text(fact.detail)}</small>"


def _head(run: RunData, place: int, *, several: bool) -> Markup:
    state, level = text(run.state), "h2" if several else "h1"
    created = str(run.info.get("created", ""))[:16].replace("T", " ")
    notes, tags = run.info.get("notes"), run.info.get("tags")
    more = f'<p class="notes">{text(notes)}</p>' if notes else ""
    chips = "".join(f'<span class="chip">{text(tag)}</span>' for tag in tags) if isinstance(tags, list) else ""
    key = f'<span class="key line c{place % 8}"></span>' if several else ""
    when = f" · began {text(created)} UTC" if created else ""
    return (
        f'<header><{level}>{key}{text(run.name)} <span class="state {state}">{state}</span>{chips}</{level}>'
        f'<p class="lead">{text(what_it_is(run))}{when}</p>{more}</header>'
    )


def _tiles(found: Sequence[Fact]) -> Markup:
    tiles = "".join(
        f"<div><dt>{text(fact.label)}</dt><dd>{text(fact.value)}<small>{text(fact.detail)}</small></dd></div>"
        for fact in found
    )
    return f'<dl class="tiles">{tiles}</dl>'
