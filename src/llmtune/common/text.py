"""Text that can be shown on a terminal, written to a log or quoted in an error."""

from __future__ import annotations

import os

__all__ = ["excerpt", "is_text", "printable"]


def is_text(text: str) -> bool:
    r"""Return False for a string with an undecodable byte or half a surrogate pair in it: UTF-8 cannot encode it.

    >>> is_text("Größe"), is_text("Gr\udcc3")
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: str | os.PathLike[str], keep: str = "") -> str:
    r"""Return text or a path with control characters and undecodable bytes as escapes, those in `keep` excepted.

    >>> printable("a\x1b[31m\nb"), printable("a\x1b\nb", keep="\n"), printable("Gr\udcc3")
    ('a\\x1b[31m\\nb', 'a\\x1b\nb', 'Gr\\udcc3')
    """
    text = os.fspath(text)
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def excerpt(text: str, limit: int = 60) -> str:
    r"""Return `text` on one line, escaped as by `printable` and cut to `limit` characters.

    >>> excerpt("a\nb"), excerpt("abcdefghij", 8)
    ('a\\nb', 'abcde...')
    """
    shown = printable(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
