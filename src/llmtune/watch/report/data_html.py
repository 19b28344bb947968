"""Sections about what went in: rows and their fate, lengths, examples with their masks, plan against measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.common.text import readable_bytes, readable_duration
from llmtune.watch.report.markup import Markup, number, table, text
from llmtune.watch.report.overview import spent_seconds, trained_tokens
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["data_html", "examples_html", "plan_html"]

STATUSES = ("used", "cut", "held_out", "duplicate", "dropped", "bad")
"""Fates of a row in the order in which the bar shows them."""
ENTRIES_SHOWN = 200
MOST_CHARACTERS = 6000


def data_html(runs: Sequence[RunData]) -> Markup:
    """The balance of the rows as bars, the reasons, a histogram of lengths, and the rows that were not simply used."""
    return "".join(
        (f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else "") + _balance(run) + _lengths(run) + _entries(run)
        for run in runs
        if isinstance(run.info.get("data"), dict)
    )


def _balance(run: RunData) -> Markup:
    parts = []
    for side, counts in run.info["data"].items():
        if not isinstance(counts, dict):
            continue
        rows = {status: counts[status] for status in STATUSES if isinstance(counts.get(status), int) and counts[status]}
        total = sum(rows.values()) or 1
        bar = "".join(
            f'<span class="fate {status}" style="width:{count / total:.3%}" title="{count:,} {status}"></span>'
            for status, count in rows.items()
        )
        words = " · ".join(
            f'<span class="fate {status}"></span> {count:,} {status.replace("_", " ")}'
            for status, count in rows.items()
        )
        tokens = counts.get("tokens"), counts.get("loss_tokens")
        spent = ""
        if all(isinstance(value, int | float) for value in tokens) and tokens[0]:
            spent = f"; {number(tokens[0])} tokens, {number(tokens[1])} of them trained"
        parts.append(
            f'<p class="balance"><b>{text(side)}</b> {number(counts.get("input"))} rows{spent}</p>'
            f'<div class="bar">{bar}</div><p class="legend">{words}</p>{_reasons(counts)}'
        )
    return "".join(parts)


def _reasons(counts: Mapping[str, Any]) -> Markup:
    found = counts.get("reasons")
    reasons = [
        [f"{count:,}", text(status.replace("_", " ")), text(reason)]
        for status, of_status in (found.items() if isinstance(found, dict) else ())
        if isinstance(of_status, dict)
        for reason, count in of_status.items()
    ]
    return table(["rows", "fate", "reason"], reasons)


def _lengths(run: RunData) -> Markup:
    parts = []
    for side, of_side in run.data.items():
        lengths = of_side.get("lengths") if isinstance(of_side, dict) else None
        bins = lengths.get("histogram") if isinstance(lengths, dict) else None
        if not isinstance(lengths, dict) or not isinstance(bins, list) or not bins:
            continue
        most = max(entry["examples"] for entry in bins) or 1
        bars = "".join(
            f'<div title="{entry["examples"]:,} examples of {entry["from"]:,} to {entry["to"]:,} tokens">'
            f'<span style="height:{100 * entry["examples"] / most:.1f}%"></span><i>{entry["from"]:,}</i></div>'
            for entry in bins
        )
        words = ", ".join(
            f"{name.replace('_', ' ')} {number(lengths[name])}"
            for name in ("shortest", "median", "percentile_95", "longest", "max_length")
            if isinstance(lengths.get(name), int | float)
        )
        parts.append(
            f'<figure class="histogram"><figcaption><b>Lengths of {text(side)} examples</b> '
            f'<span class="unit">tokens; {text(words)}</span></figcaption><div class="bins">{bars}</div></figure>'
        )
    return f'<div class="pair">{"".join(parts)}</div>' if parts else ""


def _entries(run: RunData) -> Markup:
    shown = run.ledger[:ENTRIES_SHOWN]
    rows = [
        [
            text(entry.get("source", "")),
            text(str(entry.get("fate", "")).replace("_", " ")),
            text("; ".join(_words(entry))),
            number(entry.get("tokens") if isinstance(entry.get("tokens"), int) else None),
        ]
        for entry in shown
    ]
    if not rows:
        return ""
    count = f"{len(run.ledger):,} rows that were not simply used"
    cut = f" (the first {ENTRIES_SHOWN})" if len(run.ledger) > len(shown) else ""
    return f"<details><summary>{count}{cut}</summary>{table(['row', 'fate', 'why', 'tokens'], rows)}</details>"


def _words(entry: Mapping[str, Any]) -> Iterable[str]:
    yield from (str(entry[key]) for key in ("reason", "other", "fix") if entry.get(key))
    notes = entry.get("notes")
    yield from map(str, notes if isinstance(notes, list) else ())


def examples_html(runs: Sequence[RunData]) -> Markup:
    """A few examples as the model saw them: trained text in colour."""
    blocks = []
    for run in runs:
        for side, of_side in run.data.items():
            examples = of_side.get("examples") if isinstance(of_side, dict) else None
            for example in examples if isinstance(examples, list) else ():
                prefix = f"{run.name}, " if len(runs) > 1 else ""
                blocks.append(_example(example, f"{prefix}{side}"))
        # Runs that are compared mostly share their rows.
        if blocks:
            break
    if not blocks:
        return ""
    legend = (
        '<p class="legend"><span class="t">trained</span> · <span class="t s">trained control token</span> · '
        '<span class="s">control token</span> · the rest is read, not trained</p>'
    )
    return legend + "".join(blocks)


def _example(example: Mapping[str, Any], side: str) -> Markup:
    body, left = [], MOST_CHARACTERS
    for stretch in example.get("stretches", ()):
        content, weight, is_control = stretch
        shown = str(content)[:left]
        left -= len(shown)
        classes = " ".join(name for name, is_so in (("t", weight > 0), ("s", is_control)) if is_so)
        tip = f' title="weight {weight:g}"' if weight not in (0, 1) else ""
        body.append(f'<span class="{classes}"{tip}>{text(shown)}</span>' if classes else text(shown))
    tokens, trained = example.get("tokens", 0), example.get("trained_tokens", 0)
    is_cut = example.get("shown_tokens", tokens) < tokens or left <= 0
    title = f"{side}: {example.get('source', '')}: {tokens:,} tokens, {trained:,} trained"
    return f'<div class="example"><h4>{text(title)}</h4><pre>{"".join(body)}{" …" if is_cut else ""}</pre></div>'


def plan_html(runs: Sequence[RunData]) -> Markup:
    """What was planned beside what was measured: steps, tokens, time, memory by part, disk."""
    return "".join(
        (f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else "") + _plan(run, run.info["plan"])
        for run in runs
        if isinstance(run.info.get("plan"), dict)
    )


def _plan(run: RunData, plan: Mapping[str, Any]) -> Markup:
    steps, memory, disk = (_mapping(plan.get(key)) for key in ("steps", "memory", "disk"))
    measured = _mapping(run.info.get("measured_bytes"))
    peak = run.metrics.get("memory_bytes", Series()).last
    seconds, planned_seconds = spent_seconds(run), plan.get("seconds")
    rows = [
        ["steps", number(steps.get("total_steps")), number(run.step), _off(steps.get("total_steps"), run.step)],
        _row("tokens", steps.get("run_tokens"), trained_tokens(run)),
        [
            "time in steps",
            readable_duration(planned_seconds) if planned_seconds else "not measured before",
            readable_duration(seconds) if seconds else "–",
            _off(planned_seconds, seconds),
        ],
        _row("peak memory", memory.get("peak_bytes"), None if peak is None else peak[1], "bytes"),
    ]
    parts = {name: size for name, size in _mapping(memory.get("parts")).items() if size}
    rows += [_row(f"  {name}", size, measured.get(name), "bytes") for name, size in parts.items()]
    needed = disk.get("needed_bytes", run.info.get("disk_forecast_bytes"))
    # The forecast is the most that the folder ever holds, while old checkpoints are still there.
    rows.append(["disk, at most", number(needed, "bytes"), number(folder_bytes(run.path), "bytes"), ""])
    bar = ""
    if total := sum(parts.values()):
        pieces = "".join(
            f'<span class="c{place % 8}" style="width:{size / total:.3%}" title="{text(name)}"></span>'
            for place, (name, size) in enumerate(parts.items())
        )
        words = " · ".join(
            f'<span class="swatch c{place % 8}"></span> {text(name)} {readable_bytes(size)}'
            for place, (name, size) in enumerate(parts.items())
        )
        on = f"{readable_bytes(total)} planned of {number(plan.get('budget_bytes'), 'bytes')} on {plan.get('device')}"
        bar = f'<p class="balance">{text(on)}</p><div class="bar parts">{pieces}</div><p class="legend">{words}</p>'
    return bar + table(["", "planned", "measured", "difference"], rows, kind="numbers")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _row(name: str, planned: float | None, measured: float | None, unit: str = "") -> list[Markup]:
    shown = text(name).replace("  ", "&emsp;")
    return [shown, number(planned, unit), number(measured, unit), _off(planned, measured)]


def _off(planned: object, measured: object) -> str:
    """The plan's error against what was measured."""
    if not isinstance(planned, int | float) or not isinstance(measured, int | float) or not measured:
        return ""
    return f"{planned / measured - 1:+.1%}"


def folder_bytes(folder: Path) -> int | None:
    """Size of all files of a run; None where some cannot be read."""
    try:
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    except OSError:
        return None
