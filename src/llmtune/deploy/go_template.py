"""Render the part of Go's template language that `ollama.py` writes, as Ollama does.

Ollama renders a Modelfile's TEMPLATE with Go's text/template (https://pkg.go.dev/text/template). Rendered are
texts, quoted strings, fields, `if`, `else if`, `else`, `range` and `eq`; anything else is a ValueError.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["literal", "render"]

Fields = Mapping[str, object]
_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_LOST = re.compile(r'\{\{|"{2,}|[^\S\n ]+|[^\w\s\x21-\x7e]+')
"""A Modelfile is read without the characters that Go does not print, and a text in it ends at three quotation marks."""
_EQUALS = re.compile(r'eq \.(\w+) ("[^"]*")')


def literal(text: str) -> str:
    r"""Return text as a template writes it; what a Modelfile or a template would not keep is quoted.

    >>> print(literal("a{{b"), literal("a\u200db"))
    a{{ "{{" }}b a{{ "\u200d" }}b
    """
    return _LOST.sub(lambda match: "{{ " + _quoted(match[0]) + " }}" if _is_lost(match[0]) else match[0], text)


def _is_lost(text: str) -> bool:
    return text.startswith(("{{", '""')) or not text.isprintable()


def _quoted(text: str) -> str:
    """Return a string of Go's language, which Python's reads in the same way."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    number = ord(character)
    return character if character.isprintable() else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def render(template: str, values: Fields) -> str:
    """Render a template on its values: `System`, and `Messages` with `Role` and `Content` each.

    Raises ValueError for an action outside of the part of the language that is understood here.
    """
    tokens: list[tuple[str, str]] = []
    end = 0
    for match in _ACTION.finditer(template):
        tokens += [("text", template[end : match.start()]), ("action", match[1].strip())]
        end = match.end()
    tokens.append(("text", template[end:]))
    parts = iter(tokens)
    text, stop = _block(parts, values, is_live=True)
    if stop:
        raise ValueError(f"`{stop}` without its beginning")
    return text


def _block(parts: Iterator[tuple[str, str]], values: Fields, *, is_live: bool) -> tuple[str, str]:
    """Render up to the action that ends the block; return the text and that action ('' at the end of the template)."""
    written = []
    for kind, part in parts:
        if kind == "text":
            written.append(part)
        elif part == "end" or part.startswith("else"):
            return "".join(written), part
        elif part.startswith("if "):
            written.append(_if(parts, part.removeprefix("if "), values, is_live=is_live))
        elif part == "range .Messages":
            written.append(_range(parts, values, is_live=is_live))
        else:
            written.append(_value(part, values) if is_live else "")
    return "".join(written), ""


def _if(parts: Iterator[tuple[str, str]], condition: str, values: Fields, *, is_live: bool) -> str:
    chosen = ""
    is_open = is_live  # no branch was taken yet
    while True:
        holds = is_open and _holds(condition, values)
        text, stop = _block(parts, values, is_live=holds)
        chosen = text if holds else chosen
        is_open = is_open and not holds
        if stop == "end":
            return chosen
        if not stop:
            raise ValueError("`if` without `end`")
        condition = stop.removeprefix("else").strip().removeprefix("if ") or "true"


def _range(parts: Iterator[tuple[str, str]], values: Fields, *, is_live: bool) -> str:
    body = list(_until_end(parts))
    messages = values["Messages"]
    assert isinstance(messages, Sequence)
    rows = messages if is_live else ()
    return "".join(_block(iter(body), row, is_live=True)[0] for row in rows)


def _until_end(parts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    depth = 1
    for kind, part in parts:
        depth += kind == "action" and (part.startswith(("if ", "range ")))
        depth -= kind == "action" and part == "end"
        if not depth:
            return
        yield kind, part
    raise ValueError("`range` without `end`")


def _holds(condition: str, values: Fields) -> bool:
    if condition == "true":
        return True
    if match := _EQUALS.fullmatch(condition):
        return values[match[1]] == ast.literal_eval(match[2])
    return bool(_value(condition, values))


def _value(expression: str, values: Fields) -> str:
    if expression.startswith('"'):
        return str(ast.literal_eval(expression))
    if re.fullmatch(r"\.\w+", expression):
        return str(values[expression[1:]])
    raise ValueError(f"`{expression}` is not of this part of the language")
