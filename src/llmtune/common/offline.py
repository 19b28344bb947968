"""The switch that keeps llmtune and the libraries below it from opening connections."""

from __future__ import annotations

import os

__all__ = ["go_offline", "is_offline"]


def is_offline() -> bool:
    """Whether this process may open no connection: `--offline`, or the libraries' own switch."""
    return "1" in (os.environ.get("LLMTUNE_OFFLINE"), os.environ.get("HF_HUB_OFFLINE"))


def go_offline() -> None:
    """Set the environment such that the libraries make no connection; wandb keeps its records on disk."""
    os.environ.update(
        dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "LLMTUNE_OFFLINE"), "1")
    )
    if os.environ.get("WANDB_MODE") != "disabled":
        os.environ["WANDB_MODE"] = "offline"
