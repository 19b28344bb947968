"""What a process that will compute sets up before torch is imported."""

from __future__ import annotations

import os

__all__ = ["is_offline", "prepare_process"]


def is_offline() -> bool:
    """Whether this process was told to open no connection (`--offline`, or the libraries' own switch)."""
    return os.environ.get("LLMTUNE_OFFLINE") == "1" or os.environ.get("HF_HUB_OFFLINE") == "1"


def prepare_process(*, trains: bool = False) -> None:
    """Quiet the libraries' progress bars and advice; llmtune says itself what it does.

    trains: the process takes many equal steps, so freed memory is kept for the next one. Not for a merge, whose peak is promised.
    """
    from llmtune.training.memory import bound_kernel_caches, tune_allocator

    bound_kernel_caches()
    if trains:
        tune_allocator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
