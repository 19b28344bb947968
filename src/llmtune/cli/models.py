"""`llmtune list-models`: the models that have a name, and whether they are on this machine."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.common.text import print_line

if TYPE_CHECKING:
    from llmtune.models.catalog_entry import CatalogEntry

__all__ = ["list_models"]


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Count from-scratch models with this tokenizer's vocabulary.")
    ] = None,
) -> None:
    """List the models that have a name; any hub id, folder or .gguf file works as model.name too."""
    from llmtune.models.catalog import availability, catalog

    rows = []
    for entry in catalog().values():
        parameters, source = entry.parameters, entry.source
        if entry.shape:
            vocabulary = _vocabulary(tokenizer) if tokenizer else entry.shape.vocab_size
            parameters, source = _scratch(entry, vocabulary)
        rows.append((entry, parameters, source, availability(entry)))
    if as_json:
        for entry, parameters, source, available in rows:
            fields = {
                "name": entry.name,
                "parameters": parameters,
                "context": entry.context,
                "source": source,
                "licence": entry.licence,
                "gated": entry.gated,
                "available": available,
                "method": entry.method,
                "hub_id": entry.hub_id,
                "shape": asdict(entry.shape) if entry.shape else None,
            }
            print(json.dumps(fields))
        return
    table = [("name", "parameters", "context", "source", "licence", "here", "method")]
    for entry, parameters, source, available in rows:
        count = f"{parameters:,}" if parameters else "?"
        context = f"{entry.context:,}" if entry.context else "?"
        table.append((entry.name, count, context, source, entry.licence, available, entry.method))
    left_out = _print_table(table, width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    if left_out:
        print_line(f"a wider terminal also shows {' and '.join(left_out)}; --json gives everything")
    print_line(
        "also works as model.name: any hub id, a folder saved with save_pretrained, a .gguf file; "
        "add your own in models.yaml"
    )


def _scratch(entry: CatalogEntry, vocabulary: int) -> tuple[int, str]:
    """(parameters, shape in words) of a from-scratch model with that many vocabulary entries."""
    from llmtune.config.schema import ArchitectureConfig
    from llmtune.models.scratch import choose_architecture, parameter_count

    shape = choose_architecture(entry, ArchitectureConfig(vocab_size=vocabulary), vocabulary)
    return parameter_count(shape), f"from scratch, {shape.n_layers} x {shape.d_model}, {vocabulary:,} entries"


def _vocabulary(folder: Path) -> int:
    """Ids of the tokenizer in this folder (its largest id + 1), read from tokenizer.json. Raises TokenizerError."""
    from llmtune.errors import ModelError, TokenizerError
    from llmtune.models.scan import read_json_file

    path = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        content = read_json_file(path)
        vocabulary = content["model"]["vocab"]
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))]
        return int(max([*ids, *(token["id"] for token in content["added_tokens"])])) + 1
    except (ModelError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path} is no tokenizer file", where="--tokenizer", fix="name a folder with tokenizer.json"
        ) from error


_NUMBERS = ("parameters", "context")
_LEFT_OUT_FIRST = ("licence", "context", "source")


def _print_table(rows: Sequence[tuple[str, ...]], *, width: int | None) -> list[str]:
    """Print the rows under their headings, in `width` characters where there is a limit.

    Returns the names of the columns that were left out for the width.
    """
    columns = [(len(max(cells, key=len)), cells) for cells in zip(*rows, strict=True)]
    left_out = []
    for name in _LEFT_OUT_FIRST:
        if width is None or sum(size + 2 for size, _ in columns) - 2 <= width:
            break
        columns = [(size, cells) for size, cells in columns if cells[0] != name]
        left_out.append(name)
    for line in zip(
        *(
            [cell.rjust(size) if cells[0] in _NUMBERS else cell.ljust(size) for cell in cells]
            for size, cells in columns
        ),
        strict=True,
    ):
        print("  ".join(line).rstrip())
    return left_out
