"""Translate a byte-level BPE tokenizer into the keys of a GGUF file.

A GGUF file holds the entries, the merges and the kind of each token, but not the rules that split text before the
merges: for those it names one of the ways built into llama.cpp (`tokenizer.ggml.pre`). A tokenizer that splits in
another way is refused. The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["HOSTILE_TEXTS", "Vocabulary", "gguf_vocabulary", "refuse_other_ids"]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of a token, as `tokenizer.ggml.token_type` numbers them."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTE_LEVEL = ("ByteLevel", True)

_Step = tuple[object, ...]

SPLITS: dict[tuple[_Step, ...], tuple[str, bool]] = {
    (_BYTE_LEVEL,): ("gpt-2", False),
    (("Digits", True), _BYTE_LEVEL): ("smollm", False),
    (("Split", _LLAMA3), ("ByteLevel", False)): ("llama-bpe", True),
    (("Split", _QWEN2), ("ByteLevel", False)): ("qwen2", False),
}
"""Steps before the merges -> (llama.cpp's name for them, whether words in the vocabulary skip the merges)."""

HOSTILE_TEXTS = (
    "",
    " ",
    "   three spaces before, two after  ",
    "1234567890 12 3.14 2024-11-21 ½ ² ٣ १२",
    "don't I'll WE'RE they'D 'tis",
    "tabs\tand\r\nwindows\n\n\nlines\n \n",
    "naïve café Ångström – “quotes” … €",
    "日本語のテキスト 中文 한국어 ไทย العربية עברית हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u200d\ufeff\u00ad",
    "<|im_start|>system\n<|im_end|> <s></s> <|endoftext|> [INST] <think>",
    'def f(x):\n    return {"a": [x ** 2, -1e-5]}  # ok?',
    "a" * 300 + " " * 40 + "_" * 17 + "!?!?",
    "\x00\x01\x7f\x85\u2028\u3000",
)
"""Texts for which a written tokenizer must give the same ids as its source."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file holds it."""

    tokens: list[str]
    """By id."""
    kinds: list[int]
    """By id: NORMAL, CONTROL, USER_DEFINED or UNUSED."""
    merges: list[str]
    pre: str
    adds_bos: bool
    adds_eos: bool
    normalizes: bool
    """The tokenizer brings text into composed form (NFC) first, which a GGUF file cannot express."""


def gguf_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> Vocabulary:
    """Return the vocabulary with a token for each of the `rows` of the embedding, `[PADi]` for spare ones.

    Raises TokenizerError for a tokenizer that is not byte-level BPE, has no merges or more ids than rows, or splits
    text in a way that llama.cpp has no name for.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = rules["model"], rules.get("normalizer")
    plain = not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    if model["type"] != "BPE" or not plain or (normalizer is not None and normalizer["type"] != "NFC"):
        raise _refused(tokenizer, f"is {model['type']} with its own rules, and only byte-level BPE is written")
    pre_tokenizers = (rules["pre_tokenizer"] or {}).get("pretokenizers", [rules["pre_tokenizer"]])
    name, ignores_merges = SPLITS.get(tuple(_step(rule) for rule in pre_tokenizers), ("", False))
    if not name or ignores_merges != bool(model.get("ignore_merges")):
        raise _refused(tokenizer, "splits text in a way that llama.cpp has no name for")
    if max(tokenizer.get_vocab().values()) >= rows:
        raise _refused(tokenizer, f"has ids beyond the {rows:,} rows of the model's embedding")
    # llama.cpp needs a token for each row of the embedding, and calls spare ones so.
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    for piece, index in model["vocab"].items():
        tokens[index], kinds[index] = piece, NORMAL
    for added in rules["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise _refused(
            tokenizer, "has no merges, only bytes and control tokens, and llama.cpp reads none without merges"
        )
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]  # what a post-processor adds shows at its ends
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        pre=name,
        adds_bos=tokenizer.bos_token_id is not None and framed[0] == tokenizer.bos_token_id,
        adds_eos=tokenizer.eos_token_id is not None and framed[-1] == tokenizer.eos_token_id,
        normalizes=normalizer is not None,
    )


def refuse_other_ids(
    source: PreTrainedTokenizerFast,
    written: PreTrainedTokenizerFast,
    *,
    normalizes: bool,
) -> None:
    """Raise TokenizerError where the tokenizer read back gives other ids, special ids or another chat template.

    normalizes: compare composed text (NFC), which the source makes of every text.
    """
    added = [token.content for token in source.added_tokens_decoder.values()]
    for text in (*HOSTILE_TEXTS, *(f"a{token} b" for token in added)):
        # llama.cpp does not compose text, so only text that is composed already can agree.
        text = unicodedata.normalize("NFC", text) if normalizes else text
        expected = source.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if written.backend_tokenizer.encode(text, add_special_tokens=False).ids != expected:
            raise _refused(source, f"does not survive in the file: {text!r} has other ids there")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "chat_template"):
        if getattr(source, name) != getattr(written, name):
            raise _refused(source, f"does not survive in the file: its {name} is another one there")


def _step(rule: dict[str, Any] | None) -> _Step:
    """Return a step before the merges reduced to the settings that decide its splits, or all of them as JSON."""
    kind = (rule or {}).get("type")
    if rule is not None and kind == "ByteLevel" and not rule["add_prefix_space"]:
        return kind, bool(rule["use_regex"])
    if rule is not None and kind == "Digits":
        return kind, bool(rule["individual_digits"])
    if rule is not None and kind == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]:
        return kind, rule["pattern"].get("Regex")
    return kind, json.dumps(rule)


def _refused(tokenizer: PreTrainedTokenizerFast, reason: str) -> TokenizerError:
    problem = f"the tokenizer ({type(tokenizer).__name__}) {reason}"
    return TokenizerError(problem, where="--to gguf", fix="export as safetensors, which keeps every tokenizer")
