"""One row of the model catalog, and the source that a model name resolves to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmtune.common.decisions import Decision

__all__ = ["Availability", "CatalogEntry", "ModelSource", "ScratchShape"]


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
