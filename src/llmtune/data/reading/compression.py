"""Open data files for reading, unpacked where their name ends in .gz or .zst."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard

from llmtune.data.reading.json_file import CHUNK_BYTES

__all__ = ["COMPRESSIONS", "COMPRESSION_ERRORS", "compression_of", "is_seekable", "open_bytes"]

COMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""Errors of the libraries for compressed bytes that are damaged."""


class _Frame(Protocol):
    """The decompressor of one zstd frame; a file may hold several, one after another."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes) -> bytes: ...


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a zstd file."""

    # The library's own stream reader ends without an error where the file was cut off: rows would be lost silently.

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._new_frame = cast("Callable[[], _Frame]", zstandard.ZstdDecompressor().decompressobj)
        self._frame: _Frame | None = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]  # io.BufferedReader gives a memoryview
        """Fill `target` and return the number of bytes, 0 at the end. Raises EOFError for a file that was cut off."""
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._file.read(CHUNK_BYTES // 8)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the compressed file was cut off")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            self._ready = self._frame.decompress(data)
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_gzip(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _open_zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(_ZstdStream(path.open("rb")), CHUNK_BYTES)


COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _open_gzip, ".zst": _open_zstd}

_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
"""How compressed files begin."""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked if its name ends in .gz or .zst."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb", CHUNK_BYTES)


def compression_of(path: Path) -> str | None:
    """The ending that files have which begin as this one does; None for one that is not compressed so."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((ending for ending, magic in _MAGIC.items() if head.startswith(magic)), None)


def is_seekable(stream: IO[bytes]) -> bool:
    """Whether a stream of `open_bytes` can be read from its end without unpacking all of it."""
    return isinstance(stream, io.BufferedReader) and not isinstance(stream.raw, _ZstdStream)
