"""`llmtune data report`, `preview` and `prepare`: the rows of a config, before anything is trained."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from llmtune import durable
from llmtune.cli.options import ConfigName, Overrides, TrustRemoteCode
from llmtune.cli.process import check_working_folder
from llmtune.common.environment import is_offline
from llmtune.common.text import print_line
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.paths import config_folder_named
from llmtune.config.process_options import Options
from llmtune.errors import UsageError

if TYPE_CHECKING:
    from llmtune.common.decisions import Decision
    from llmtune.config.schema import DataConfig
    from llmtune.data.dataset.make_dataset import PreparedData
    from llmtune.data.dataset.preview import Group
    from llmtune.data.example import ExampleSet
    from llmtune.data.rendering.renderer import Renderer
    from llmtune.models.tokenizer import LoadedTokenizer

__all__ = ["prepare", "preview", "report", "survey"]


class Survey(NamedTuple):
    """The rows of a config as examples, with their tokenizer and renderer; unusable rows are only counted."""

    resolved: ResolvedConfig
    """With `data.max_length` fitted to the model."""
    decisions: list[Decision]
    loaded: LoadedTokenizer
    renderer: Renderer
    data: PreparedData


def report(
    overrides: Overrides = None,
    config: ConfigName = None,
    row: Annotated[
        str | None, typer.Option("--row", metavar="FILE:LINE", help="Show the fate of this one row.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what became of every row: the balance, lengths, padding, packing, each source.

    Exit code 3 if training would refuse them.
    """
    found = _survey(config, overrides, trust_remote_code=trust_remote_code)
    from llmtune.data.dataset.make_dataset import raise_problems
    from llmtune.data.dataset.report import data_report, report_lines
    from llmtune.prepare import overlong_named

    if row is not None:
        _print_row(found.data, row, as_json=as_json)
        return
    for decision in (*found.decisions, *found.data.decisions):
        print_line(str(decision))
    for line in (*found.data.ledger.training_warnings(), *found.data.ledger.unused_fields()):
        print_line(f"note: {line}")
    batch_size = found.resolved.config.training.batch_size
    values = data_report(
        found.data, found.resolved.config.data, batch_size=batch_size if isinstance(batch_size, int) else 8
    )
    print(json.dumps(values, ensure_ascii=False) if as_json else "\n".join(report_lines(values)))
    # Last, so that the report is there to look the rows up in.
    with overlong_named(found.decisions):
        raise_problems(found.data)


def _print_row(data: PreparedData, row: str, *, as_json: bool) -> None:
    from llmtune.data.dataset.report import row_line, row_report

    for entry in row_report(data, row):
        if as_json:
            print(json.dumps(entry, ensure_ascii=False))
            continue
        print(row_line(entry))
        for number, example in enumerate(entry["examples"], 1):
            trained = f"{example['loss_tokens']:,g} trained (by weight)"
            print(f"  example {number}: {example['tokens']:,} tokens, {trained}")
        if "fix" in entry:
            print(f"  fix: {entry['fix']}")


