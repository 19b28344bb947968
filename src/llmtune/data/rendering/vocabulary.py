"""The parts of a tokenizer that rendering uses, without the library that loaded it.

A process that only tokenizes receives this instead of the tokenizer object, so it imports neither transformers nor
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from llmtune.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """The encoder of a fast tokenizer with its template and special tokens. Picklable."""

    backend: Tokenizer
    """Encodes without truncation, padding or special handling of control tokens."""
    chat_template: str | dict[str, str] | list[dict[str, str]] | None
    """As the tokenizer has it: a text, several by name, a list of `{"name", "template"}`, or None."""
    special_tokens: dict[str, str | list[str]]
    """Special tokens by their role (`bos_token`, ...), as the tokenizer has them: a text, or several."""
    control_tokens: dict[int, str]
    """Text of every control token (an added token that is more than whitespace) by its id."""
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    before: tuple[int, ...]
    """Ids that the tokenizer adds before a text."""
    after: tuple[int, ...]
    """Ids that end a document: those the tokenizer adds after a text, and the end token."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Make one of a loaded tokenizer. Raises `TokenizerError` for one without a `tokenizers` backend."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            name = type(tokenizer).__name__
            raise TokenizerError(
                f"{name} is not a fast tokenizer, so the place of its tokens in the text is unknown",
                where="model.tokenizer",
                fix="use a folder with a tokenizer.json",
            )
        before, after = _frame(tokenizer)
        # A copy, because the tokenizer's own encoder may be used by others with these settings.
        if backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens:
            backend = Tokenizer.from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        return cls(
            backend=backend,
            chat_template=tokenizer.chat_template,
            special_tokens=dict(tokenizer.special_tokens_map),
            control_tokens={
                token_id: token.content
                for token_id, token in tokenizer.added_tokens_decoder.items()
                if token.content.replace("\u2581", " ").strip()  # SentencePiece writes a space as U+2581
            },
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            unknown_id=tokenizer.unk_token_id,
            before=before,
            after=after,
        )

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens spelled out."""
        return self.backend.decode(ids, skip_special_tokens=False)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer adds around a text, read off one letter encoded with and without them."""
    # By trying, because tokenizers keep these ids in several places, and which one counts depends on their class.
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    starts = range(len(framed) - len(bare) + 1)
    start = next((start for start in starts if framed[start : start + len(bare)] == bare), 0)
    before, after = framed[:start], framed[start + len(bare) :]
    end_id = tokenizer.eos_token_id
    if end_id is not None and end_id not in after:
        after.append(end_id)
    return tuple(before), tuple(after)
