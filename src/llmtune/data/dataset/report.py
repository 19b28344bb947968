"""The numbers of `llmtune data report`: the balance of rows, lengths, padding, packing, and each source by itself.

Shapes: N examples; lengths are in tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from llmtune.config.schema import DataConfig
from llmtune.data.dataset.ledger import LedgerPart
from llmtune.data.dataset.make_dataset import PreparedData
from llmtune.data.dataset.packing import PackingStrategy, packing_efficiency, plan_packs, seeded_order
from llmtune.data.dataset.store import FATES
from llmtune.errors import DataError

__all__ = ["ROWS_LISTED", "data_report", "histogram", "padding_share", "report_lines", "row_report"]

ROWS_LISTED = 1000
"""Rows that the report lists one by one; the rest are counted."""

_LINES_OF_ROWS = 20
_BAR_CHARACTERS = 40
_FATE_WORDS = tuple(fate.replace("_", " ") for fate in FATES)


def data_report(prepared: PreparedData, config: DataConfig, *, batch_size: int) -> dict[str, Any]:
    """Everything `llmtune data report` knows, JSON-able."""
    lengths = prepared.train.lengths
    rows = list(itertools.islice(prepared.ledger.entries, ROWS_LISTED))
    affected = sum(sum(1 for _ in part.affected()) for part in prepared.ledger.parts)
    return {
        "balance": prepared.ledger.summary(),
        "sources": [one for part in prepared.ledger.parts for one in _sources(part)],
        "lengths": _lengths(lengths, config.max_length),
        "padding_share": padding_share(lengths, batch_size, config.shuffle_seed),
        "batch_size": batch_size,
        "packing": _packing(lengths, config),
        "decisions": [decision._asdict() for decision in prepared.decisions],
        "rows": rows,
        "rows_not_listed": affected - len(rows),
    }


def _lengths(lengths: npt.NDArray[np.int64], max_length: int) -> dict[str, Any]:
    if not len(lengths):
        return {"examples": 0, "max_length": max_length, "histogram": []}
    shortest, median, most, longest = (int(one) for one in np.quantile(lengths, [0, 0.5, 0.95, 1], method="higher"))
    named = {
        "shortest": shortest,
        "median": median,
        "percentile_95": most,
        "longest": longest,
        "mean": float(lengths.mean()),
    }
    return {"examples": len(lengths), "max_length": max_length, **named, "histogram": histogram(lengths)}


def histogram(lengths: npt.NDArray[np.int64]) -> list[dict[str, int]]:
    """Examples by length, in at most 12 bins of one round width; the bins add up to N.

    >>> histogram(np.array([1, 9, 10, 19]))
    [{'from': 0, 'to': 4, 'examples': 1}, {'from': 5, 'to': 9, 'examples': 1}, {'from': 10, 'to': 14, 'examples': 1}, \
{'from': 15, 'to': 19, 'examples': 1}]
    """
    longest = int(lengths.max())
    width = next(step * 10**power for power in range(12) for step in (1, 2, 5) if step * 10**power * 12 > longest)
    width = max(width, 5)
    counts = np.bincount(lengths // width)
    return [{"from": at * width, "to": (at + 1) * width - 1, "examples": int(count)} for at, count in enumerate(counts)]


def padding_share(lengths: npt.NDArray[np.int64], batch_size: int, seed: int | None) -> float:
    """Part of all positions that would be padding in micro-batches of `batch_size` examples in the order of epoch 0, in
    [0, 1).
    """
    if not len(lengths):
        return 0.0
    ordered = lengths[seeded_order(len(lengths), seed, 0)] if seed is not None else lengths
    positions = sum(
        int(ordered[start : start + batch_size].max()) * len(ordered[start : start + batch_size])
        for start in range(0, len(ordered), batch_size)
    )
    return 1.0 - float(lengths.sum()) / positions


def _packing(lengths: npt.NDArray[np.int64], config: DataConfig) -> dict[str, Any]:
    """Sequences and efficiency of each strategy; the one of the config is marked."""
    strategies = {}
    for strategy in get_args(PackingStrategy):
        packs = plan_packs(lengths, config.max_length, strategy, config.shuffle_seed)
        strategies[strategy] = {
            "sequences": len(packs),
            "efficiency": packing_efficiency(lengths, packs, config.max_length),
        }
    return {"chosen": config.packing, "strategies": strategies}


def _sources(part: LedgerPart) -> Iterator[dict[str, Any]]:
    """The balance of each source of one part."""
    files = part.store.rows["file"]
    paths = part.store.source_paths
    for path in dict.fromkeys(paths):
        own = np.isin(files, [index for index, one in enumerate(paths) if one == path])
        counts = np.bincount(part.fates[own], minlength=len(FATES))
        kept = own & np.isin(part.fates, [FATES.index("used"), FATES.index("cut")])
        examples = part.store.examples[kept[part.store.examples["row"]]]
        amounts = {
            "tokens": int(examples["tokens"].sum(dtype=np.int64)),
            "loss_tokens": float(examples["loss_weight"].sum()),
        }
        yield {
            "part": part.name,
            "source": path,
            "input": int(own.sum()),
            **dict(zip(FATES, counts.tolist(), strict=True)),
            **amounts,
        }


def row_report(prepared: PreparedData, place: str) -> list[dict[str, Any]]:
    """The fate of the row at `file:line` or `file[index]`, with its examples.

    Raises DataError if there is no such row.
    """
    found = []
    for part in prepared.ledger.parts:
        for row in part.rows_at(place):
            indices = np.flatnonzero(part.store.examples["row"] == row)
            kept = [part.store.examples[index] for index in indices]
            examples = [{"tokens": int(one["tokens"]), "loss_tokens": float(one["loss_weight"])} for one in kept]
            found.append({**part.entry(row), "examples": examples})
    if not found:
        labels = [label for part in prepared.ledger.parts for label in part.store.labels]
        fix = f"name it as file:line (a json or parquet row as file[index], from 0); the files are {', '.join(labels[:5])}"
        raise DataError(f"there is no row {place!r}", "--row", fix)
    return found


# --- as text
# ----------------------------------------------------------------------------------------------------------------------


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of plain text."""
    for name, balance in report["balance"].items():
        sums = " + ".join(f"{balance[fate]:,} {word}" for fate, word in zip(FATES, _FATE_WORDS, strict=True))
        yield f"{name}: {balance['input']:,} input rows = {sums}"
        trained = (
            f"{balance['loss_tokens']:,.0f}"
            if balance["loss_tokens"] == int(balance["loss_tokens"])
            else f"{balance['loss_tokens']:,.2f}"
        )
        lost = f"; {balance['tokens_cut']:,} tokens lost to cutting" if balance["cut"] else ""
        yield f"  {balance['examples']:,} examples, {balance['tokens']:,} tokens, {trained} of them trained (by weight){lost}"
        for fate, reasons in balance["reasons"].items():
            yield from (f"  {count:>8,} {fate.replace('_', ' ')}: {reason}" for reason, count in reasons.items())
        yield from (f"  {count:>8,} noted: {note}" for note, count in balance["notes"].items())
    yield from _source_lines(report["sources"])
    yield from _length_lines(report)
    yield from _row_lines(report)


