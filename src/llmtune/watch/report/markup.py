"""HTML from text that may hold anything: every word of a run's files goes through `text`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from llmtune.common.text import printable, readable_bytes

__all__ = ["Markup", "asset", "json_for_script", "number", "section", "table", "text"]

Markup = str
"""HTML that is ready for the page; plain text becomes such by `text`."""


@cache
def asset(name: str) -> str:
    """The text of a style sheet or script that lies beside this file."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def text(value: object, *, most: int | None = None) -> Markup:
    r"""Text as HTML: escaped, control characters written out, cut after `most` characters.

    >>> text("<b>\x1b")
    '&lt;b&gt;\\x1b'
    """
    shown = str(value)
    if most is not None and len(shown) > most:
        shown = f"{shown[:most]} … ({len(shown) - most:,} more characters)"
    return html.escape(printable(shown, keep="\n\t"))


def number(value: float | None, unit: str = "") -> str:
    """A figure for people: four significant digits, bytes in their units, whole numbers in full.

    >>> number(1234567), number(0.000123456), number(2.0, "bytes"), number(None), number(1234.56)
    ('1,234,567', '0.0001235', '2 B', '–', '1,235')
    """
    if value is None or value != value:
        return "–"
    if unit == "bytes":
        return readable_bytes(round(value))
    if unit == "percent":
        return f"{value:.1%}"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def section(name: str, title: str, body: Markup, note: str = "") -> Markup:
    """A section of the page with its heading; nothing where the body is empty."""
    if not body:
        return ""
    hint = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<section id="{name}"><h2>{text(title)}</h2>{hint}{body}</section>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[Markup]], *, kind: str = "") -> Markup:
    """A table; `head` is plain text, cells are HTML. Nothing without rows."""
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    if not lines:
        return ""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    content = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{content}</table></div>'


def json_for_script(content: str) -> Markup:
    """JSON text that cannot end the script element it stands in."""
    return content.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
