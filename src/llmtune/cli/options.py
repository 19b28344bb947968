"""The parameters that many commands share, described once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["ConfigName", "Overrides"]

ConfigName = Annotated[
    str | None, typer.Option("--config", "-c", help="A preset (test, development, production, quickstart) or a YAML or JSON file.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that override the config, by dotted key.")]