def _source_lines(sources: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    columns = ("input", *FATES, "tokens")
    width = max(len("source"), *(len(one["source"]) for one in sources)) if sources else 0
    yield f"{'source':<{width}}  {'part':<5}" + "".join(f" {column.replace('_', ' '):>10}" for column in columns)
    for one in sources:
        yield f"{one['source']:<{width}}  {one['part']:<5}" + "".join(f" {one[column]:>10,}" for column in columns)


def _length_lines(report: Mapping[str, Any]) -> Iterator[str]:
    lengths = report["lengths"]
    if not lengths["examples"]:
        return
    yield ""
    yield (
        f"length of an example in tokens: shortest {lengths['shortest']:,}, median {lengths['median']:,}, 95 % up to "
        f"{lengths['percentile_95']:,}, longest {lengths['longest']:,} (max_length {lengths['max_length']:,})"
    )
    most = max(one["examples"] for one in lengths["histogram"])
    for one in lengths["histogram"]:
        bar = "#" * round(_BAR_CHARACTERS * one["examples"] / most)
        yield f"  {one['from']:>7,} - {one['to']:>7,} {one['examples']:>9,} {bar}".rstrip()
    yield ""
    yield f"padding without packing: {report['padding_share']:.1%} of all positions in micro-batches of {report['batch_size']}"
    for strategy, packed in report["packing"]["strategies"].items():
        if strategy != "none":
            chosen = " (chosen)" if strategy == report["packing"]["chosen"] else ""
            yield f"packing {strategy}: {packed['sequences']:,} sequences, {packed['efficiency']:.1%} full{chosen}"


def _row_lines(report: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for row in report["rows"] if row["fate"] not in ("used", "held_out")]
    if not rows:
        return
    yield ""
    yield from (row_line(row) for row in rows[:_LINES_OF_ROWS])
    more = len(rows) - _LINES_OF_ROWS + report["rows_not_listed"]
    if more > 0:
        yield f"and {more:,} more rows; `--json` lists {ROWS_LISTED:,} of them, `--row FILE:LINE` shows one"


def row_line(entry: Mapping[str, Any]) -> str:
    """One entry of the ledger in a line: place, fate, why, what was lost, notes."""
    field = f"{entry['field']}: " if "field" in entry else ""
    why = f": {field}{entry['reason']}" if "reason" in entry else ""
    other = f" ({entry['other']})" if "other" in entry else ""
    lost = f", {entry['tokens_lost']:,} of {entry['tokens']:,} tokens lost" if entry["tokens_lost"] else ""
    notes = f"; {'; '.join(entry['notes'])}" if entry.get("notes") else ""
    return f"{entry['source']}: {entry['fate'].replace('_', ' ')}{why}{other}{lost}{notes}"
