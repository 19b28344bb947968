"""GGUF files: dequantized once into a cache folder that loads like any other model, and checked by digest ever after.

Reading a GGUF file takes transformers about 15 s for 135 M parameters; the converted folder loads in about one. The
weights are kept in float32, which holds every dequantized value exactly as the converter computed it.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Mapping
from contextlib import redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmtune import durable
from llmtune.common.folders import cache_folder
from llmtune.durable.files import stamp_of
from llmtune.errors import MachineError, ModelError, in_one_line
from llmtune.models.quiet_libraries import quiet_libraries, translate_save_errors

__all__ = ["converted_folder", "converted_weights_digest", "model_cache_folder", "read_gguf"]

_FORMAT = 1
"""Raised when a change here makes a different folder from the same file."""

_DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` that split off every digit before the byte-level merges; transformers leaves that step
out for them.
"""


def model_cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of converted models, in llmtune's cache folder; raises MachineError where there is no home folder."""
    folder = cache_folder(environ)
    if folder is None:
        fix = "set LLMTUNE_CACHE_DIR to a folder that can be written"
        raise MachineError("there is no home folder to keep converted models in", fix=fix)
    return folder / "models"


def converted_folder(gguf: Path, *, weights: bool = True, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder with the converted model of this GGUF file: config, safetensors, tokenizer and chat template.

    Made on first use; a process compares every byte with the manifest before its first use, and again when a file has
    changed since, and a folder that does not fit is made anew. With weights=False only the small files are wanted, and
    the bytes of the weights are compared when somebody asks for those. Raises ModelError when the file cannot be read
    as a model, MachineError when the cache cannot be written.
    """
    digest = _file_digest(gguf, _stamp(gguf))
    folder = model_cache_folder(environ) / f"gguf-{digest[:32]}-v{_FORMAT}"
    if folder.is_dir():
        if _is_whole(
            folder, "" if weights else "*.safetensors", tuple(_stamp(file) for file in sorted(folder.rglob("*")))
        ):
            return folder
        durable.remove_tree(folder)
    durable.make_folder(folder.parent)
    durable.remove_leftovers(folder.parent)
    manifest: dict[str, Any] = {"made_from": gguf.name, "gguf_sha256": digest}
    with durable.commit_folder(folder, manifest=manifest) as staging:
        _convert(gguf, staging)
    return folder


def converted_weights_digest(folder: Path) -> str | None:
    """Digest of the weights as recorded when the folder was made; None for a folder that was not made here."""
    path = folder / _DIGEST_FILE
    return path.read_text(encoding="ascii").strip() if path.is_file() else None


def read_gguf(gguf: Path, empty_folder: Path) -> tuple[Any, Any]:
    """Return (model in float32, tokenizer) as transformers reads them from the file alone.

    Its splitting of digits is put right.

    The empty folder stands for the model, so that nothing beside the file (an adapter, a config that names code) is
    read. Raises ModelError when the file cannot be read as a model.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    try:
        with quiet_libraries(), redirect_stderr(io.StringIO()):  # this progress bar knows no other way to be quiet
            options: dict[str, Any] = {"gguf_file": str(gguf.resolve()), "local_files_only": True}
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(empty_folder), **options)
            model = AutoModelForCausalLM.from_pretrained(
                str(empty_folder), dtype=torch.float32, trust_remote_code=False, **options
            )
    except _UNREADABLE as error:
        raise ModelError(
            f"{gguf.name} cannot be read as a model: {in_one_line(error)}",
            where=str(gguf),
            fix="check the file (a GGUF of a language model), or use the model's own safetensors folder",
        ) from error
    _restore_digit_splitting(gguf, tokenizer)
    return model, tokenizer


def _convert(gguf: Path, folder: Path) -> None:
    from llmtune.models.weights import inspect_weights

    model, tokenizer = read_gguf(gguf, folder)
    # What is written is a plain model: the trace of its origin would keep transformers from saving it and from loading
    # it as safetensors.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010 - not a module or tensor, as the type checker believes
    model.config.architectures = [type(model).__name__]
    with translate_save_errors(folder):
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    report = inspect_weights(sorted(folder.glob("*.safetensors")))
    durable.write_text(folder / _DIGEST_FILE, report.digest + "\n")


def _restore_digit_splitting(gguf: Path, tokenizer: Any) -> None:
    """Put back the digit-by-digit step that some byte-level tokenizers have.

    Without it "  7" becomes other tokens than in pretraining.
    """
    from tokenizers import pre_tokenizers

    if _metadata_text(gguf, "tokenizer.ggml.pre") not in _DIGIT_BY_DIGIT:
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _metadata_text(gguf: Path, wanted: str) -> str | None:
    """One text value of a GGUF file's metadata; None when there is none of that name.

    The layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, numbers of tensors and of
    entries, the entries. The gguf package reads every value of the file for this, which takes seconds.
    """
    with gguf.open("rb") as file:

        def number(code: str) -> Any:
            return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

        def value(kind: int) -> Any:
            if kind in _NUMBERS:
                return number(_NUMBERS[kind])
            if kind == _TEXT:
                return file.read(number("Q"))
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]

        file.seek(16)  # magic, version, number of tensors
        for _ in range(number("Q")):
            key, kind = file.read(number("Q")), number("I")
            found = value(kind)
            if key == wanted.encode():
                return bytes(found).decode("utf-8") if kind == _TEXT else None
    return None


def _stamp(path: Path) -> tuple[str, tuple[int, int, int]]:
    """What changes with a file, its name included. Raises ModelError when there is no file."""
    try:
        return path.name, stamp_of(path.stat())
    except OSError as error:
        raise _not_there(path, error) from error


@lru_cache(maxsize=8)
def _is_whole(folder: Path, unread: str, _stamps: tuple[Any, ...]) -> bool:
    """Whether every byte of the folder fits its manifest, those of files named like `unread` excepted.

    One command asks for tokenizer, shape and weights, which are read once.
    """
    return not durable.verify_manifest(folder, unread=unread)


@lru_cache(maxsize=8)
def _file_digest(path: Path, _stamp: tuple[Any, ...]) -> str:
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise _not_there(path, error) from error


def _not_there(path: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{path} cannot be read: {error.strerror}", where=str(path), fix="check the file and its permissions"
    )


_DIGEST_FILE = "weights.sha256"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT = 8
_UNREADABLE = (
    ValueError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)
"""What the readers of this format raise for a file that is damaged or of another kind; they check little themselves."""
