"""The numbers of `llmtune data report` (rows, lengths, padding, packing, sources), and the excerpt that a run keeps.

Shapes: N examples; lengths are in tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from llmtune.config.schema import DataConfig
from llmtune.data.dataset.ledger import LedgerPart
from llmtune.data.dataset.make_dataset import PreparedData
from llmtune.data.dataset.packing import (
    PackingStrategy,
    examples_together,
    packing_efficiency,
    plan_sequences,
    seeded_order,
)
from llmtune.data.dataset.row_result import STATUSES
from llmtune.data.example import Example, ExampleSet, stretches
from llmtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ROWS_LISTED", "data_excerpt", "data_report", "histogram", "padding_share", "report_lines", "row_report"]

ROWS_LISTED = 1000
"""Rows that the report lists one by one; the rest are counted."""

EXAMPLES_KEPT = 3
TOKENS_KEPT = 700
"""Of each set and of each example, in the excerpt that a run keeps."""

_LINES_OF_ROWS = 20
_BAR_CHARACTERS = 40

JsonObject = dict[str, Any]


def data_report(prepared: PreparedData, config: DataConfig, *, batch_size: int) -> JsonObject:
    """The complete report, JSON-able."""
    lengths = prepared.train.lengths
    rows = list(itertools.islice(prepared.ledger.entries, ROWS_LISTED))
    affected = sum(sum(1 for _ in part.affected()) for part in prepared.ledger.parts)
    return {
        "balance": prepared.ledger.summary(),
        "sources": [source for part in prepared.ledger.parts for source in _sources(part)],
        "lengths": length_summary(lengths, config.max_length),
        "padding_share": padding_share(
            lengths, batch_size, config.shuffle_seed, together=examples_together(prepared.train)
        ),
        "batch_size": batch_size,
        "packing": _packing(prepared.train, config),
        "decisions": [decision._asdict() for decision in prepared.decisions],
        "rows": rows,
        "rows_not_listed": affected - len(rows),
    }


def data_excerpt(prepared: PreparedData, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> JsonObject:
    """The lengths of the examples of each side in tokens, and some examples spread over it with their weights.

    A run's rows may be gone or changed by the time someone asks what it was trained on.
    """

    def excerpt(examples: ExampleSet) -> JsonObject:
        chosen = sorted({len(examples) * place // EXAMPLES_KEPT for place in range(EXAMPLES_KEPT)})
        shown = [_shown(examples[place], tokenizer) for place in chosen if len(examples)]
        return {"lengths": length_summary(examples.lengths, max_length), "examples": shown}

    sides = {"train": prepared.train, "eval": prepared.eval}
    return {name: excerpt(examples) for name, examples in sides.items() if examples is not None}


def _shown(example: Example, tokenizer: PreTrainedTokenizerFast) -> JsonObject:
    shown = replace(example, input_ids=example.input_ids[:TOKENS_KEPT], weights=example.weights[:TOKENS_KEPT])
    return {
        "source": example.source,
        "side": example.side,
        "tokens": len(example),
        "trained_tokens": int((example.weights > 0).sum()),
        "shown_tokens": len(shown),
        "stretches": [list(stretch) for stretch in stretches(shown, tokenizer)],
    }


def length_summary(lengths_N: npt.NDArray[np.int64], max_length: int) -> JsonObject:
    """Shortest, median, longest, mean and a histogram of lengths in tokens, int64 [N].

    A quantile is a length that occurs: quantile_q = the shortest that at least a share q of all do not exceed.
    """
    if not len(lengths_N):
        return {"examples": 0, "max_length": max_length, "histogram": []}
    quantiles = np.quantile(lengths_N, [0, 0.5, 0.95, 1], method="higher")
    names = ("shortest", "median", "percentile_95", "longest")
    return {
        "examples": len(lengths_N),
        "max_length": max_length,
        **{name: int(length) for name, length in zip(names, quantiles, strict=True)},
        "mean": float(lengths_N.mean()),
        "histogram": histogram(lengths_N),
    }


def histogram(lengths_N: npt.NDArray[np.int64]) -> list[dict[str, int]]:
    """Count examples by length, int64 [N], in at most 12 bins of one round width; the counts add up to N.

    The bins go from the shortest example to the longest: bin = length // width.

    >>> [tuple(interval.values()) for interval in histogram(np.array([1, 9, 10, 19]))]
    [(0, 4, 1), (5, 9, 1), (10, 14, 1), (15, 19, 1)]
    """
    longest = int(lengths_N.max())
    width = next(step * 10**power for power in range(12) for step in (1, 2, 5) if step * 10**power * 12 > longest)
    width = max(width, 5)
    counts = np.bincount(lengths_N // width).tolist()
    return [
        {"from": index * width, "to": (index + 1) * width - 1, "examples": count}
        for index, count in enumerate(counts)
        if index >= lengths_N.min() // width
    ]


def padding_share(lengths_N: npt.NDArray[np.int64], batch_size: int, seed: int | None, *, together: int = 1) -> float:
    """Share of positions, in [0, 1), that are padding in micro-batches of `batch_size` in the order of epoch 0.

    share = 1 - sum(lengths) / sum over micro-batches of (examples x longest length); `lengths_N`: int64 [N].
    Each run of `together` examples (2: pairs) counts as one in `batch_size`.
    """
    if not len(lengths_N):
        return 0.0
    units = lengths_N.reshape(-1, together)
    ordered = (units[seeded_order(len(units), seed, 0)] if seed is not None else units).reshape(-1)
    batch_size *= together
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return 1.0 - float(lengths_N.sum()) / sum(int(batch.max()) * len(batch) for batch in batches)


def _packing(examples: ExampleSet, config: DataConfig) -> JsonObject:
    """Sequences and efficiency of each strategy, and which one the config chooses."""
    strategies = {}
    capacity = examples_together(examples) * config.max_length
    for strategy in get_args(PackingStrategy):
        packs = plan_sequences(examples, config.max_length, strategy, config.shuffle_seed)
        efficiency = packing_efficiency(examples.lengths, packs, capacity)
        strategies[strategy] = {"sequences": len(packs), "efficiency": efficiency}
    return {"chosen": config.packing, "strategies": strategies}


def _sources(part: LedgerPart) -> Iterator[JsonObject]:
    """The balance of each source of one side."""
    source_of_row = np.asarray(part.store.sources, dtype=np.int64)[part.store.rows["file"]]
    names = part.store.source_names
    for place, source in part.store.source_configs.items():
        own = source_of_row == place
        counts = np.bincount(part.statuses[own], minlength=len(STATUSES)).tolist()
        is_kept = own & np.isin(part.statuses, [STATUSES.index("used"), STATUSES.index("cut")])
        examples = part.store.examples[is_kept[part.store.examples["row"]]]
        yield {
            "part": part.name,
            "source": source.path,
            "name": names[place],
            "input": int(own.sum()),
            **dict(zip(STATUSES, counts, strict=True)),
            "tokens": int(examples["tokens"].sum(dtype=np.int64)),
            "loss_tokens": float(examples["loss_weight"].sum()),
        }


def row_report(prepared: PreparedData, name: str) -> list[JsonObject]:
    """The status of the row `file:line` or `file[index]` and its examples. Raises DataError if there is no such row."""
    rows = []
    for part in prepared.ledger.parts:
        for row in part.rows_named(name):
            entries = part.store.examples[part.store.examples["row"] == row]
            examples = [
                {"tokens": int(entry["tokens"]), "loss_tokens": float(entry["loss_weight"])} for entry in entries
            ]
            rows.append({**part.entry(row), "examples": examples})
    if not rows:
        labels = [label for part in prepared.ledger.parts for label in part.store.labels]
        files = ", ".join(labels[:5])
        fix = f"name it as file:line (a json or parquet row as file[index], from 0); the files are {files}"
        raise DataError(f"there is no row {name!r}", "--row", fix)
    return rows


# --- as text


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of plain text."""
    for name, balance in report["balance"].items():
        sums = " + ".join(f"{balance[status]:,} {status.replace('_', ' ')}" for status in STATUSES)
        yield f"{name}: {balance['input']:,} input rows = {sums}"
        is_whole = balance["loss_tokens"] == int(balance["loss_tokens"])
        trained = f"{balance['loss_tokens']:,.0f}" if is_whole else f"{balance['loss_tokens']:,.2f}"
        lost = f"; {balance['tokens_cut']:,} tokens lost to cutting" if balance["cut"] else ""
        tokens = f"{balance['tokens']:,} tokens, {trained} of them trained (by weight)"
        yield f"  {balance['examples']:,} examples, {tokens}{lost}"
        for status, reasons in balance["reasons"].items():
            yield from (f"  {count:>8,} {status.replace('_', ' ')}: {reason}" for reason, count in reasons.items())
        yield from (f"  {count:>8,} noted: {code}" for code, count in balance["notes"].items())
    yield from _source_lines(report["sources"])
    yield from _length_lines(report)
    yield from _row_lines(report)


