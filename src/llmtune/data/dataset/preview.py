"""Show examples as the model sees them, for people (coloured text, a page) and for programs (JSON).

All functions are pure functions of examples and a tokenizer. Text of the data reaches the terminal and the page as text
only: control characters are written out as escapes, and the page escapes all text and has no scripts.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmtune.common.text import printable
from llmtune.data.example import Example, Stretch, stretches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Group", "html_page", "json_line", "legend", "terminal_text"]


class Group(NamedTuple):
    """Examples shown together: one alone, or those of a pack of at most `capacity` tokens, numbered from 1."""

    examples: Sequence[Example]
    number: int | None = None
    capacity: int | None = None


def json_line(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `{"source", "input_ids", "weights", "text"}` as one line, with `side`, `label` and `margin` of the row.

    `weights[i]` is the weight of predicting `input_ids[i]`.
    """
    ids = example.input_ids.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    line = {"source": example.source, "input_ids": ids, "weights": example.weights.tolist(), "text": text}
    judged = {"side": example.side, "label": example.label, "margin": example.margin or None}
    return json.dumps(line | {name: value for name, value in judged.items() if value is not None}, ensure_ascii=False)


# --- terminal

# Underlined as well: green and cyan are one colour to some.
TRAINED, TRAINED_CONTROL, CONTROL = "\x1b[4;32m", "\x1b[1;4;32m", "\x1b[36m"
DIM, RESET = "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"


def legend(*, color: bool) -> str:
    """Explain the colours (or, without them, the brackets) of `terminal_text`."""
    if color:
        trained = f"{TRAINED}trained{RESET}, {TRAINED_CONTROL}trained control token{RESET}"
        return f"{trained}, {CONTROL}control token{RESET}, not trained; ↵ is a line's end"
    return f"{OPEN}trained{CLOSE}, the rest is not trained; ↵ is a line's end"


def terminal_text(
    group: Group, tokenizer: PreTrainedTokenizerBase, *, color: bool, rows: int | None = None
) -> Iterator[str]:
    """Yield the lines of a group: a heading for each row, its text with the trained parts marked, a pack's borders.

    rows: of a pack, at most so many are shown, and the others counted; all when None.
    """
    limit = None if group.number is None else rows
    paint: Callable[[str, str], str] = (lambda code, text: f"{code}{text}{RESET}") if color else (lambda _, text: text)
    if group.number is not None:
        yield f"╭── {_pack_line(group)}"
    for example in group.examples[:limit]:
        edge = "├── " if group.number is not None else ""
        yield edge + paint(DIM, row_line(example))
        body = "".join(_marked(stretch, color=color) for stretch in stretches(example, tokenizer))
        for line in body.split("\n"):
            yield ("│ " if group.number is not None else "") + line
    if limit is not None and len(group.examples) > limit:
        yield f"├── and {len(group.examples) - limit:,} more (--all shows them)"
    if group.number is not None:
        yield "╰──"


def row_line(example: Example) -> str:
    """Return `file:line: 12 tokens, 5 trained` (and the sum of weights where they are not all 1)."""
    trained = int((example.weights > 0).sum())
    total = float(example.weights.sum(dtype="float64"))
    by_weight = "" if total == trained else f" ({total:g} by weight)"
    label = f", label {printable(example.label)}" if example.label is not None else ""
    margin = f", margin {example.margin:g}" if example.margin else ""
    return f"{printable(example.source)}: {len(example):,} tokens, {trained:,} trained{by_weight}{label}{margin}"


def _pack_line(group: Group) -> str:
    used = sum(len(example) for example in group.examples)
    of = f" of {group.capacity:,}" if group.capacity else ""
    rows = f"{len(group.examples)} row{'s' if len(group.examples) != 1 else ''}"
    return f"pack {group.number}: {rows}, {used:,}{of} tokens; they cannot see each other"


def _marked(stretch: Stretch, *, color: bool) -> str:
    text = printable(stretch.text, keep="\n").replace("\n", "↵\n")
    note = f"×{stretch.weight:g} " if stretch.weight not in (0, 1) else ""
    if not color:
        return f"{OPEN}{note}{text}{CLOSE}" if stretch.weight > 0 else text
    if stretch.weight > 0:
        code = TRAINED_CONTROL if stretch.is_control else TRAINED
    else:
        code = CONTROL if stretch.is_control else ""
    # Colour is set anew on each line, because a pager forgets it at a line's end.
    return "\n".join(f"{code}{line}{RESET}" if code and line else line for line in (note + text).split("\n"))


# --- a page

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; padding: .75rem;
  border: 1px solid #8886; border-radius: .4rem; margin: .25rem 0 1rem; }
section { border-left: 4px solid #8888; padding-left: 1rem; margin: 1.5rem 0; }
.t { background: #2da44e40; }
.c { color: #0969da; }
.t.c { color: inherit; font-weight: 700; }
@media (prefers-color-scheme: dark) { .c { color: #6cb6ff; } }
"""


def html_page(groups: Iterable[Group], tokenizer: PreTrainedTokenizerBase, *, title: str) -> str:
    """Return one self-contained HTML page, without scripts and without links to anything."""
    body = "\n".join(part for group in groups for part in _html_group(group, tokenizer))
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        # Should anything of the data get past the escaping, the browser still runs and loads nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><title>{name}</title><style>{STYLE}</style></head><body>\n'
        f'<h1>{name}</h1>\n<p><span class="t">trained</span>, <span class="t c">trained control token</span>, '
        '<span class="c">control token</span>, not trained. Weights other than 0 and 1 are in the tooltip.</p>\n'
        f"{body}\n</body></html>\n"
    )


def _html_group(group: Group, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if group.number is not None:
        yield f"<section><h2>{html.escape(_pack_line(group))}</h2>"
    for example in group.examples:
        yield f"<h3>{html.escape(row_line(example))}</h3>"
        yield f"<pre>{''.join(_html_stretch(stretch) for stretch in stretches(example, tokenizer))}</pre>"
    if group.number is not None:
        yield "</section>"


def _html_stretch(stretch: Stretch) -> str:
    classes = " ".join(name for name, is_so in (("t", stretch.weight > 0), ("c", stretch.is_control)) if is_so)
    text = html.escape(printable(stretch.text, keep="\n"))
    if not classes:
        return text
    tip = f' title="weight {stretch.weight:g}"' if stretch.weight not in (0, 1) else ""
    return f'<span class="{classes}"{tip}>{text}</span>'
