"""GGUF files: dequantized once into a cache folder that loads like any other model.

A file of 135 M parameters is read in about 7 s; the converted folder loads in about one. It keeps the weights in
float32, which holds every dequantized value exactly as the converter computed it. The folder is named after the digest
of the GGUF file and verified by its manifest before use.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import durable
from llmtune.common.environment import cache_folder
from llmtune.common.text import PrintLine, print_to_stderr
from llmtune.durable.files import stamp_of
from llmtune.errors import MachineError, ModelError, in_one_line
from llmtune.models.read_config import quiet_libraries, translate_save_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["converted_folder", "model_cache_folder", "read_gguf", "read_gguf_tokenizer"]

_FORMAT = 2
"""Raise it when a change of this module makes another folder from the same file."""

_DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` that split off every digit before the byte-level merges."""

_Stamp = tuple[str, tuple[int, int, int]]


def model_cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of converted models, in llmtune's cache folder.

    Raises MachineError where there is no home folder.
    """
    folder = cache_folder(environ)
    if folder is None:
        fix = "set LLMTUNE_CACHE_DIR to a folder that can be written"
        raise MachineError("there is no home folder to keep converted models in", fix=fix)
    return folder / "models"


def converted_folder(
    gguf: Path,
    *,
    weights: bool = True,
    environ: Mapping[str, str] = os.environ,
    print_line: PrintLine = print_to_stderr,
) -> Path:
    """Return the folder of the converted model: config, safetensors, tokenizer and chat template.

    The folder is made on first use. A process compares its bytes with the manifest before their first use and again
    when a file has changed since; a damaged folder is made anew. weights: False leaves the weight files unread, for
    callers that need only the config or the tokenizer. print_line: prints that a model is converted, which takes long.

    Raises ModelError when the file cannot be read as a model, MachineError when the cache cannot be written.
    """
    # By content: another file under the same name must not get the old folder.
    digest = _file_digest(gguf, _stamp(gguf))
    folder = model_cache_folder(environ) / f"gguf-{digest[:32]}-v{_FORMAT}"
    if folder.is_dir():
        stamps = tuple(_stamp(file) for file in sorted(folder.rglob("*")))
        if _is_intact(folder, "" if weights else "*.safetensors", stamps):
            return folder
        # It can be made again from the GGUF file, so nothing is lost.
        durable.remove_tree(folder)
    print_line(f"reading {gguf.name} once, which takes a while; it is then kept in {folder.parent}")
    durable.make_folder(folder.parent)
    durable.remove_leftovers(folder.parent)  # of a conversion that was killed
    with durable.commit_folder(folder, manifest={"made_from": gguf.name, "gguf_sha256": digest}) as staging:
        _convert(gguf, staging)
    return folder


def read_gguf(gguf: Path, empty_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return (model in float32, tokenizer) as transformers reads them, with the splitting of digits put right.

    empty_folder: stands for the model's folder, so that no file beside the GGUF file (an adapter, a config that names
    code) is read. Raises ModelError when the file cannot be read as a model.
    """
    import torch  # only here and below: this file also finds tokenizers, for which nothing that computes is loaded
    from transformers import AutoModelForCausalLM

    with _parsed_once():
        tokenizer = read_gguf_tokenizer(gguf, empty_folder)
        model = _read(gguf, empty_folder, AutoModelForCausalLM, dtype=torch.float32, trust_remote_code=False)
    return model, tokenizer


