"""The parameters that many commands share, described once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["ConfigName", "Dtype", "Overrides"]

ConfigName = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A preset (test, development, production, quickstart) or a YAML or JSON file."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that override the config, by dotted key.")
]


class Dtype(StrEnum):
    """Types a model can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
