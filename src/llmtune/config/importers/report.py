"""What became of every key of an import, as text and as data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from llmtune.common.text import printable
from llmtune.config.dump import plain, value_text
from llmtune.config.importers.convert import Imported
from llmtune.config.importers.key_report import KeyReport
from llmtune.config.importers.rules import Outcome

__all__ = ["as_data", "report_lines"]

_HEADINGS = {
    Outcome.KEPT: "kept: the same value under our name",
    Outcome.COMPUTED: "computed: another value, with the same meaning",
    Outcome.DROPPED: "dropped, because",
    Outcome.IGNORED: "did nothing in the other toolkit either",
    Outcome.NEEDS: "needs you",
    Outcome.NONE: "no equivalent, and what that changes",
}
"""In this order: what asks for something stands at the end, beside the prompt."""


def report_lines(imported: Imported, width: int) -> Iterator[str]:
    """Return the lines of the report, each at most `width` characters wide."""
    name = imported.peer.name
    by = ", ".join(f"`{key}`" for key in imported.recognised_by[:4])
    yield from _wrapped(f"{name}, recognised by {by}: {len(imported.keys)} keys", width, "")
    for outcome, heading in _HEADINGS.items():
        rows = [row for row in imported.keys if row.outcome is outcome]
        if rows:
            yield ""
            yield f"{heading} ({len(rows)})"
            for row in rows:
                yield from _wrapped(_line(row, imported), width, "  ")
    defaults = {key: setting for key, setting in imported.settings.items() if setting.is_default}
    if defaults:
        yield ""
        yield from _wrapped(f"{name}'s own defaults, written out ({len(defaults)})", width, "")
        for key, setting in defaults.items():
            yield from _wrapped(f"{key}: {value_text(setting.value)} ({setting.said})", width, "  ")
    yield from (line for row in imported.rejected for line in _wrapped(f"not written: {row}", width, "  "))
    yield ""
    yield from _wrapped(_conclusion(imported), width, "")


def _line(row: KeyReport, imported: Imported) -> str:
    targets = f" -> {', '.join(_target(key, row, imported) for key in row.ours)}" if row.ours else ""
    text = f" ({row.text})" if row.text and targets else f": {row.text}" if row.text else ""
    return f"{row.where}: {row.name}: {row.said}{targets}{text}"


def _target(key: str, row: KeyReport, imported: Imported) -> str:
    """One of our keys, with its value where that is another one than the file's."""
    setting = imported.settings.get(key)
    if setting is None or setting.item_places or row.outcome is not Outcome.COMPUTED:
        return key
    return f"{key}: {value_text(setting.value)}"


def _conclusion(imported: Imported) -> str:
    count = sum(row.outcome is Outcome.NONE for row in imported.keys) + len(imported.rejected)
    if not count:
        return "every key has an equivalent, or changes nothing that is trained"
    have = "thing has" if count == 1 else "things have"
    return f"{count} {have} no equivalent, so this trains something else: exit code 3"


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        printable(text),
        max(width, 30),
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_on_hyphens=False,
    )


def as_data(imported: Imported) -> dict[str, object]:
    """Return the import as data that JSON can hold."""
    return {
        "toolkit": imported.peer.id,
        "recognised_by": list(imported.recognised_by),
        "is_whole": imported.is_whole,
        "yaml": imported.yaml,
        "keys": [
            {
                "key": row.key,
                "value": row.value,
                "where": row.where,
                "outcome": str(row.outcome),
                "ours": list(row.ours),
                "text": row.text,
            }
            for row in imported.keys
        ],
        "defaults": {
            key: {"value": plain(setting.value), "text": setting.said}
            for key, setting in imported.settings.items()
            if setting.is_default
        },
        "rejected_defaults": list(imported.rejected),
    }
