"""Keys of a config whose values contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmtune.config.document import Origin
from llmtune.config.schema import Config

__all__ = ["Contradiction"]


@dataclass(frozen=True)
class Contradiction:
    """Keys whose values contradict each other where `when(config, origins)` is true."""

    keys: tuple[str, ...]
    when: Callable[[Config, Mapping[str, Origin]], bool]
    problem: str
    fix: str
