"""Read a model's config and tokenizer through transformers; any error for a damaged file names that file."""

from __future__ import annotations

import gc
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llmtune import durable
from llmtune.errors import ModelError, TokenizerError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

__all__ = [
    "Context",
    "auto_class",
    "context_of",
    "garbage_collection_paused",
    "quiet_libraries",
    "read_config",
    "read_fast_tokenizer",
    "translate_save_errors",
]


_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
_LOGGERS = ("transformers", "peft", "accelerate", "huggingface_hub", "tokenizers", "gguf")


def auto_class(labels: Sequence[str]) -> Any:
    """Return the class of transformers that loads a model with these labels: a causal language model where none."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if labels else AutoModelForCausalLM


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
    _set_levels(dict.fromkeys(_LOGGERS, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_levels(levels)
        if bar_was_on:
            transformers_logging.enable_progress_bar()
        if not hub_bar_was_off:
            enable_progress_bars()


def _set_levels(levels: Mapping[str, int]) -> None:
    """Set the levels of loggers."""
    loggers = [logging.getLogger(name) for name in levels]
    if all(logger.level == levels[logger.name] for logger in loggers):
        return
    for logger in loggers:
        logger.level = levels[logger.name]
    # This clears what hundreds of loggers remember of levels: half a millisecond, so once and not for each of them.
    loggers[0].setLevel(loggers[0].level)


@contextmanager
def translate_save_errors(folder: Path) -> Iterator[None]:
    """Let a library write into `folder`, quietly.

    Raises MachineError for an OSError of the system, as on a full disk.
    """
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


_T = TypeVar("_T")
_LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
    ImportError,
)
"""Raised by the libraries for unexpected values in a file."""


class _Unreadable(Exception):
    """A library could not read a file; the message is one line."""


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's search for reference cycles; objects outside of cycles are freed as always.

    Importing the libraries and reading a vocabulary makes a million objects that stay, and each collection would walk
    them all: half a second of processor time of every command that reads a tokenizer.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the transformers config of the model in `folder`. Raises ModelError that names its config.json."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = _call_library(
            lambda: AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
        )
    except _Unreadable as error:
        raise _no_model(folder, str(error)) from error
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(config.get_text_config(), name, None) == 0:
            raise _no_model(folder, f"{name} is 0")
    return config


@dataclass(frozen=True)
class Context:
    """The tokens a model sees at once."""

    tokens: int
    ends: bool
    """Positions come from a table that ends there (GPT-2), so a longer row cannot be computed at all. False where they
    are computed (rotary) or only hinted at: a longer row is computed, and means little to the model."""


def context_of(config: PreTrainedConfig) -> Context | None:
    """Return the context of the model with this config; None where its config names none.

    Rotary positions that are stretched (YaRN, arXiv:2309.00071) reach `factor` times as far as those of pretraining.
    """
    text = config.get_text_config()
    tokens = getattr(text, "max_position_embeddings", None)
    if not isinstance(tokens, int) or tokens < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = (
        (rope.get("original_max_position_embeddings"), rope.get("factor")) if isinstance(rope, dict) else (None, None)
    )
    if isinstance(original, int) and isinstance(factor, (int, float)):
        tokens = max(tokens, int(original * factor))
    is_computed = bool(rope) or getattr(text, "rope_theta", None) is not None or bool(getattr(text, "alibi", False))
    return Context(tokens, ends=not is_computed and text.model_type not in _WITHOUT_TABLE)


def _no_model(folder: Path, reason: str) -> ModelError:
    fix = "fetch the file again, or correct that value"
    return ModelError(
        f"config.json describes no model that can be built: {reason}", where=str(folder / "config.json"), fix=fix
    )


def read_fast_tokenizer(folder: Path, where: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Return the tokenizer in `folder` in its fast form.

    where: named by the errors. Raises TokenizerError when it cannot be read or has no fast form, ModelError when the
    config.json beside it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = _call_library(
            lambda: AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        )
    except _Unreadable as error:
        if (folder / "config.json").is_file():
            read_config(folder, trust_remote_code=trust_remote_code)  # transformers reads that too: it may be at fault
        fix = "fetch it again, or name another one in model.tokenizer"
        raise TokenizerError(f"the tokenizer in {folder} cannot be read: {error}", where=where, fix=fix) from error
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"the tokenizer in {folder} has no fast form ({type(tokenizer).__name__})",
            where=where,
            fix="save it once with a tokenizer.json, or name another tokenizer in model.tokenizer",
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def _call_library(read: Callable[[], _T]) -> _T:
    """Return what `read` returns; raises _Unreadable for the errors of a bad file, others (no memory) pass through."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_libraries():
            return read()
    except (*_LIBRARY_ERRORS, StrictDataclassError) as error:
        raise _Unreadable(in_one_line(error)) from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library, written in Rust, raises that bare class
            raise
        raise _Unreadable(in_one_line(error)) from error


_WITHOUT_TABLE = frozenset(
    ("inkling2_text", "inkling_text", "jamba", "kimi_linear", "nemotron_h", "rwkv", "xlnet", "zamba")
)
"""Model types that name a longest sequence and neither rotary positions nor a table of positions."""
