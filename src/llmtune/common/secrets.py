"""Keep secrets out of what is written: command lines, run.json, crash files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["HIDDEN", "SECRET_NAME", "SECRET_SHAPES", "find_secrets", "redacted", "redacted_command"]

HIDDEN = "***"

SECRET_NAME = re.compile(
    r"(?:^|[._\-\s])(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?:api[_-]?key|token|secret|password|passwd|pwd|credentials?|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key|auth)$",
    re.IGNORECASE,
)
"""Names of keys, flags and environment variables that hold a secret; `eos_token` and its like do not."""
# `task-...` and `sk-wikipedia-...` are names, so a key must not go on to the left and must hold a long run of letters
# and digits.
SECRET_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,}|[a-z]{30,})|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z0-9]{16})[\w-]{20,}|xox[abprs]-(?=[\w-]*\d)[\w-]{10,}|AKIA[A-Z0-9]{16}|wandb_v1_\w{20,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=Authorization: Bearer )\S+|(?<=Bearer )(?=\S*\d)\S{16,}"
)
_SHORTEST_HIDDEN_CHARACTERS = 8
_SHORTEST_SURE_CHARACTERS = 16
_LEAST_TURNS = 4


def _environment_secrets(environ: Mapping[str, str]) -> list[str]:
    """The values of variables with a secret's name, the longest first.

    Not what is a plain word, a number, a place or a control token.
    """
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
    """Whether nobody would choose this as a name: long, and letters and digits take turns within its words, as chance
    makes them.

    >>> _is_sure("canary5ecret0wandb0key"), _is_sure("Meta-Llama-3.1-8B-Instruct")
    (True, False)
    """
    turns = re.findall(r"[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])", secret)
    return len(secret) >= _SHORTEST_SURE_CHARACTERS and len(turns) >= _LEAST_TURNS


def redacted(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """Return a copy of a JSON-like value in which every secret is replaced by `***`.

    Secrets are: what stands under a name such as `api_key` or `token`; anything in the shape of a well-known service's
    key; a name and password in a URL; the value of an environment variable with such a name, unless it is a plain word,
    a number, a place or `<...>`.

    >>> redacted({"token": "abc", "max_new_tokens": 8, "url": "https://me:pw@host/x"}, environ={})
    {'token': '***', 'max_new_tokens': 8, 'url': 'https://***@host/x'}
    """
    return _redacted(value, _environment_secrets(os.environ if environ is None else environ))


def find_secrets(values: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> list[str]:
    """The keys whose value holds something in the shape of a well-known service's key, or a random value of a secret
    environment variable.

    Stricter than `redacted`, for a run is refused for it: a password that could be a name (`training-run-7`) is hidden,
    not refused; and the name a value stands under does not matter.

    >>> find_secrets({"notes": "hf_abcdefghijklmnop4567", "tags": ["a", 3]}, environ={})
    ['notes']
    """
    known = [one for one in _environment_secrets(os.environ if environ is None else environ) if _is_sure(one)]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return [key for key, value in plain.items() if _redacted(value, known) != value]


def _redacted(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, one) else _redacted(one, known) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(one, known) for one in value]
    if isinstance(value, str):
        for secret in known:
            if secret in value:
                whole = (
                    re.escape(secret) if _is_sure(secret) else rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"
                )
                value = re.sub(whole, HIDDEN, value)
        return SECRET_SHAPES.sub(HIDDEN, value)
    return value


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, str) and bool(value) and bool(SECRET_NAME.search(name))


def redacted_command(arguments: Sequence[str], *, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return a command line without its secrets: `--token X`, `--token=X`, `api_key=X`, and what `redacted` finds.

    >>> redacted_command(["llmtune", "train", "--token", "abc", "tracking.api_key=abc", "model.tokenizer=x"], environ={})
    ['llmtune', 'train', '--token', '***', 'tracking.api_key=***', 'model.tokenizer=x']
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
    return [str(one) for one in redacted(shown, environ=environ)]
