"""llmtune: fine-tune causal language models from one layered YAML config, with training that can be checked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtune.api import Curve, Result, Stop, Trainer, train, train_single_model
    from llmtune.config.layers import load_config


__all__ = ["Curve", "Result", "Stop", "Trainer", "load_config", "train", "train_single_model"]

# Where each name lives: it is imported when it is first used, so that `import llmtune` stays light.
_HOMES = dict.fromkeys(__all__, "llmtune.api") | {"load_config": "llmtune.config.layers"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
