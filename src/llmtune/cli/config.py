"""`llmtune config ...`: show, compare, check and describe configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import ConfigName, Overrides
from llmtune.common.text import print_line
from llmtune.config.dump import config_to_dict, config_to_yaml, plain, value_text
from llmtune.config.keys import LEAVES, value_of
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.errors import ConfigError, Problem

__all__ = ["diff", "schema", "show", "validate"]


def show(
    overrides: Overrides = None,
    config: ConfigName = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Print each key with its value and where it comes from.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    commented: Annotated[bool, typer.Option("--commented", help="Print what each key means above it.")] = False,
) -> None:
    """Print the config that a run with these arguments would have."""
    resolved = load_config(config, overrides=overrides or ())
    for note in resolved.notes:
        print_line(note)
    if as_json:
        values: object = config_to_dict(resolved.config)
        if origin:
            values = {
                key: {"value": plain(value_of(resolved.config, key)), "origin": str(resolved.origins[key])}
                for key in LEAVES
            }
        print(json.dumps(values, indent=2, ensure_ascii=False))
    elif origin:
        print_origins(resolved)
    else:
        print(config_to_yaml(resolved.config, commented=commented), end="")


def print_origins(resolved: ResolvedConfig) -> None:
    """Print one line a key: its name, its value and its origin."""
    rows = [(key, value_text(value_of(resolved.config, key)), str(resolved.origins[key])) for key in LEAVES]
    widths = [min(max(len(row[column]) for row in rows), limit) for column, limit in ((0, 44), (1, 60))]
    for key, value, origin in rows:
        print(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A preset, a file, or a run's folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="A preset, a file, or a run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the keys in which two configs differ, with both values and their origins."""
    left, right = (load_config(name, environ={}) for name in (first, second))
    pairs = ((key, value_of(left.config, key), value_of(right.config, key)) for key in LEAVES)
    rows = [(key, a, b) for key, a, b in pairs if a != b]
    if as_json:
        print(json.dumps({key: {"a": plain(a), "b": plain(b)} for key, a, b in rows}, indent=2, ensure_ascii=False))
        return
    for key, a, b in rows:
        print(key)
        print(f"  - {value_text(a)}  ({left.origins[key]})")
        print(f"  + {value_text(b)}  ({right.origins[key]})")
    print_line(f"{len(rows)} of {len(LEAVES)} keys differ" if rows else "the two configs are equal")


def schema() -> None:
    """Print a JSON Schema (draft 2020-12) of the config file."""
    from llmtune.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...|KEY=VALUE...", help="Presets, YAML or JSON files; settings on top.")
    ],
) -> None:
    """Check config files and print every problem of all of them."""
    problems: list[Problem] = []
    settings = [word for word in files if "=" in word and not Path(word).exists()]
    names: list[str | None] = [word for word in files if word not in settings]
    for name in names or [None]:
        try:
            resolved = load_config(name, overrides=settings, environ={})
        except ConfigError as error:
            problems += (  # a file that does not exist was named by an argument here
                problem._replace(where="command line") if problem.where == "--config" else problem
                for problem in error.problems
            )
            continue
        for note in resolved.notes:
            print_line(note)
        print(f"{name or ' '.join(settings)}: ok")
    if problems:
        raise ConfigError.all(dict.fromkeys(problems))
