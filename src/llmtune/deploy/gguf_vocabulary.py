"""Translate a tokenizer into the keys of a GGUF file: byte-level BPE, or SentencePiece's over characters.

A GGUF file holds the entries, the merges and the kind of each token, but not the rules that split text before the
merges: for those it names one of the ways built into llama.cpp (`tokenizer.ggml.pre`). A tokenizer that splits in
another way is refused. The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Of SentencePiece's BPE (Kudo and Richardson 2018, arXiv:1808.06226) the file holds a score of each piece instead of the
merges. llama.cpp joins, again and again, the two neighbours whose piece has the highest score.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["HOSTILE_TEXTS", "Vocabulary", "gguf_vocabulary", "refuse_other_ids"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
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

_SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, _REPLACE]}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
_SPLIT_SPACE = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

SPACES: tuple[tuple[dict[str, Any] | None, dict[str, Any] | None, tuple[bool, bool]], ...] = (
    (_PREPEND, None, (True, False)),
    (None, _METASPACE | {"prepend_scheme": "always"}, (True, True)),
    (None, _METASPACE | {"prepend_scheme": "never"}, (False, False)),
    (_REPLACE, _SPLIT_SPACE, (False, False)),  # finds no space any more
    (_REPLACE, None, (False, False)),
)
"""What SentencePiece's tokenizers do with spaces: normalizer, step before the merges, and of `Vocabulary`
(`leads_with_space`, `joins_space`).
"""

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
    """By id: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE."""
    merges: list[str]
    pre: str
    """llama.cpp's name for the steps before the merges; of SentencePiece's empty."""
    adds_bos: bool
    adds_eos: bool
    normalizes: bool
    """The tokenizer brings text into composed form (NFC) first, which a GGUF file cannot express."""
    scores: tuple[float, ...] = ()
    """By id, of a SentencePiece tokenizer: of two pairs, the one whose piece has more is joined first."""
    leads_with_space: bool = False
    """A space is put before a text, and before each text after a control token."""
    joins_space: bool = False
    """... but not before one that begins with a space, where llama.cpp puts it too."""


def gguf_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> Vocabulary:
    """Return the vocabulary with a token for each of the `rows` of the embedding, `[PADi]` for spare ones.

    Raises TokenizerError for a tokenizer that is not BPE, has no merges or more ids than rows, splits text in a way
    that llama.cpp has no name for, or treats spaces in another way than llama.cpp.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = rules["model"], rules.get("normalizer")
    if model["type"] != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise _refused(tokenizer, f"is {model['type']} with its own rules, and only BPE is written")
    pre, spaces = "", (False, False)
    if model.get("byte_fallback"):
        spaces = _spaces(tokenizer, rules)
    else:
        pre = _pre(tokenizer, rules)
    if max(tokenizer.get_vocab().values()) >= rows:
        raise _refused(tokenizer, f"has ids beyond the {rows:,} rows of the model's embedding")
    # llama.cpp needs a token for each row of the embedding, and calls spare ones so.
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    for piece, index in model["vocab"].items():
        tokens[index], kinds[index] = piece, NORMAL
    for added in rules["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if not pairs:
        raise _refused(
            tokenizer, "has no merges, only bytes and control tokens, and llama.cpp reads none without merges"
        )
    if not pre:
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        if not set(pieces) <= model["vocab"].keys():
            raise _refused(tokenizer, "lacks pieces for some bytes, and llama.cpp needs one for each")
        for piece in pieces:
            kinds[model["vocab"][piece]] = BYTE
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = UNKNOWN
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]  # what a post-processor adds shows at its ends
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        merges=[" ".join(pair) for pair in pairs] if pre else [],
        pre=pre,
        adds_bos=tokenizer.bos_token_id is not None and framed[0] == tokenizer.bos_token_id,
        adds_eos=tokenizer.eos_token_id is not None and framed[-1] == tokenizer.eos_token_id,
        normalizes=bool(pre) and normalizer is not None,
        scores=() if pre else _scores(tokens, pairs),
        leads_with_space=spaces[0],
        joins_space=spaces[1],
    )


def refuse_other_ids(source: PreTrainedTokenizerFast, written: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """Raise TokenizerError where the tokenizer read back gives other ids, special ids or another chat template.

    vocabulary: what was written; texts that llama.cpp is known to read otherwise are compared without that.
    """
    added = [token.content for token in source.added_tokens_decoder.values()]
    for text in (*HOSTILE_TEXTS, *(f"a{token} b" for token in added)):
        # llama.cpp does not compose text, so only text that is composed already can agree.
        text = unicodedata.normalize("NFC", text) if vocabulary.normalizes else text
        if vocabulary.joins_space:
            text = re.sub(f"(^|{'|'.join(map(re.escape, added))}) +", r"\1", text)
        expected = source.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if written.backend_tokenizer.encode(text, add_special_tokens=False).ids != expected:
            raise _refused(source, f"does not survive in the file: {text!r} has other ids there")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "chat_template"):
        if getattr(source, name) != getattr(written, name):
            raise _refused(source, f"does not survive in the file: its {name} is another one there")


def _pre(tokenizer: PreTrainedTokenizerFast, rules: dict[str, Any]) -> str:
    """Return llama.cpp's name for the steps of a byte-level BPE tokenizer. Raises TokenizerError where it has none."""
    if (rules.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _refused(tokenizer, "changes text before it splits it, which a GGUF file cannot express")
    pre_tokenizers = (rules["pre_tokenizer"] or {}).get("pretokenizers", [rules["pre_tokenizer"]])
    name, ignores_merges = SPLITS.get(tuple(_step(rule) for rule in pre_tokenizers), ("", False))
    if not name or ignores_merges != bool(rules["model"].get("ignore_merges")):
        raise _refused(tokenizer, "splits text in a way that llama.cpp has no name for")
    return name


def _spaces(tokenizer: PreTrainedTokenizerFast, rules: dict[str, Any]) -> tuple[bool, bool]:
    """Return (`leads_with_space`, `joins_space`). Raises TokenizerError for spaces that llama.cpp treats otherwise."""
    for normalizer, pre_tokenizer, spaces in SPACES:
        if (rules.get("normalizer"), rules.get("pre_tokenizer")) == (normalizer, pre_tokenizer):
            return spaces
    if (rules.get("pre_tokenizer") or {}).get("prepend_scheme") == "first":
        raise _refused(tokenizer, "puts a space before the first word alone, and llama.cpp after control tokens too")
    raise _refused(tokenizer, "treats spaces in a way that llama.cpp does not")


def _scores(tokens: list[str], pairs: list[list[str]]) -> tuple[float, ...]:
    """Return a score for each token: minus the place of the first merge that gives it, below all for the others."""
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(pairs):
        places.setdefault(left + right, place)
    return tuple(-float(places.get(token, len(pairs))) for token in tokens)


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
