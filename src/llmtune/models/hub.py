"""Fetch a hub model: its JSON, tokenizer and safetensors files, and nothing that can run."""

from __future__ import annotations

from pathlib import Path

from llmtune.errors import MachineError, ModelError, in_one_line
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.gguf import converted_folder
from llmtune.models.read_config import quiet_libraries

__all__ = ["fetch_snapshot", "local_folder", "may_ignore_auto_map"]

_NATIVE_DESPITE_AUTO_MAP = frozenset({"microsoft/Phi-4-mini-instruct"})
"""Hub ids of the catalog that also ship code but load with transformers' own; the shipped code is never fetched."""

_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "LICENSE*", "README.md"]


def fetch_snapshot(hub_id: str, revision: str | None, *, weights: bool, offline: bool, code: bool = False) -> Path:
    """Return the hub model's folder in the hub cache, fetched when missing; the folder's name is the commit.

    weights: also the safetensors files of the top folder. code: also Python files, for a model the user trusts.

    Raises ModelError for an unknown model or revision and for one that needs consent, MachineError when the hub cannot
    be reached.
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
            folder = snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=offline
            )
    except GatedRepoError as error:
        licence = f"accept its licence at https://huggingface.co/{hub_id}, then `hf auth login`"
        fix = f"{licence}; or name a local copy in model.name"
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
    except Exception as error:
        # huggingface_hub lets the errors of its HTTP library through, and has changed that library between versions.
        if type(error).__module__.partition(".")[0] not in _HTTP_LIBRARIES:
            raise
        raise _unreachable(hub_id, error) from error
    return Path(str(folder))


def _unreachable(hub_id: str, error: Exception) -> MachineError:
    local_models = "`llmtune list-models` shows it (smollm2-135m-instruct needs no hub)"
    return MachineError(
        f"`{hub_id}` could not be fetched: {in_one_line(error)}",
        where="model.name",
        fix=f"check the connection, or use what is here: {local_models}",
    )


def local_folder(source: ModelSource, *, weights: bool = True, code: bool = False) -> Path:
    """Return the folder that holds the model's files.

    That is the named folder, the conversion of a GGUF file in llmtune's cache, or the snapshot in the hub cache, made
    or fetched when missing. weights: False leaves out the weight files of a hub model, and the check of those of a GGUF
    model. code: also the Python files of a hub model.

    Raises ModelError for a from-scratch model, which has no folder, and whatever converting (`converted_folder`) and
    fetching (`fetch_snapshot`) raise: ModelError and MachineError.
    """
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "gguf":
        return converted_folder(Path(source.location), weights=weights)
    if source.kind == "hub":
        return fetch_snapshot(source.location, source.revision, weights=weights, offline=source.offline, code=code)
    raise ModelError(
        f"`{source.name}` is built from scratch and has no folder", where="model.name", fix="name a folder or a hub id"
    )


def may_ignore_auto_map(source: ModelSource) -> bool:
    """Return whether the code shipped with this model is known to be unneeded (see `refuse_unsafe_folder`)."""
    return source.kind == "hub" and source.location in _NATIVE_DESPITE_AUTO_MAP
