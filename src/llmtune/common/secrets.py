"""Keep secrets out of command lines, run.json, crash files and configs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["HIDDEN", "SECRET_NAME", "SECRET_SHAPES", "find_secrets", "redacted", "redacted_command"]

T = TypeVar("T")

HIDDEN = "***"

SECRET_NAME = re.compile(
    r"(?:^|[._\-\s])(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)"  # `eos_token` is no secret
    r"(?:api[_-]?key|token|secret|password|passwd|pwd|credentials?|access[_-]?key(?:[_-]?id)?"
    r"|secret[_-]?key|private[_-]?key|auth)$",
    re.IGNORECASE,
)
"""Names of keys, flags and environment variables that hold a secret."""

SECRET_SHAPES = re.compile(
    # `task-...` and `sk-wikipedia-...` are names: no letter may come before a key, and it must contain a long run of
    # letters and digits.
    r"(?<![A-Za-z0-9])(?:hf_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,}|[a-z]{30,})"
    r"|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|wandb_v1_\w{20,}|AKIA[A-Z0-9]{16}"
    r"|sk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z0-9]{16})[\w-]{20,}|xox[abprs]-(?=[\w-]*\d)[\w-]{10,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=Authorization: Bearer )\S+|(?<=Bearer )(?=\S*\d)\S{16,}"
)
"""Keys of well-known services, passwords in URLs, and bearer tokens."""

_SHORTEST_HIDDEN_CHARACTERS = 8
_SHORTEST_SURE_CHARACTERS = 16
_LEAST_TURNS = 4


def _environment_secrets(environ: Mapping[str, str]) -> list[str]:
    """The values of variables with a secret's name, the longest first; not plain words, numbers, paths or `<...>`."""
    values = {
        value
        for name, value in environ.items()
        if SECRET_NAME.search(name) and len(value) >= _SHORTEST_HIDDEN_CHARACTERS
    }
    return sorted((value for value in values if not _is_ordinary(value)), key=lambda value: (-len(value), value))


def _is_ordinary(value: str) -> bool:
    if re.fullmatch(r"[A-Za-z]+|[0-9.]+|<.*>|\w+://[^@]*", value):
        return True
    return value.startswith(("./", "../", "~/")) or (value.startswith("/") and Path(*Path(value).parts[:2]).exists())


def _is_sure(secret: str) -> bool:
    """Whether this is a random value and no name: long, with letters and digits that take turns within its words.

    >>> _is_sure("canary5ecret0wandb0key"), _is_sure("Meta-Llama-3.1-8B-Instruct")
    (True, False)
    """
    turns = re.findall(r"[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])", secret)
    return len(secret) >= _SHORTEST_SURE_CHARACTERS and len(turns) >= _LEAST_TURNS


def redacted(value: T, *, environ: Mapping[str, str] | None = None) -> T:
    """Return a copy of a JSON-like value in which every secret is replaced by `***`.

    Secrets are: values under a name such as `api_key` or `token`; anything in the shape of a well-known service's key;
    a name and password in a URL; the value of an environment variable with such a name, unless it is a plain word, a
    number, a path or `<...>`.

    >>> redacted({"token": "abc", "max_new_tokens": 8, "url": "https://me:pw@host/x"}, environ={})
    {'token': '***', 'max_new_tokens': 8, 'url': 'https://***@host/x'}
    """
    copy: T = _redacted(value, _environment_secrets(os.environ if environ is None else environ))
    return copy


def find_secrets(values: Mapping[str, object], *, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the keys whose value holds a well-known service's key or the random value of a secret variable.

    A run is refused for it, so a password that could be a name (`training-run-7`) is left out, and the name of the key
    does not count; `redacted` hides more.

    >>> find_secrets({"notes": "hf_abcdefghijklmnop4567", "tags": ["a", 3]}, environ={})
    ['notes']
    """
    secrets = [
        secret for secret in _environment_secrets(os.environ if environ is None else environ) if _is_sure(secret)
    ]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return [key for key, value in plain.items() if _redacted(value, secrets) != value]


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, item) else _redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            pattern = re.escape(secret)
            if not _is_sure(secret):  # a password such as `hunter22` must not eat a part of a longer word
                pattern = rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"
            value = re.sub(pattern, HIDDEN, value)
        return SECRET_SHAPES.sub(HIDDEN, value)
    return value


def _is_secret(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, str) and bool(value) and bool(SECRET_NAME.search(name))


def redacted_command(arguments: Sequence[str], *, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return a command line without its secrets: `--token X`, `--token=X`, `api_key=X`, and those of `redacted`.

    >>> redacted_command(["train", "--token", "abc", "tracking.api_key=abc", "model.tokenizer=x"], environ={})
    ['train', '--token', '***', 'tracking.api_key=***', 'model.tokenizer=x']
    """
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next:
            shown.append(HIDDEN)
            hide_next = False
            continue
        is_secret = bool(SECRET_NAME.search(name))
        hide_next = is_secret and not equals and argument.startswith("-")
        shown.append(f"{name}={HIDDEN}" if is_secret and equals else argument)
    return redacted(shown, environ=environ)
