"""Tokenizers of SentencePiece in a GGUF file: the same ids, or refused with the reason.

Their ids in llama.cpp itself: `python benchmarks/llama_cpp.py --families`.
"""

import dataclasses
import json

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, models

from gguf_families import sentencepiece_tokenizer
from llmtune.deploy import gguf_model
from llmtune.deploy.export import export
from llmtune.deploy.gguf_vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED, gguf_vocabulary
from llmtune.errors import TokenizerError
from llmtune.models.gguf import read_gguf_tokenizer

TEXTS = ["The user asks: how many words does an answer have?   Three,", "naïve 12 345 numbers; aaaaaa ______"] * 6
PROMPT = "<|user|>How many   words? 12 345, naïve 日本</s><|assistant|>Three"


def write(make, kind, **options):
    """Export a tiny Llama with a tokenizer of this kind; returns (report, tokenizer, path)."""
    make.tokenizer = sentencepiece_tokenizer(TEXTS, kind)
    path = make.path("file").with_suffix(".gguf")
    return export(str(make.base()), path, **options), make.tokenizer, path


@pytest.mark.parametrize(("kind", "leads"), [("llama", True), ("metaspace", True), ("gemma", False)])
def test_a_file_holds_pieces_scores_and_kinds_and_gives_the_ids_of_training(make, tmp_path, kind, leads):
    report, tokenizer, path = write(make, kind)
    keys = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is leads
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.merges" not in keys
    kinds = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[name] for name in ("<unk>", "<s>", "<0x0A>", "<tool>")] == [UNKNOWN, CONTROL, BYTE, USER_DEFINED]
    (tmp_path / "empty").mkdir()
    read = read_gguf_tokenizer(path, tmp_path / "empty")
    assert read(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]
    assert read.decode(read.encode("Three words", add_special_tokens=False)).strip() == "Three words"
    assert ["one space more" in note for note in report.notes] == [True] * (kind == "metaspace")


def test_a_piece_that_is_merged_earlier_scores_higher():
    tokenizer = sentencepiece_tokenizer(TEXTS)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    vocabulary = gguf_vocabulary(tokenizer, len(tokenizer))
    scores = [vocabulary.scores[tokenizer.convert_tokens_to_ids("".join(merge))] for merge in merges]
    assert len(scores) > 50
    assert scores == sorted(scores, reverse=True)


def flat(vocabulary):
    return dataclasses.replace(vocabulary, scores=tuple(0.0 for _ in vocabulary.scores))


def reversed_scores(vocabulary):
    return dataclasses.replace(vocabulary, scores=tuple(-score for score in vocabulary.scores))


def without_space(vocabulary):
    return dataclasses.replace(vocabulary, leads_with_space=False)


def without_added(vocabulary):
    return dataclasses.replace(vocabulary, kinds=[1 if kind == USER_DEFINED else kind for kind in vocabulary.kinds])


@pytest.mark.parametrize("mutant", [flat, reversed_scores, without_space, without_added])
def test_a_vocabulary_that_gives_other_ids_is_refused(make, monkeypatch, mutant):
    monkeypatch.setattr(gguf_model, "gguf_vocabulary", lambda *a: mutant(gguf_vocabulary(*a)))
    with pytest.raises(TokenizerError, match="has other ids there"):
        write(make, "llama")
    assert not list(make.folder.glob("*.gguf"))


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused_with_the_reason(make):
    with pytest.raises(TokenizerError, match="a space before the first word alone"):
        write(make, "first")
    tokenizer = sentencepiece_tokenizer(TEXTS)
    rules = tokenizer.backend_tokenizer.to_str().replace('"<0x41>"', '"<0xAA >"')
    tokenizer._tokenizer = Tokenizer.from_str(rules)
    with pytest.raises(TokenizerError, match="lacks pieces for some bytes"):
        gguf_vocabulary(tokenizer, 1000)
    tokenizer._tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(TokenizerError, match="is Unigram with its own rules, and only BPE is written"):
        gguf_vocabulary(tokenizer, 1000)