def read_gguf_tokenizer(gguf: Path, empty_folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a file (see `read_gguf`)."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = _read(gguf, empty_folder, PreTrainedTokenizerFast)
    _restore_splitting(gguf, tokenizer)
    return tokenizer


_PARSING = threading.Lock()
"""Held while names of the gguf package are replaced."""


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Keep what the gguf package has read while the body runs: half of the time of a conversion.

    transformers opens the file for the tokenizer, the config and the weights, and each time parses the vocabulary; the
    table of tensor names is made again for each module of the model.
    """
    import gguf

    with _PARSING:
        kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        for name, made in kept.items():
            setattr(gguf, name, cache(made))
        try:
            yield
        finally:
            for name, made in kept.items():
                setattr(gguf, name, made)


def _read(gguf: Path, empty_folder: Path, kind: Any, **options: object) -> Any:
    try:
        with quiet_libraries(), redirect_stderr(io.StringIO()):  # its progress bar has no switch
            return kind.from_pretrained(
                str(empty_folder), gguf_file=str(gguf.resolve()), local_files_only=True, **options
            )
    except _READER_ERRORS as error:
        raise ModelError(
            f"{gguf.name} cannot be read as a model: {in_one_line(error)}",
            where=str(gguf),
            fix="check the file (a GGUF of a language model), or use the model's own safetensors folder",
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    from llmtune.models.weights import inspect_weights  # loads torch

    model, tokenizer = read_gguf(gguf, folder)
    # The config still says "gguf": transformers would neither save this model nor load it as safetensors.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010 - not a module or tensor, as the type checker believes
    model.config.architectures = [type(model).__name__]
    with translate_save_errors(folder):
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    inspect_weights(sorted(folder.glob("*.safetensors")))  # a file with NaN in it is refused, not cached


def _restore_splitting(gguf: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put back what llama.cpp does to text before the merges and transformers leaves out.

    Digits are split one by one, where the file says so: without it "  7" becomes other tokens than in pretraining. With
    the scores of SentencePiece a space leads a text, and each text after a control token, unless the file says no;
    transformers puts it before the first alone, and never before a space.
    """
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend: Any = tokenizer.backend_tokenizer
    if _metadata_value(gguf, "tokenizer.ggml.pre") in _DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if _metadata_value(gguf, "tokenizer.ggml.model") == "llama":
        leads = _metadata_value(gguf, "tokenizer.ggml.add_space_prefix") is not False
        steps = [normalizers.Prepend("\u2581")] if leads else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None
        joined = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)] if leads else joined)


def _metadata_value(gguf: Path, name: str) -> object:
    """Return one value of a GGUF file's metadata, texts as such; None when there is none of that name.

    The layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, numbers of tensors and of
    entries, the entries. The gguf package would read every value of the file for this, which takes seconds.
    """
    with gguf.open("rb") as file:

        def read_number(code: str) -> Any:
            return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

        def read_value(kind: int) -> object:
            if kind in _NUMBERS:
                return read_number(_NUMBERS[kind])
            if kind == _TEXT:
                return file.read(read_number("Q"))
            item_kind, count = read_number("I"), read_number("Q")
            return [read_value(item_kind) for _ in range(count)]

        file.seek(16)  # past magic, version and number of tensors
        for _ in range(read_number("Q")):
            key, kind = file.read(read_number("Q")), read_number("I")
            value = read_value(kind)
            if key == name.encode():
                return value.decode("utf-8") if isinstance(value, bytes) else value
    return None


def _stamp(path: Path) -> _Stamp:
    """Return the file's name, size and times, which change with it. Raises ModelError when there is no file."""
    try:
        return path.name, stamp_of(path.stat())
    except OSError as error:
        raise _unreadable(path, error) from error


# Both caches hold a result as long as the stamps are the same: one command needs tokenizer, shape and weights, and half
# a gigabyte is digested once for all three.
@lru_cache(maxsize=8)
def _is_intact(folder: Path, unread: str, _stamps: tuple[_Stamp, ...]) -> bool:
    """Return whether the folder's files are as in its manifest; the bytes of files named like `unread` are not read."""
    return not durable.verify_manifest(folder, unread=unread)


@lru_cache(maxsize=8)
def _file_digest(path: Path, _stamp: _Stamp) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{path} cannot be read: {error.strerror}", where=str(path), fix="check the file and its permissions"
    )


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's code of a number type -> the code of Python's struct."""
_TEXT = 8
_READER_ERRORS = (
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
"""Raised by the readers of this format for a damaged or foreign file; they check little themselves."""
