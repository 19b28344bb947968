"""Sections about what the training achieved: held-out metrics, who wins, answers before and after, health."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune.common.records import is_better
from llmtune.watch.report.markup import Markup, number, table, text
from llmtune.watch.report.overview import results
from llmtune.watch.run_data import RunData, Sample

__all__ = ["health_html", "heldout_html", "samples_html", "win_html"]

MOST_PROMPTS = 40
MOST_CHARACTERS = 4000


def heldout_html(runs: Sequence[RunData]) -> Markup:
    """Every held-out metric and data set before, at its best and after."""
    rows = []
    for run in runs:
        for result in results(run):
            sign = "better" if result.is_improved else "" if result.last[1] == result.first[1] else "worse"
            best = f"{number(result.best[1])} <small>step {int(result.best[0]):,}</small>"
            last = f'<b class="{sign}">{number(result.last[1])}</b> <small>step {int(result.last[0]):,}</small>'
            first = f"{number(result.first[1])} <small>step {int(result.first[0]):,}</small>"
            name = [text(run.name)] if len(runs) > 1 else []
            rows.append([*name, text(metric_words(result.metric)), first, best, last])
    return table([*(["run"] if len(runs) > 1 else []), "metric", "first", "best", "last"], rows, kind="numbers")


def metric_words(metric: str) -> str:
    """The name of a held-out metric for people.

    >>> metric_words("eval_mean_nll"), metric_words("eval_cooking_mean_nll")
    ('loss (nats per token)', 'loss of source cooking')
    """
    if metric == "eval_mean_nll":
        return "loss (nats per token)"
    if metric.endswith("_mean_nll"):
        return f"loss of source {metric.removeprefix('eval_').removesuffix('_mean_nll')}"
    return metric.removeprefix("eval_").replace("_", " ")


def win_html(runs: Sequence[RunData]) -> Markup:
    """For several runs: the last value of each held-out metric, the best of a line marked, and how many each won."""
    if len(runs) < 2:
        return ""
    of_run = [{result.metric: result.last[1] for result in results(run)} for run in runs]
    shared = [metric for metric in of_run[0] if all(metric in found for found in of_run)]
    wins, rows = [0] * len(runs), []
    for metric in shared:
        values = [found[metric] for found in of_run]
        best = [not any(is_better(metric, other, value) for other in values) for value in values]
        # A line in which all are equal has no winner.
        marked = [is_best and not all(best) for is_best in best]
        wins = [count + is_marked for count, is_marked in zip(wins, marked, strict=True)]
        cells = [
            f'<b class="better">{number(value)}</b>' if is_marked else number(value)
            for value, is_marked in zip(values, marked, strict=True)
        ]
        rows.append([text(metric_words(metric)), *cells])
    if not rows:
        return '<p class="note">These runs share no held-out metric.</p>'
    rows.append(["<b>wins</b>", *(f"<b>{count}</b>" for count in wins)])
    digests = {str(run.info.get("identity", {}).get("digests", {}).get("heldout")) for run in runs}
    warning = "" if len(digests) == 1 else '<p class="warn">The held-out rows differ: these numbers do not compare.</p>'
    return warning + table(["metric", *(run.name for run in runs)], rows, kind="numbers")


def samples_html(runs: Sequence[RunData]) -> Markup:
    """Each prompt with its first and last answer side by side; those in between are folded away."""
    by_prompt: dict[str, dict[int, list[Sample]]] = {}
    for place, run in enumerate(runs):
        for sample in run.samples:
            by_prompt.setdefault(sample.prompt, {}).setdefault(place, []).append(sample)
    blocks = []
    for prompt, answers in list(by_prompt.items())[:MOST_PROMPTS]:
        columns: list[Markup] = []
        between: list[Markup] = []
        for place, samples in answers.items():
            name = f"{runs[place].name}, " if len(runs) > 1 else ""
            # Before training all runs of a model answer alike; one column is enough.
            if len(samples) > 1 and not columns:
                columns.append(_answer(samples[0], "before" if samples[0].step == 0 else f"step {samples[0].step:,}"))
            columns.append(_answer(samples[-1], f"{name}step {samples[-1].step:,}", place))
            between += [_answer(sample, f"{name}step {sample.step:,}") for sample in samples[1:-1]]
        inner = f"<summary>{len(between)} in between</summary><div class=answers>{''.join(between)}</div>"
        folded = f"<details>{inner}</details>" if between else ""
        blocks.append(
            f'<div class="sample"><p class="prompt">{text(prompt, most=MOST_CHARACTERS)}</p>'
            f'<div class="answers">{"".join(columns)}</div>{folded}</div>'
        )
    rest = len(by_prompt) - MOST_PROMPTS
    more = f'<p class="note">{rest:,} more prompts are in samples.jsonl.</p>' if rest > 0 else ""
    return "".join(blocks) + more


def _answer(sample: Sample, title: str, place: int | None = None) -> Markup:
    shown = text(sample.text.strip(), most=MOST_CHARACTERS) or "<i>nothing but white space</i>"
    colour = "" if place is None else f" c{place % 8}"
    return f'<div class="answer{colour}"><h4>{text(title)}</h4><pre>{shown}</pre></div>'


def health_html(runs: Sequence[RunData]) -> Markup:
    """Every event of the runs with its advice, and the windows that were skipped."""
    rows = []
    for run in runs:
        name = [text(run.name)] if len(runs) > 1 else []
        for event in run.events:
            head = f'<span class="{event.level}">{text(event.kind.replace("_", " "))}</span>'
            words = f"{text(event.message)}<small>{text(event.advice)}</small>"
            rows.append([*name, f"{event.step:,}", head, words])
        for skip in run.skipped:
            shown = ", ".join(skip.sources[:5]) + (" …" if len(skip.sources) > 5 else "")
            rows.append(
                [
                    *name,
                    f"{skip.step:,}",
                    '<span class="error">window skipped</span>',
                    f"{text(skip.reason)}<small>rows: {text(shown)}</small>",
                ]
            )
    if not rows:
        return '<p class="good">Nothing looked wrong.</p>'
    return table([*(["run"] if len(runs) > 1 else []), "step", "what", "seen, and what to try"], rows, kind="health")
