"""Small files of a model as the libraries read them: whatever those raise for a damaged file ends as one error that
names it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtune.errors import ModelError, TokenizerError, in_one_line
from llmtune.models.quiet_libraries import quiet_libraries

__all__ = ["garbage_collection_paused", "read_config", "read_fast_tokenizer"]

_COMPLAINTS = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError, OSError, ImportError,
)  # fmt: skip
"""What the libraries raise for values they did not expect."""


class _Unreadable(Exception):
    """A library could not make sense of a file; its message is one line."""


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """While inside, Python looks for no cycles of garbage; what is no cycle is freed as ever.

    Importing the libraries and reading a vocabulary makes a million objects that stay, and each round of the collector
    would walk them all: half a second of processor time of every command that reads a tokenizer.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of the model in `folder`. Raises ModelError that names its config.json."""
    from transformers import AutoConfig

    try:
        config = _ask(
            lambda: AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
        )
    except _Unreadable as error:
        raise _no_model(folder, str(error)) from error
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(config.get_text_config(), name, None) == 0:
            raise _no_model(folder, f"{name} is 0")
    return config


def _no_model(folder: Path, reason: str) -> ModelError:
    fix = "fetch the file again, or correct that value"
    return ModelError(
        f"config.json describes no model that can be built: {reason}", where=str(folder / "config.json"), fix=fix
    )


def read_fast_tokenizer(folder: Path, where: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`, in its fast form.

    Raises TokenizerError at `where`; ModelError where the config.json beside it is bad.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = _ask(
            lambda: AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        )
    except _Unreadable as error:
        if (folder / "config.json").is_file():
            read_config(folder, trust_remote_code=trust_remote_code)  # the library reads that too
        fix = "fetch it again, or name another one in model.tokenizer"
        raise TokenizerError(f"the tokenizer in {folder} cannot be read: {error}", where=where, fix=fix) from error
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"the tokenizer in {folder} has no fast form ({type(tokenizer).__name__})",
            where=where,
            fix="save it once with a tokenizer.json, or name another tokenizer in model.tokenizer",
        )
    return tokenizer


def _ask(read: Callable[[], Any]) -> Any:
    """Let a library read.

    What it raises for a bad file becomes _Unreadable, everything else (an exhausted memory) stays what it is.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_libraries():
            return read()
    except (*_COMPLAINTS, StrictDataclassError) as error:
        raise _Unreadable(in_one_line(error)) from error
    except Exception as error:
        if (
            type(error) is not Exception
        ):  # the tokenizers library, which is not Python, raises that bare class and no other
            raise
        raise _Unreadable(in_one_line(error)) from error
