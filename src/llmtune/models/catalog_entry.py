"""The rows of the model catalog, a user's own rows, and the source that a model name resolves to.

A user's rows are in `models.yaml` or `models.json` of the working folder, or in the file named by LLMTUNE_MODELS. A row
has exactly one of `path`, `hub_id` and `architecture`, for example:

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
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from llmtune.common.decisions import Decision
from llmtune.common.environment import home_expanded
from llmtune.config.convert import Mismatch, convert, expected
from llmtune.config.document import Entry, Origin, Table, Unreadable, parse_yaml, read_text, shown
from llmtune.config.json_document import parse_json
from llmtune.config.keys import field_types
from llmtune.config.schema import ArchitectureConfig
from llmtune.errors import ModelError, Problem

__all__ = [
    "Availability",
    "CatalogEntry",
    "ModelSource",
    "ScratchShape",
    "read_user_catalog",
]


Kind = Literal["scratch", "folder", "gguf", "hub"]


Availability = Literal[
    "from scratch", "local folder", "installed", "in the hub cache", "needs download", "needs download, gated"
]


@dataclass(frozen=True)
class ScratchShape:
    """Shape of a from-scratch model."""

    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    """Entries of the tokenizer that is trained for it when the config names none."""
    max_seq_len: int = 2048
    """Longest sequence, in tokens."""


@dataclass(frozen=True)
class CatalogEntry:
    """One row of `list-models`."""

    name: str
    hub_id: str | None = None
    parameters: int | None = None
    """Number of weights, tied ones once."""
    context: int | None = None
    """Longest sequence, in tokens."""
    licence: str = "unknown"
    method: str = "LoRA"
    """Tuning method that suits its size."""
    gated: bool = False
    """The hub gives it only after its licence was accepted."""
    path: str | None = None
    package_file: tuple[str, str] | None = None
    """(installed package, file in it) that carries this model as a GGUF file."""
    package_fix: str | None = None
    """The command that installs that package."""
    chat_template: str | None = None
    """Shipped chat template for a model that was published without one."""
    shape: ScratchShape | None = None
    architecture: Mapping[str, object] = field(default_factory=dict)
    """Keys of `model.architecture` that a user's own from-scratch row sets."""

    @property
    def source(self) -> str:
        """Where the weights come from, for a table."""
        return "from scratch" if self.shape else (self.path or self.hub_id or "?")


@dataclass(frozen=True)
class ModelSource:
    """A resolved `model.name`."""

    kind: Kind
    location: str
    """A folder, a file, a hub id or the name of a from-scratch shape, by `kind`."""
    name: str
    """The name as the user wrote it."""
    entry: CatalogEntry | None = None
    revision: str | None = None
    offline: bool = False
    decisions: tuple[Decision, ...] = ()

    @property
    def short_name(self) -> str:
        """The value of `{model}` in a run's name: the catalog name, or the last part of the path or hub id."""
        path = Path(self.name.rstrip("/"))
        if re.fullmatch(r"final|best|step-\d+", path.name):  # what a run saved bears the run's name
            path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        name = self.entry.name if self.entry else path.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name.removesuffix(".gguf")).strip("-.") or "model"


_TYPES: dict[str, type] = {
    "hub_id": str,
    "path": str,
    "parameters": int,
    "context": int,
    "licence": str,
    "gated": bool,
    "method": str,
    "chat_template": str,
}
_SOURCE_KEYS = ("hub_id", "path", "architecture")


def read_user_catalog(environ: Mapping[str, str]) -> list[CatalogEntry]:
    """Return the user's rows in the order of the file; an empty list without a file.

    Raises ModelError with all problems of the file, each with its line.
    """
    named = environ.get("LLMTUNE_MODELS")
    candidates = [home_expanded(named)] if named else [Path("models.yaml"), Path("models.json")]
    path = next((file for file in candidates if file.is_file()), None)
    if path is None:
        if named:
            raise ModelError(f"there is no file `{named}`", where="LLMTUNE_MODELS", fix="correct or unset the variable")
        return []
    problems: list[Problem] = []
    table = _read_table(path, problems)
    entries = [_catalog_entry(row, problems) for row in table.entries] if table else []
    if problems:
        raise ModelError.all(problems)
    return entries


def _read_table(path: Path, problems: list[Problem]) -> Table | None:
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


def _catalog_entry(row: Entry, problems: list[Problem]) -> CatalogEntry:
    def report(problem: str, fix: str, where: str | None = row.origin.where) -> None:
        problems.append(Problem(problem, where, fix))

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", row.key):
        report(f"`{row.key}` cannot be a model's name", "use letters, digits, dots and dashes")
    if not isinstance(row.value, Table):
        report(f"`{row.key}` is no mapping", f"give it exactly one of {', '.join(_SOURCE_KEYS)}")
        return CatalogEntry(row.key)
    written = {entry.key: entry for entry in row.value.entries}
    if sum(key in written for key in _SOURCE_KEYS) != 1:
        report(f"`{row.key}` needs exactly one of {', '.join(_SOURCE_KEYS)}", "say where it comes from")
    architecture = written.pop("architecture", None)
    values = _convert_values(written, _TYPES, problems)
    if architecture is None or not isinstance(architecture.value, Table):
        return CatalogEntry(row.key, **values)
    keys = {entry.key: entry for entry in architecture.value.entries}
    shape = _convert_values(keys, field_types(ArchitectureConfig), problems)
    missing = [key for key in ("n_layers", "d_model", "n_heads") if shape.get(key) is None]
    if missing:
        problem = f"the architecture of `{row.key}` lacks {', '.join(missing)}"
        report(problem, "give whole numbers", architecture.origin.where)
        return CatalogEntry(row.key, **values)
    optional = {key: shape[key] for key in ("vocab_size", "max_seq_len") if shape.get(key) is not None}
    scratch = ScratchShape(shape["n_layers"], shape["d_model"], shape["n_heads"], **{"vocab_size": 16_384, **optional})
    values = {"method": "full", "licence": "yours", "context": scratch.max_seq_len, **values}
    return CatalogEntry(row.key, shape=scratch, architecture=shape, **values)


def _convert_values(written: Mapping[str, Entry], types: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Convert the written values to the declared types; appends a problem for each that cannot be converted."""
    values: dict[str, Any] = {}
    for key, entry in written.items():
        if key not in types:
            near = get_close_matches(key, types, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"the keys are {', '.join(types)}"
            problems.append(Problem(f"unknown key `{key}`", entry.origin.where, hint))
            continue
        try:
            values[key] = convert(entry.value, types[key])
        except Mismatch:
            problems.append(
                Problem(f"`{key}` cannot be `{shown(entry.value)}`", entry.origin.where, f"give {expected(types[key])}")
            )
    return values
