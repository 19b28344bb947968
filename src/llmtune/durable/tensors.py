"""Tensors in the safetensors format: written without a second copy in memory, digested while they are read.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header, little-endian;
the header, JSON, padded with spaces to a multiple of 8; the tensors' bytes, row-major, little-endian, without gaps.
`safetensors.torch.save_file` is not used because it neither syncs nor follows the umask.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from llmtune.common.dtypes import SAFETENSORS_NAMES, torch_dtype
from llmtune.common.text import printable
from llmtune.durable.files import json_text, write_stream
from llmtune.durable.system import translate_os_errors
from llmtune.errors import CheckpointError

if TYPE_CHECKING:
    from hashlib import _Hash

    import numpy as np
    import numpy.typing as npt
    import torch

    AnyTensor: TypeAlias = torch.Tensor | npt.NDArray[np.generic]

__all__ = ["read_tensors", "tensor_order", "write_tensors"]

_TYPES = {short: name for name, short in SAFETENSORS_NAMES.items()}
_ORDER = {short: index for index, short in enumerate(_TYPES)}
_ONE_BYTE = ("BOOL", "F8_E4M3", "F8_E5M2")
_ITEM_BYTES = {short: 1 if short in _ONE_BYTE else int(short.lstrip("BCFIU")) // 8 for short in _TYPES}
_LARGEST_SIZE = 1 << 48
_MOST_DIMENSIONS = 64  # torch's limit
_LARGEST_HEADER_BYTES = 100_000_000  # the library refuses more


def tensor_order(tensors: Mapping[str, AnyTensor]) -> list[str]:
    """Give the names of tensors, of any shape, in the order in which a file has them."""
    return [name for name, *_ in _entries(tensors)]


def _entries(tensors: Mapping[str, AnyTensor]) -> list[tuple[str, str, list[int], int]]:
    entries = [(name, *_describe(name, tensor)) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (_ORDER[entry[1]], entry[0]))  # wide types first keeps every tensor aligned
    return entries


def write_tensors(
    path: Path | str,
    tensors: Mapping[str, AnyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    read: Callable[[str], AnyTensor] | None = None,
) -> None:
    """Write torch or NumPy tensors as a safetensors file, completely or not at all (see `write_stream`).

    Any shape and any type of the format, bfloat16 among them; tensors on a device are copied to the CPU one at a time.
    Each tensor is written by itself, also where two share memory. `read` gives the tensor of a name in full when its
    turn comes (`tensor_order`), where `tensors` has types and shapes alone. Raises MachineError; TypeError for a type
    the format does not have.
    """
    entries = _entries(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, short, shape, item_bytes in entries:
        end = offset + math.prod(shape) * item_bytes
        header[name] = {"dtype": short, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json_text(header, compact=True).encode("utf-8", "backslashreplace")
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name, *_ in entries:
            if data := _bytes_of(read(name) if read is not None else tensors[name]):
                yield data

    write_stream(path, chunks())


def _describe(name: str, tensor: AnyTensor) -> tuple[str, list[int], int]:
    """Return the format's name of the type, the shape, and the bytes of one item."""
    type_name = str(tensor.dtype).removeprefix("torch.")
    if type_name not in SAFETENSORS_NAMES:
        raise TypeError(f"tensor `{name}` has type {type_name}, which safetensors cannot hold")
    return SAFETENSORS_NAMES[type_name], list(tensor.shape), tensor.dtype.itemsize


def _bytes_of(tensor: AnyTensor) -> memoryview:
    """Return the bytes of a tensor, row-major; without a copy where the CPU's memory holds them in that order."""
    import numpy as np

    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    # Seen as bytes, because NumPy has no bfloat16 and no float8.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path | str, *, sha256: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file into CPU tensors, in their stored shapes, and return them with the file's metadata.

    https://huggingface.co/docs/safetensors

    The digest is taken of the bytes that fill the tensors, not in a second reading: with `sha256` given, a changed
    tensor is never returned. Raises CheckpointError when the digest or the format does not fit, MachineError when the
    file cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    with translate_os_errors("read", path), path.open("rb", buffering=0) as file:
        try:
            entries, metadata = _read_header(file, os.fstat(file.fileno()).st_size, digest)
            tensors = dict(_read_tensor(file, entry, digest) for entry in entries)
        except ValueError as error:
            raise CheckpointError(
                f"not a whole safetensors file: {error}", printable(path), "use another copy of this file"
            ) from error
    if sha256 is not None and digest.hexdigest() != sha256:
        raise CheckpointError(
            "the file was changed: its sha256 does not fit the manifest", printable(path), "use another checkpoint"
        )
    return tensors, metadata


def _read_header(file: FileIO, file_bytes: int, digest: _Hash) -> tuple[list[_Entry], dict[str, str]]:
    """Return the entries in the order of their bytes, and the metadata; raises ValueError."""
    prefix = _read_exactly(file, 8)
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > min(_LARGEST_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"its header claims {header_bytes} bytes of a file of {file_bytes}")
    text = _read_exactly(file, header_bytes)
    digest.update(prefix)
    digest.update(text)
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("its header is nested without end") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts by name")
    entries = sorted(
        (_Entry.checked(name, entry) for name, entry in header.items()), key=lambda entry: (entry.begin, entry.end)
    )
    offset = 0
    for entry in entries:
        if entry.begin != offset:
            raise ValueError(f"tensor {entry.name!r} begins at byte {entry.begin} instead of {offset}")
        offset = entry.end
    if offset != file_bytes - 8 - header_bytes:
        raise ValueError(f"its tensors take {offset} bytes of {file_bytes - 8 - header_bytes}")
    return entries, metadata


class _Entry(NamedTuple):
    """One tensor of a header; `begin` and `end` are offsets of its bytes behind the header."""

    name: str
    short: str
    shape: list[int]
    begin: int
    end: int

    @classmethod
    def checked(cls, name: str, entry: object) -> _Entry:
        """Return the entry of a header if type, shape and size fit each other; raises ValueError."""
        match entry:
            case {
                "dtype": str(short),
                "shape": list(shape),
                "data_offsets": [int(begin), int(end)],
                **others,
            } if not others:
                is_shape = (
                    all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in shape)
                    and len(shape) <= _MOST_DIMENSIONS
                )
                if short in _TYPES and is_shape and 0 <= begin <= end == begin + math.prod(shape) * _ITEM_BYTES[short]:
                    return cls(name, short, shape, begin, end)
        raise ValueError(f"tensor {name!r} has a type, shape or place that cannot be")


def _read_tensor(file: FileIO, entry: _Entry, digest: _Hash) -> tuple[str, torch.Tensor]:
    import torch

    tensor: torch.Tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.short))
    if tensor.nbytes:
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            count = file.readinto(view[done : done + (64 << 20)])
            if not count:
                raise ValueError(f"it ends inside tensor {entry.name!r}")
            digest.update(view[done : done + count])
            done += count
    return entry.name, tensor


def _read_exactly(file: FileIO, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = file.read(count - len(data))
        if not part:
            raise ValueError(f"it ends after {len(data)} of {count} bytes of its header")
        data += part
    return bytes(data)
