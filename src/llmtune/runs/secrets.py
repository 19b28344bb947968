"""Keep secrets out of what is written: command lines, run.json, crash files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "looks_secret", "redacted", "redacted_command"]

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"(?:^|[._\-\s])(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?:api[_-]?key|token|secret|password|passwd|pwd|credentials?|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key|auth)$",
    re.IGNORECASE,
)
# What well-known services hand out; each is recognised wherever it stands.
_SECRET_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_\-]{20,}|xox[abprs]-[\w\-]{10,}|AKIA[A-Z0-9]{16}"
    r"|wandb_v1_\w{20,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=Bearer )\S+"
)
_SHORTEST_SECRET_CHARACTERS = 8


def _environment_secrets(environ: Mapping[str, str]) -> list[str]:
    return sorted(
        (value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET_CHARACTERS),
        key=len,
        reverse=True,
    )


def redacted(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """Return a copy of a JSON-like value in which every secret is replaced by `***`.

    Secrets are: what stands under a name such as `api_key` or `token`; anything in the shape of a well-known service's key; a name and
    password in a URL; the value of an environment variable with such a name.

    >>> redacted({"token": "abc", "max_new_tokens": 8, "url": "https://me:pw@host/x"}, environ={})
    {'token': '***', 'max_new_tokens': 8, 'url': 'https://***@host/x'}
    """
    return _redacted(value, _environment_secrets(os.environ if environ is None else environ))


def looks_secret(value: Any) -> bool:
    """Whether a value holds something in the shape of a well-known service's key, or the value of a secret environment variable.

    >>> looks_secret("hf_abcdefghijklmnopqrstuv"), looks_secret(["a", 3])
    (True, False)
    """
    plain = list(value) if isinstance(value, tuple) else value
    return bool(redacted(plain) != plain)


def _redacted(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, one) else _redacted(one, known) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(one, known) for one in value]
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, HIDDEN)
        return _SECRET_SHAPES.sub(HIDDEN, value)
    return value


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, str) and bool(value) and bool(_SECRET_NAME.search(name))


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
        is_secret = bool(_SECRET_NAME.search(name))
        hide_next = is_secret and not equals and argument.startswith("-")
        shown.append(f"{name}={HIDDEN}" if is_secret and equals else argument)
    return [str(one) for one in redacted(shown, environ=environ)]