def _source_lines(sources: list[JsonObject]) -> Iterator[str]:
    yield ""
    columns = ("input", *STATUSES, "tokens")
    paths = [row["source"] for row in sources]
    shown = [
        path if paths.count(path) == 1 and row["name"] in path else f"{path} ({row['name']})"
        for path, row in zip(paths, sources, strict=True)
    ]
    width = max(len(source) for source in ("source", *shown))
    yield f"{'source':<{width}}  {'part':<5}" + "".join(f" {column.replace('_', ' '):>10}" for column in columns)
    for source, row in zip(shown, sources, strict=True):
        yield f"{source:<{width}}  {row['part']:<5}" + "".join(f" {row[column]:>10,}" for column in columns)


def _length_lines(report: Mapping[str, Any]) -> Iterator[str]:
    lengths = report["lengths"]
    if not lengths["examples"]:
        return
    yield ""
    yield (
        f"length of an example in tokens: shortest {lengths['shortest']:,}, median {lengths['median']:,}, 95 % up to "
        f"{lengths['percentile_95']:,}, longest {lengths['longest']:,} (max_length {lengths['max_length']:,})"
    )
    most = max(interval["examples"] for interval in lengths["histogram"])
    for interval in lengths["histogram"]:
        bar = "#" * round(_BAR_CHARACTERS * interval["examples"] / most)
        yield f"  {interval['from']:>7,} - {interval['to']:>7,} {interval['examples']:>9,} {bar}".rstrip()
    yield ""
    share, batch_size = report["padding_share"], report["batch_size"]
    yield f"padding without packing: {share:.1%} of all positions in micro-batches of {batch_size}"
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
    unlisted = len(rows) - _LINES_OF_ROWS + report["rows_not_listed"]
    if unlisted > 0:
        yield f"and {unlisted:,} more rows; `--json` lists {ROWS_LISTED:,} of them, `--row FILE:LINE` shows one"


def row_line(entry: Mapping[str, Any]) -> str:
    """One entry of the ledger in a line: name, status, reason, lost tokens, warnings."""
    field = f"{entry['field']}: " if "field" in entry else ""
    why = f": {field}{entry['reason']}" if "reason" in entry else ""
    other = f" ({entry['other']})" if "other" in entry else ""
    lost = f", {entry['tokens_lost']:,} of {entry['tokens']:,} tokens lost" if entry["tokens_lost"] else ""
    notes = f"; {'; '.join(entry['notes'])}" if entry.get("notes") else ""
    return f"{entry['source']}: {entry['fate'].replace('_', ' ')}{why}{other}{lost}{notes}"
