"""Bring a hub model to this machine: its JSON, tokenizer and safetensors files, and nothing that can run."""

from __future__ import annotations

from pathlib import Path

from llmtune.errors import MachineError, ModelError, in_one_line
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.quiet_libraries import quiet_libraries

__all__ = ["fetch_snapshot", "local_folder", "may_ignore_auto_map"]

_NATIVE_DESPITE_AUTO_MAP = frozenset({"microsoft/Phi-4-mini-instruct"})
"""Hub ids of the catalog that also ship code, and load with the library's own; theirs is never fetched or run."""

_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "LICENSE*", "README.md"]


def fetch_snapshot(hub_id: str, revision: str | None, *, weights: bool, offline: bool, code: bool = False) -> Path:
    """The folder of a hub model in the hub cache, fetched when it is not there; the folder's name is the commit.

    weights: also the safetensors files (top folder only). code: also Python files, for a model the user trusts. Raises
    ModelError when the hub has no such model or revision or asks for consent, MachineError when the hub cannot be
    reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = _SMALL_FILES + (["*.safetensors"] if weights else []) + (["*.py"] if code else [])
    where = "model.name"
    try:
        with quiet_libraries():
            found = snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=offline
            )
    except GatedRepoError as error:
        fix = f"accept its licence at https://huggingface.co/{hub_id}, then `hf auth login`; or name a local copy in model.name"
        raise ModelError(f"`{hub_id}` is gated: its owner wants your consent first", where=where, fix=fix) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"`{hub_id}` has no revision `{revision}`", where="model.revision", fix="leave it out for the newest"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        fix = "check the name (a local folder must exist); a private model needs `hf auth login`"
        raise ModelError(
            f"there is no folder `{hub_id}` here and no such model on the hub", where=where, fix=fix
        ) from error
    except LocalEntryNotFoundError as error:
        if offline:
            fix = "run once without --offline, or name a local folder"
            raise ModelError(
                f"`{hub_id}` is not in the hub cache, and the run is offline", where=where, fix=fix
            ) from error
        raise _unreachable(hub_id, error) from error
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(hub_id, error) from error
    except (
        Exception
    ) as error:  # the hub's library lets what its HTTP library raises through, and has changed that library
        if type(error).__module__.partition(".")[0] not in _HTTP_LIBRARIES:
            raise
        raise _unreachable(hub_id, error) from error
    return Path(str(found))


def _unreachable(hub_id: str, error: Exception) -> MachineError:
    return MachineError(
        f"`{hub_id}` could not be fetched: {in_one_line(error)}",
        where="model.name",
        fix="check the connection, or use what is here: `llmtune list-models` shows it (smollm2-135m-instruct needs no hub)",
    )


def local_folder(source: ModelSource, *, weights: bool = True, code: bool = False) -> Path:
    """The folder that holds the model: itself, its conversion in the cache (GGUF), or its snapshot in the hub cache,
    fetched when missing.

    weights=False fetches and compares only the small files. A from-scratch model has no folder: ModelError.
    """
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "gguf":
        from llmtune.models.gguf import converted_folder

        return converted_folder(Path(source.location), weights=weights)
    if source.kind == "hub":
        return fetch_snapshot(source.location, source.revision, weights=weights, offline=source.offline, code=code)
    raise ModelError(
        f"`{source.name}` is built from scratch and has no folder", where="model.name", fix="name a folder or a hub id"
    )


def may_ignore_auto_map(source: ModelSource) -> bool:
    """Whether this model's own code may simply be left aside."""
    return source.kind == "hub" and source.location in _NATIVE_DESPITE_AUTO_MAP
