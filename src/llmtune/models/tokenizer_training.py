"""Train a byte-level BPE tokenizer: any text goes in and comes out again exactly, whatever the vocabulary.

The result depends on the texts and the settings alone, not on the number of threads (as everything that is prepared,
P3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.errors import ConfigError, TokenizerError
from llmtune.models.chat_templates import shipped_chat_templates

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

__all__ = ["SPECIAL_TOKENS", "TokenizerReport", "measure_tokenizer", "train_tokenizer"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
"""End of a document, padding, and the two ends of a ChatML turn: always the first four ids."""

_BYTES = 256


@dataclass(frozen=True)
class TokenizerReport:
    """Measurements of a tokenizer on given texts."""

    vocab_size: int
    texts: int
    num_bytes: int
    num_tokens: int
    bytes_per_token: float
    unused_share: float
    """Fraction of the entries (special tokens aside) that occur in no text."""
    round_trip_failures: int
    """Texts that do not come back exactly from their ids."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    chat_template: str | None = "chatml",
    special_tokens: Sequence[str] = (),
    min_frequency: int = 2,
    max_length: int = 2048,
) -> PreTrainedTokenizerFast:
    """Learn `vocab_size` entries, fewer when the texts do not hold that many, by byte-level BPE.

    texts: streamed; only the counts of their words are held in memory. chat_template: a shipped name, the template's
    text, or None. special_tokens: further ones, after the four that are always there. min_frequency: times a pair must
    occur to become an entry. max_length: `model_max_length` of the result, in tokens.

    Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2).

    Raises ConfigError for a vocabulary too small for bytes and special tokens, TokenizerError when there is no text.
    """
    from transformers import PreTrainedTokenizerFast

    specials = list(dict.fromkeys([*SPECIAL_TOKENS, *special_tokens]))
    least = _BYTES + len(specials)
    if vocab_size < least:
        raise ConfigError(
            f"a vocabulary of {vocab_size} cannot hold the {_BYTES} bytes and {len(specials)} special tokens",
            where="model.architecture.vocab_size",
            fix=f"{least} or more",
        )
    tokenizer, trainer = _byte_level_bpe(vocab_size, specials, min_frequency)
    num_characters = 0

    def counted() -> Iterator[str]:
        nonlocal num_characters
        for text in texts:
            num_characters += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    # Counted on the way, because the texts are a stream that can be read once.
    if not num_characters:
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


def _byte_level_bpe(vocab_size: int, special_tokens: Sequence[str], min_frequency: int) -> tuple[Tokenizer, BpeTrainer]:
    """Give an untrained tokenizer on bytes, and what trains it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),  # one spelling for every number
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        # Every byte gets an entry, also those that occur in no text: without them a text would not come back.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=64,  # a ruler of 10,000 dashes is no word
    )
    return tokenizer, trainer


def measure_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> TokenizerReport:
    """Encode and decode every text, and count bytes, tokens, unused entries and texts that do not come back exactly.

    A byte-level tokenizer gives every text back.
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
