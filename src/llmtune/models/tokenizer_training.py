"""Train a byte-level BPE tokenizer: any text goes in and comes out again exactly, whatever the vocabulary.

The result depends on the texts and the settings alone, not on the number of threads (P3's rule for everything that is
prepared).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.errors import ConfigError, TokenizerError
from llmtune.models.chat_templates import shipped_chat_templates

__all__ = ["SPECIAL_TOKENS", "TokenizerReport", "measure_tokenizer", "train_tokenizer"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
"""End of a document, padding, and the two ends of a ChatML turn: always the first four ids."""

_BYTES = 256


@dataclass(frozen=True)
class TokenizerReport:
    """How a tokenizer does on given texts.

    `unused_share` is the fraction of entries (special tokens aside) that no text used.
    """

    vocab_size: int
    texts: int
    num_bytes: int
    num_tokens: int
    bytes_per_token: float
    unused_share: float
    round_trip_failures: int


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    chat_template: str | None = "chatml",
    special_tokens: Sequence[str] = (),
    min_frequency: int = 2,
    max_length: int = 2048,
) -> Any:
    """Learn `vocab_size` entries (fewer when the texts do not hold that many) and return a transformers fast tokenizer.

    texts are streamed; only the counts of their words are held. chat_template: a shipped name, or the template's text;
    None for none. special_tokens come after the four that are always there. min_frequency: times a pair must be seen to
    become an entry. Digits are split one by one, so that numbers have one spelling. Raises ConfigError (vocabulary too
    small), TokenizerError (no text).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = list(dict.fromkeys([*SPECIAL_TOKENS, *special_tokens]))
    least = _BYTES + len(specials)
    if vocab_size < least:
        raise ConfigError(
            f"a vocabulary of {vocab_size} cannot hold the {_BYTES} bytes and {len(specials)} special tokens",
            where="model.architecture.vocab_size",
            fix=f"{least} or more",
        )
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=64,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.characters:
        raise TokenizerError(
            "there is no text to train a tokenizer on", where="data.train", fix="name data with text in it"
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[1],
        additional_special_tokens=specials[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    if chat_template is not None:
        fast.chat_template = shipped_chat_templates().get(chat_template, chat_template)
    return fast


def measure_tokenizer(tokenizer: Any, texts: Iterable[str]) -> TokenizerReport:
    """Encode every text: bytes per token, entries never used, and texts that do not come back exactly (a byte-level
    tokenizer has none).
    """
    used: set[int] = set()
    count = num_bytes = num_tokens = failures = 0
    backend = tokenizer.backend_tokenizer
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        used.update(ids)
        count += 1
        num_bytes += len(text.encode("utf-8", "surrogatepass"))
        num_tokens += len(ids)
        failures += backend.decode(ids, skip_special_tokens=False) != text
    ordinary = len(tokenizer) - len(tokenizer.all_special_ids)
    unused = ordinary - len(used - set(tokenizer.all_special_ids))
    return TokenizerReport(
        vocab_size=len(tokenizer),
        texts=count,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        bytes_per_token=num_bytes / num_tokens if num_tokens else 0.0,
        unused_share=unused / ordinary if ordinary else 0.0,
        round_trip_failures=failures,
    )


class _Counted:
    """Passes texts through and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Any:
        for text in self._texts:
            self.characters += len(text)
            yield text
