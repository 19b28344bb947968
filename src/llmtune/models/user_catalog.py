"""A user's own rows of `list-models`: `models.yaml` or `models.json` in the working folder, or the file named by
LLMTUNE_MODELS.

For example (a row has exactly one of `path`, `hub_id` and `architecture`):

    my-llama:
      path: /models/my-llama        # a folder or a .gguf file
      parameters: 1000000000
      method: LoRA
    my-small:
      architecture: {n_layers: 6, d_model: 384, n_heads: 6, vocab_size: 8192}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmtune.config.convert import Mismatch, convert, expected
from llmtune.config.document import Entry, Table, Unreadable, parse_yaml, read_text, shown
from llmtune.config.json_document import parse_json
from llmtune.config.keys import field_types
from llmtune.config.origin import Origin
from llmtune.config.schema import ArchitectureConfig
from llmtune.errors import ModelError, Problem
from llmtune.models.catalog_entry import CatalogEntry, ScratchShape

__all__ = ["read_user_catalog"]

_TYPES: dict[str, Any] = {
    "hub_id": str,
    "path": str,
    "parameters": int,
    "context": int,
    "licence": str,
    "gated": bool,
    "method": str,
    "chat_template": str,
}
_PLACES = ("hub_id", "path", "architecture")


def read_user_catalog(environ: Mapping[str, str]) -> list[CatalogEntry]:
    """The user's rows, in the order of the file; none when there is no file.

    Raises ModelError with everything that is wrong, each with its line.
    """
    named = environ.get("LLMTUNE_MODELS")
    candidates = [Path(named).expanduser()] if named else [Path("models.yaml"), Path("models.json")]
    path = next((one for one in candidates if one.is_file()), None)
    if path is None:
        if named:
            raise ModelError(f"there is no file `{named}`", where="LLMTUNE_MODELS", fix="correct or unset the variable")
        return []
    problems: list[Problem] = []
    table = _read(path, problems)
    entries = [_entry(row, problems) for row in table.entries] if table else []
    if problems:
        raise ModelError.all(problems)
    return entries


def _read(path: Path, problems: list[Problem]) -> Table | None:
    try:
        text = read_text(path, str(path))
        parse = parse_json if path.suffix == ".json" else parse_yaml
        root = parse(text, lambda line: Origin("file", f"{path}:{line}"), problems)
    except Unreadable as unreadable:
        problems.append(unreadable.problem)
        return None
    if not isinstance(root, Table):
        problems.append(
            Problem("a model file is a mapping from names to what they are", str(path), "begin with `my-model:`")
        )
        return None
    return root


def _entry(row: Entry, problems: list[Problem]) -> CatalogEntry:
    def wrong(problem: str, fix: str, place: str | None = row.origin.place) -> None:
        problems.append(Problem(problem, place, fix))

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", row.key):
        wrong(f"`{row.key}` cannot be a model's name", "use letters, digits, dots and dashes")
    if not isinstance(row.value, Table):
        wrong(f"`{row.key}` is no mapping", f"give it exactly one of {', '.join(_PLACES)}")
        return CatalogEntry(row.key)
    written = {entry.key: entry for entry in row.value.entries}
    if sum(key in written for key in _PLACES) != 1:
        wrong(f"`{row.key}` needs exactly one of {', '.join(_PLACES)}", "say where it comes from")
    place = written.pop("architecture", None)
    values = _values(written, _TYPES, problems)
    if place is None or not isinstance(place.value, Table):
        return CatalogEntry(row.key, **values)
    shape = _values({entry.key: entry for entry in place.value.entries}, field_types(ArchitectureConfig), problems)
    missing = [key for key in ("n_layers", "d_model", "n_heads") if shape.get(key) is None]
    if missing:
        wrong(f"the architecture of `{row.key}` lacks {', '.join(missing)}", "give whole numbers", place.origin.place)
        return CatalogEntry(row.key, **values)
    known = {key: shape[key] for key in ("vocab_size", "max_seq_len") if shape.get(key) is not None}
    scratch = ScratchShape(shape["n_layers"], shape["d_model"], shape["n_heads"], **{"vocab_size": 16_384, **known})
    values = {"method": "full", "licence": "yours", "context": scratch.max_seq_len, **values}
    return CatalogEntry(row.key, shape=scratch, architecture=shape, **values)


def _values(written: Mapping[str, Entry], types: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The written values by the declared types; what cannot be converted is added to `problems`."""
    values: dict[str, Any] = {}
    for key, entry in written.items():
        if key not in types:
            near = get_close_matches(key, types, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"the keys are {', '.join(types)}"
            problems.append(Problem(f"unknown key `{key}`", entry.origin.place, hint))
            continue
        try:
            values[key] = convert(entry.value, types[key])
        except Mismatch:
            problems.append(
                Problem(f"`{key}` cannot be `{shown(entry.value)}`", entry.origin.place, f"give {expected(types[key])}")
            )
    return values
