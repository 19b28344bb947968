"""One row of the model catalog, and what a model name resolves to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmtune.common.decisions import Decision

__all__ = ["Availability", "CatalogEntry", "ModelSource", "ScratchShape"]


Kind = Literal["scratch", "folder", "gguf", "hub"]


Availability = Literal[
    "from scratch", "local folder", "installed", "in the hub cache", "needs download", "needs download, gated"
]


@dataclass(frozen=True)
class ScratchShape:
    """Shape of a from-scratch model: blocks, width, heads, and the vocabulary trained for it when no tokenizer is named
    (entries).
    """

    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    max_seq_len: int = 2048


@dataclass(frozen=True)
class CatalogEntry:
    """One row of `list-models`. `parameters` counts every weight once (tied ones too); `context` is in tokens."""

    name: str
    hub_id: str | None = None
    parameters: int | None = None
    context: int | None = None
    licence: str = "unknown"
    gated: bool = False
    method: str = "LoRA"
    path: str | None = None
    package_file: tuple[str, str] | None = None
    """(installed package, file in it) that carries this model as a GGUF file."""
    package_fix: str | None = None
    """The command that installs that package."""
    chat_template: str | None = None
    """Shipped chat template for a model that was published without one."""
    shape: ScratchShape | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `model.architecture` that a user's own from-scratch row sets."""

    @property
    def source(self) -> str:
        """Where the weights come from, for a table."""
        return "from scratch" if self.shape else (self.path or self.hub_id or "?")


@dataclass(frozen=True)
class ModelSource:
    """A resolved `model.name`. `location` is a folder, a file, a hub id or the name of a from-scratch shape."""

    kind: Kind
    location: str
    name: str
    entry: CatalogEntry | None = None
    revision: str | None = None
    offline: bool = False
    decisions: tuple[Decision, ...] = ()

    @property
    def short_name(self) -> str:
        """What `{model}` in a run's name becomes: the catalog name, or the last part of the path or hub id."""
        name = self.entry.name if self.entry else Path(self.name.rstrip("/")).name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name.removesuffix(".gguf")).strip("-.") or "model"
