"""The switches that keep libraries off the network; set before any of them is imported."""

from __future__ import annotations

import os

__all__ = ["allow_no_telemetry", "go_offline"]


def allow_no_telemetry() -> None:
    """Tell the libraries below to report nothing home, whatever their default."""
    os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "DISABLE_TELEMETRY": "YES", "WANDB_ERROR_REPORTING": "false"})


def go_offline() -> None:
    """Tell the libraries below to make no connection; wandb keeps its records on disk."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LLMTUNE_OFFLINE": "1"})
    if os.environ.get("WANDB_MODE") != "disabled":
        os.environ["WANDB_MODE"] = "offline"