def preview(
    overrides: Overrides = None,
    config: ConfigName = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Rows to show (or packs, and rows of each).")] = 5,
    show_all: Annotated[bool, typer.Option("--all", help="Show every row.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a row: source, input_ids, weights, text.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
    color: Annotated[Literal["auto", "always", "never"], typer.Option("--color", help="Colour the text.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show rows as the model will see them: tokens, what is trained, packs.

    Exit code 3 if training would refuse the data.
    """
    resolved, fitted, loaded, renderer, data = _survey(config, overrides, trust_remote_code=trust_remote_code)
    from llmtune.data.dataset.make_dataset import raise_problems
    from llmtune.data.dataset.packing import examples_together
    from llmtune.data.dataset.preview import html_page, json_line, legend, terminal_text
    from llmtune.prepare import overlong_named

    for decision in (*fitted, *renderer.decisions, *data.decisions):
        print_line(str(decision))
    for name, counts in data.ledger.summary().items():
        if "pairs" in counts:
            print_line(f"{name}: {counts['pairs']:,} pairs of answers")
        elif counts["answers"]:
            noun = "answer" if counts["answers"] == 1 else "answers"
            print_line(f"{name}: {counts['answers']:,} {noun}, {counts['trained_answers']:,} trained")
    for line in (*data.ledger.training_warnings(), *data.ledger.unused_fields()):
        print_line(f"note: {line}")
    limit = None if show_all else count
    groups = itertools.islice(_groups(data.train, resolved.config.data), limit)
    if as_json:
        count = examples_together(data.train)
        for index in range(len(data.train))[: limit and limit * count]:
            print(json_line(data.train[index], loaded.tokenizer))
    elif page is not None:
        title = f"{resolved.name}: rows as the model sees them"
        durable.write_text(page, html_page(groups, loaded.tokenizer, title=title))
        print_line(f"wrote {page}")
    else:
        # https://no-color.org: any value of that variable switches colours off.
        coloured = color == "always" or (color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        print_line(legend(color=coloured))
        for group in groups:
            for line in terminal_text(group, loaded.tokenizer, color=coloured, rows=limit):
                print(line)
    with overlong_named(fitted):
        raise_problems(data)


def _survey(config: list[str] | None, overrides: list[str] | None, *, trust_remote_code: bool) -> Survey:
    resolved = load_config(config, overrides=overrides or ())
    for note in resolved.notes:
        print_line(note)
    return survey(resolved, trust_remote_code=trust_remote_code)


def survey(resolved: ResolvedConfig, *, trust_remote_code: bool) -> Survey:
    """Make examples of the rows of a config, with the tokenizer of its model."""
    with config_folder_named(resolved):
        opened = _open(resolved, trust_remote_code=trust_remote_code)
        from llmtune.data.dataset.make_dataset import survey_data

        data = survey_data(opened.resolved.config.data, opened.renderer, **_how_to_read(opened))
    return Survey(*opened, data)


class _Opened(NamedTuple):
    resolved: ResolvedConfig
    decisions: list[Decision]
    loaded: LoadedTokenizer
    renderer: Renderer


def _open(resolved: ResolvedConfig, *, trust_remote_code: bool) -> _Opened:
    """Open the tokenizer of a config's model, and fit to the model what the config leaves open of its rows."""
    check_working_folder()
    from llmtune.adapters.start import fit_start
    from llmtune.prepare import (
        find_context,
        find_model,
        find_model_config,
        fit_max_length,
        open_renderer,
        open_tokenizer,
    )

    options = Options(offline=is_offline(), trust_remote_code=trust_remote_code)
    started, decisions = fit_start(resolved.config, resolved.origins)
    resolved = replace(resolved, config=started)
    source = find_model(resolved.config, options)
    loaded = open_tokenizer(resolved.config, source, options)
    renderer = open_renderer(resolved.config, loaded)
    model_config = find_model_config(source, trust_remote_code=trust_remote_code)
    context = find_context(source, model_config, resolved.config.model.architecture)
    fitted, length = fit_max_length(resolved.config, context, resolved.origins)
    return _Opened(replace(resolved, config=fitted), [*decisions, *length], loaded, renderer)


def _how_to_read(opened: _Opened) -> dict[str, Any]:
    from llmtune.data.rows.preferences import RECOGNIZED_BY
    from llmtune.training.progress import tokenizing_progress

    formats = RECOGNIZED_BY[opened.resolved.config.objective.method]
    return {"formats": formats, "progress": tokenizing_progress(print_line)}


def prepare(
    part: Annotated[
        str, typer.Option("--part", metavar="K/N", help="Tokenize the K-th of N parts, as one job of an array.")
    ] = "1/1",
    overrides: Overrides = None,
    config: ConfigName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tokenize the rows into the cache, where a training finds them; the last of several parts joins them."""
    matched = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if matched is None or int(matched[1]) > int(matched[2]):
        raise UsageError(f"`{part}` is no part", "--part", "give K/N with K from 1 to N, as `--part 1/4`")
    number, count = int(matched[1]), int(matched[2])
    resolved = load_config(config, overrides=overrides or ())
    for note in resolved.notes:
        print_line(note)
    with config_folder_named(resolved):
        opened = _open(resolved, trust_remote_code=trust_remote_code)
        from llmtune.data.dataset.make_dataset import prepare_part
        from llmtune.data.dataset.parts import Part

        data = opened.resolved.config.data
        missing = prepare_part(data, opened.renderer, Part(number, count), **_how_to_read(opened))
    if missing:
        print(f"part {number} of {count} is tokenized; missing: {', '.join(map(str, missing))}")
    else:
        print("all rows are tokenized: a training with this config finds them")


def _groups(examples: ExampleSet, data: DataConfig) -> Iterator[Group]:
    """Yield the examples that are shown together: a pack, or a single row where the config does not pack."""
    from llmtune.data.dataset.packing import examples_together, plan_sequences
    from llmtune.data.dataset.preview import Group

    if data.packing == "none":
        count = examples_together(examples)
        yield from (
            Group([examples[index + side] for side in range(count)]) for index in range(0, len(examples), count)
        )
        return
    packs = plan_sequences(examples, data.max_length, data.packing, data.shuffle_seed)
    for number, pack in enumerate(packs, 1):
        yield Group([examples[int(index)] for index in pack], number, data.max_length)
