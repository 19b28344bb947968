"""What there is to say about a rendered row beside its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llmtune.data.encoding import Encoded
from llmtune.data.example import Conversation
from llmtune.data.messages import REASONING_FIELDS
from llmtune.data.spans import Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Note", "lost_notes", "text_notes"]


class Note(NamedTuple):
    """Something about a rendered row that its reader should know: a code to count by, and a sentence."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def text_notes(encoded: Encoded, eos_id: int | None, tokenizer: PreTrainedTokenizerBase) -> list[Note]:
    """Name control strings in the content, a doubled begin-of-text token and characters the tokenizer does not know."""
    notes = []
    if encoded.hostile:
        shown = ", ".join(sorted(set(encoded.hostile))[:5])
        notes.append(Note("control-string", f"spells control tokens, encoded as plain text: {shown}"))
    bos = tokenizer.bos_token_id
    if bos is not None and bos != eos_id and encoded.ids[:2] == [bos, bos]:
        notes.append(Note("doubled-bos", "begins with two begin-of-text tokens"))
    if encoded.unknown:
        notes.append(Note("unknown-characters", f"holds characters the tokenizer does not know ({encoded.unknown} tokens)"))
    return notes


def lost_notes(conversation: Conversation, whole: Rendering) -> list[Note]:
    """Name messages and reasoning that the template leaves out."""
    shown = {origin for _, origin in whole.runs}
    notes = []
    for index, message in enumerate(conversation.messages):
        if message.content.strip() and index not in shown:
            notes.append(Note("not-rendered", f"the template leaves out message {index + 1} ({message.role})"))
        reasoning = next((message.extra[name] for name in REASONING_FIELDS if message.extra.get(name)), None)
        if isinstance(reasoning, str) and reasoning.strip() and reasoning.strip() not in whole.text:
            notes.append(Note("reasoning-dropped", f"the template leaves out the reasoning of message {index + 1}"))
    return notes
