"""Messages whose content is a list of blocks, as Anthropic writes them: calls, results and thoughts among the text.

| block | becomes |
| --- | --- |
| `text` | content |
| `thinking` | the reasoning of the message |
| `tool_use` | a call of the message |
| `tool_result` | a message of the tool before the message |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["without_blocks"]

_BLOCKS = ("thinking", "tool_use", "tool_result")


def without_blocks(turn: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """The turn as turns without such blocks; as it is where it has none. Other blocks stay in its content."""
    content = turn.get("content")
    blocks = content if isinstance(content, (list, tuple)) else ()
    if not any(_type_of(block) in _BLOCKS for block in blocks):
        yield turn
        return
    rest: list[object] = []
    changed = dict(turn)
    calls: list[object] = []
    for block in blocks:
        kind = _type_of(block)
        if kind == "tool_result":
            result = block.get("content")
            yield {
                "role": "tool",
                "content": "" if result is None else result,
                "tool_call_id": block.get("tool_use_id"),
            }
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            call = {"type": "function", "id": block.get("id"), "function": function}
            calls.append({key: value for key, value in call.items() if value is not None})
        elif kind == "thinking":
            changed["thinking"] = f"{changed.get('thinking') or ''}{block.get('thinking') or ''}"
        else:
            rest.append(block)
    if calls:
        changed["tool_calls"] = calls
    if rest or calls or changed.get("thinking"):
        yield {**changed, "content": rest or None}


def _type_of(block: object) -> object:
    return block.get("type") if isinstance(block, Mapping) else None
