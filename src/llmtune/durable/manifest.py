"""manifest.json: the size and sha256 of every file of a committed folder, and a digest of the manifest itself.

It guards against accidents; it is no signature, for whoever can write the folder can write a fitting manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypedDict

from llmtune.common.text import printable
from llmtune.durable.files import json_text, read_chunks
from llmtune.errors import Problem

__all__ = [
    "MANIFEST",
    "DamagedManifestError",
    "FileEntry",
    "Manifest",
    "has_digest",
    "read_manifest",
    "verify_manifest",
]

MANIFEST = "manifest.json"
_DIGEST_KEY = "manifest_sha256"
_HEAD = b'{\n "'
"""The first bytes of every manifest of llmtune, by which one that was cut short is recognised."""

# Two things only a manifest of llmtune has, the second once for each file: one damaged byte never removes both.
_MARKS = re.compile(rb'"manifest_sha256"|\n   "sha256": "[0-9a-f]{64}"')


class FileEntry(TypedDict):
    """Bytes and sha256 (in hex) of one file."""

    size: int
    sha256: str


class Manifest(TypedDict):
    """A manifest; what the committer of the folder added (step, run, versions, ...) stands beside these two keys."""

    files: dict[str, FileEntry]
    """By path relative to the folder, with `/`."""
    manifest_sha256: str
    """Digest of everything else in the manifest."""


class DamagedManifestError(ValueError):
    """A manifest that llmtune wrote is damaged or was edited; other files of that name are a plain ValueError."""


def manifest_text(content: Mapping[str, object]) -> str:
    """Return the text of a manifest with its digest; no other text with the same meaning is valid."""
    body = {key: value for key, value in content.items() if key != _DIGEST_KEY}
    digest = hashlib.sha256(json_text(body, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()
    return json_text({**body, _DIGEST_KEY: digest}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path | str) -> Manifest:
    """Return the manifest of a committed folder after its digest was checked.

    Raises ValueError (with the reason), DamagedManifestError where llmtune wrote it, or OSError.
    """
    raw = (Path(folder) / MANIFEST).read_bytes()
    is_ours = _MARKS.search(raw) is not None
    try:
        manifest = json.loads(raw)
        is_manifest = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and _DIGEST_KEY in manifest
        # The text is compared, not only the digest: a value JSON reads back in another form is a change too.
        is_unchanged = is_manifest and manifest_text(manifest).encode("utf-8", "backslashreplace") == raw
    except (ValueError, RecursionError) as error:
        raise _invalid(f"is not JSON: {error}", is_ours=is_ours or raw.startswith(_HEAD[: len(raw)])) from error
    if not is_manifest:
        raise _invalid("is not a manifest", is_ours=is_ours)
    if not is_unchanged:
        raise _invalid("was changed: its seal does not fit its content", is_ours=True)
    content: Manifest = manifest
    return content


def _invalid(reason: str, *, is_ours: bool) -> ValueError:
    return (DamagedManifestError if is_ours else ValueError)(f"manifest.json {reason}")


def verify_manifest(
    folder: Path | str, *, only: str = "*", unread: str = "", past_cache: bool = False, links: bool = False
) -> list[Problem]:
    """Compare every file of a committed folder with its manifest and return the differences (P5).

    Found are: a changed byte, a cut, a missing, added or exchanged file, a link in place of a file, an edited manifest.

    only: a pattern (`*.safetensors`) for the names compared, relative to `folder` and at any depth.
    unread: a pattern for files of which only presence and size are compared, because their reader compares the rest.
    past_cache: read from the disk what the system may still have in memory.
    links: compare the target of a link instead of refusing the link.
    """
    folder = Path(folder)
    fix = "use another checkpoint or copy, or restore this folder from a backup"
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        missing = "manifest.json is missing: the folder was never committed, or was taken apart"
        return [Problem(missing, printable(folder), fix)]
    except (ValueError, OSError) as error:
        return [Problem(str(error), printable(folder / MANIFEST), fix)]
    expected = {name: entry for name, entry in manifest["files"].items() if fnmatchcase(name, only)}
    subfolders = {parent.as_posix() for name in manifest["files"] for parent in Path(name).parents}
    problems: list[str] = []
    present: set[str] = set()
    try:
        for path, status in walk(folder):
            name = path.relative_to(folder).as_posix()
            if name != MANIFEST and not fnmatchcase(name, only):
                continue
            if links:
                status = path.stat()
            if name == MANIFEST:
                if not stat.S_ISREG(status.st_mode):
                    problems.append(f"`{MANIFEST}` is not a plain file")
            elif stat.S_ISDIR(status.st_mode):
                if name not in subfolders:
                    problems.append(f"`{printable(name)}` does not belong here")
            else:
                present.add(name)
                reads = not fnmatchcase(name, unread)
                problems += _differences(path, status, expected.get(name), name, reads=reads, past_cache=past_cache)
    except OSError as error:
        problems.append(f"cannot read: {error.strerror}")
    problems.extend(f"`{printable(name)}` is missing" for name in expected if name not in present)
    return [Problem(problem, printable(folder), fix) for problem in problems]


def _differences(
    path: Path, status: os.stat_result, expected: FileEntry | None, name: str, *, reads: bool, past_cache: bool
) -> Iterator[str]:
    """Yield the differences of one file from its entry, the cheap comparisons first."""
    if expected is None:
        yield f"`{printable(name)}` does not belong here"
    elif not stat.S_ISREG(status.st_mode):
        yield f"`{printable(name)}` is not a plain file"
    elif status.st_size != expected["size"]:
        yield f"`{printable(name)}` has {status.st_size} bytes instead of {expected['size']}"
    elif reads and measure_file(path, past_cache=past_cache)["sha256"] != expected["sha256"]:
        yield f"`{printable(name)}` was changed: its sha256 does not fit"


def measure_file(path: Path, *, past_cache: bool = False) -> FileEntry:
    """Read a file and return its entry; raises OSError."""
    digest, size = hashlib.sha256(), 0
    for chunk in read_chunks(path, past_cache=past_cache):
        digest.update(chunk)
        size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def has_digest(data: bytes, sha256: str) -> bool:
    """Say whether `data` are the bytes with this sha256 (in hex)."""
    return hashlib.sha256(data).hexdigest() == sha256


def walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield everything below `folder`, each folder before its content, by name; links are not followed.

    Raises OSError.
    """
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            yield from walk(path)
