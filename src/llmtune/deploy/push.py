"""Upload a result to a repository of the Hugging Face Hub, where that was asked for, and never otherwise.

https://huggingface.co/docs/huggingface_hub/guides/upload
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from llmtune.common.secrets import redacted
from llmtune.errors import MachineError, UsageError, in_one_line

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Hub", "check_push", "push"]


class Hub(Protocol):
    """What of `huggingface_hub.HfApi` an upload needs."""

    @property
    def create_repo(self) -> Callable[..., object]:
        """Make a repository."""

    @property
    def upload_folder(self) -> Callable[..., object]:
        """Upload a folder."""

    @property
    def upload_file(self) -> Callable[..., object]:
        """Upload a file."""


def check_push(repository: str, *, offline: bool) -> None:
    """Raise UsageError where an upload cannot succeed, before there is anything to upload."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"`{repository}` is no name of a repository", "--push", "write OWNER/NAME")
    if offline:
        raise UsageError("--push opens a connection, and --offline forbids it", "--push", "leave one of them out")
    if get_token() is None:
        raise UsageError("nobody is logged in to the hub", "--push", "run `hf auth login`, or set HF_TOKEN")


def push(result: Path, repository: str, *, hub: Hub | None = None) -> str:
    """Upload a folder or a file, into a private repository where there is none yet; return its address.

    Raises MachineError when the hub refuses; the result stays where it is.
    """
    client: Hub = HfApi() if hub is None else hub
    message = f"Upload {result.name} with llmtune"
    try:
        client.create_repo(repository, private=True, exist_ok=True)
        if result.is_dir():
            client.upload_folder(repo_id=repository, folder_path=str(result), commit_message=message)
        else:
            client.upload_file(
                repo_id=repository, path_or_fileobj=str(result), path_in_repo=result.name, commit_message=message
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        problem = f"the hub did not take `{result}`: {redacted(in_one_line(error))}"
        raise MachineError(
            problem, where=f"--push {repository}", fix=f"upload it with `hf upload {repository} {result}`"
        ) from error
    return f"https://huggingface.co/{repository}"
