"""Silence the model libraries, and turn the system errors hidden in their exceptions into MachineError."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune import durable

__all__ = ["quiet_libraries", "translate_save_errors"]

_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
_LOGGERS = ("transformers", "peft", "accelerate", "huggingface_hub", "tokenizers", "gguf")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Switch off progress bars, log lines below ERROR and Python warnings of the model libraries while inside.

    All settings are restored afterwards.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    hub_bar_was_off = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bar_was_on:
            transformers_logging.enable_progress_bar()
        if not hub_bar_was_off:
            enable_progress_bars()


@contextmanager
def translate_save_errors(folder: Path) -> Iterator[None]:
    """Let a library write into `folder`, quietly. Raises MachineError when the system refuses, as on a full disk."""
    with quiet_libraries(), durable.translate_os_errors("save", folder):
        try:
            yield
        except Exception as error:
            # safetensors and tokenizers (even a bare Exception) give the number of the system's error only in the text.
            refused = _ERROR_NUMBER.search(str(error))
            if refused is None:
                raise
            number = int(refused[1])
            raise OSError(number, os.strerror(number)) from error
