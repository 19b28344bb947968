"""Paths: those in a config (characters that none can have, files beside it), and the files that come with llmtune.

Shipped are `configs/`, `docs/` and `example-data/`: in the installed package, or in the source checkout.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.common.environment import home_expanded
from llmtune.common.text import excerpt
from llmtune.config.keys import value_of
from llmtune.config.schema import SourceConfig
from llmtune.errors import LlmtuneError, Problem

if TYPE_CHECKING:
    from llmtune.config.layers import ResolvedConfig

__all__ = ["PATH_KEYS", "config_folder_named", "path_problem", "shipped_path", "shipped_presets"]

PATH_KEYS = (
    "run.output_dir",
    "model.name",
    "model.tokenizer",
    "model.chat_template",
    "adapter.start_from",
    "data.train",
    "data.eval",
    "data.cache_dir",
    "distributed.deepspeed_config",
)
"""Keys whose values may be paths."""

# `$` may stand in a name: without braces a variable fills a whole part of the path, in capitals.
_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}|(?<![^/])\$[A-Z_][A-Z0-9_]{2,}(?![^/])")


def path_problem(key: str, value: object) -> tuple[str, str] | None:
    """Return the problem and the fix of a path that is not read as it is meant, or None.

    A variable of the shell is not filled in; a name that the file system's encoding lacks could not be opened.
    """
    if key not in PATH_KEYS and key != "run.name":
        return None
    for path in _paths(value):
        variable = _VARIABLE.search(path)
        if variable and key != "run.name" and not os.path.lexists(path):
            problem = f"holds a variable, which is not filled in (`{variable.group()}`)"
            name = f"LLMTUNE_{key.upper().replace('.', '__')}"
            return problem, f"write the path out, or let the shell fill it in: `{name}={excerpt(path)}`"
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            problem = f"has characters that file names cannot have here ({sys.getfilesystemencoding().upper()})"
            return problem, "set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8"
    return None


def _paths(value: object) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    paths = [item.path if isinstance(item, SourceConfig) else item for item in values]
    return [path for path in paths if isinstance(path, str)]


@contextlib.contextmanager
def config_folder_named(resolved: ResolvedConfig) -> Iterator[None]:
    """Let an error about a path name the file of that path beside the config file, where there is one.

    Raises the LlmtuneError of the body, of the same kind.
    """
    try:
        yield
    except LlmtuneError as error:
        problems = [_with_config_folder(problem, resolved) for problem in error.problems]
        if tuple(problems) == error.problems:
            raise
        hinted = type(error).all(problems)
        hinted.is_reported = error.is_reported
        raise hinted from error


def _with_config_folder(problem: Problem, resolved: ResolvedConfig) -> Problem:
    key, _, index = (problem.where or "").partition("[")
    if key not in PATH_KEYS or resolved.origins[key].kind != "file":
        return problem
    paths = _paths(value_of(resolved.config, key))
    path = paths[int(index[:-1])] if index[:-1].isdigit() and int(index[:-1]) < len(paths) else paths[0]
    beside = Path(resolved.origins[key].where.rpartition(":")[0]).parent / path
    with contextlib.suppress(OSError, ValueError):
        if beside.exists() and not home_expanded(path).exists():
            fix = f"paths are taken from the working folder, and this one lies beside the config file: write `{beside}`"
            return problem._replace(fix=fix)
    return problem


def shipped_path(relative: str) -> Path:
    """Return the path of a shipped file or folder such as `configs/test.yaml`; it need not exist.

    The installed package has them under `_shipped/`, a source checkout at its root.
    """
    package = Path(__file__).parents[1]
    installed = package / "_shipped"
    return (installed if installed.is_dir() else package.parent.parent) / relative


def shipped_presets() -> dict[str, Path]:
    """Return the shipped presets by name."""
    return {path.stem: path for path in sorted(shipped_path("configs").glob("*.yaml"))}
