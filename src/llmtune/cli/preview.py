"""`llmtune data preview`: rows as the model will see them, before anything is trained."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmtune.cli.failure import print_line
from llmtune.cli.options import ConfigName, Overrides
from llmtune.config.layers import load_config

if TYPE_CHECKING:
    from llmtune.config.schema import DataConfig
    from llmtune.data.dataset.preview import Group
    from llmtune.data.example import ExampleSet

__all__ = ["preview"]


def preview(
    overrides: Overrides = None,
    config: ConfigName = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Rows (or packs) to show.")] = 5,
    show_all: Annotated[bool, typer.Option("--all", help="Show every row.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a row: source, input_ids, weights, text.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
    color: Annotated[Literal["auto", "always", "never"], typer.Option("--color", help="Colour the text.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Show rows as the model will see them: tokens, what is trained, packs.

    Exit code 3 if training would refuse the data.
    """
    resolved = load_config(config, overrides=overrides or ())

    from llmtune.cli.process import check_working_folder
    from llmtune.common.offline import is_offline

    check_working_folder()
    from llmtune.config.process_options import Options
    from llmtune.data.dataset.make_dataset import raise_problems, survey_data
    from llmtune.data.dataset.preview import html_page, json_line, legend, terminal_text
    from llmtune.durable import write_text
    from llmtune.prepare import find_model, open_renderer, open_tokenizer
    from llmtune.training.progress import tokenizing_progress

    options = Options(offline=is_offline(), trust_remote_code=trust_remote_code)
    loaded = open_tokenizer(resolved.config, find_model(resolved.config, options), options)
    renderer = open_renderer(resolved.config, loaded)
    prepared = survey_data(resolved.config.data, renderer, progress=tokenizing_progress(print_line))
    for decision in (*renderer.decisions, *prepared.decisions):
        print_line(str(decision))
    shown = None if show_all else count
    if as_json:
        for place in range(len(prepared.train) if shown is None else min(shown, len(prepared.train))):
            print(json_line(prepared.train[place], loaded.tokenizer))
    elif page is not None:
        groups = itertools.islice(_groups(prepared.train, resolved.config.data), shown)
        write_text(page, html_page(groups, loaded.tokenizer, title=f"{resolved.name}: rows as the model sees them"))
        print_line(f"wrote {page}")
    else:
        coloured = color == "always" or (color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        print_line(legend(color=coloured))
        for group in itertools.islice(_groups(prepared.train, resolved.config.data), shown):
            for line in terminal_text(group, loaded.tokenizer, color=coloured):
                print(line)
    raise_problems(prepared)


def _groups(examples: ExampleSet, data: DataConfig) -> Iterator[Group]:
    """Yield what is shown together: packs where the config packs, single rows in their order otherwise."""
    from llmtune.data.dataset.packing import plan_packs
    from llmtune.data.dataset.preview import Group

    if data.packing == "none":
        yield from (Group([examples[place]]) for place in range(len(examples)))
        return
    for number, pack in enumerate(
        plan_packs(examples.lengths, data.max_length, data.packing, data.shuffle_seed or 0), 1
    ):
        yield Group([examples[int(place)] for place in pack], number, data.max_length)
