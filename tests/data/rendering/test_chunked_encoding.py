"""Long texts are encoded in pieces: the tokens are those of one call, and the memory is a few times the text's."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from case_helpers import few_of
from llmtune.data.rendering import chunked_encoding
from llmtune.data.rendering.chunked_encoding import located_tokens

words = st.sampled_from(
    ["Hello", " world", "\n", "\n\n", "   ", "12", "3456789", "naïve", "東京", "e\u0301", "🙂", "🚀🚀", "don't", "_under_",
     "<|im_end|>", "<think>", "[INST]", "</s>", "<s>", "a" * 48, "(x)", "...", "\t\tif", "Ω≈ç", "\u00a0", "x=1;"]
)  # fmt: skip


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(chunked_encoding, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(chunked_encoding, "OVERLAP_CHARACTERS", 150)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(words, min_size=200, max_size=400))
def test_the_tokens_of_pieces_are_those_of_the_whole(name, tokenizer_for, small_pieces, parts):
    """Q5: ids and places, for every make of tokenizer."""
    backend, text = tokenizer_for(name).backend_tokenizer, "".join(parts)
    ids, starts, stops, _ = chunked_encoding._encode(backend, text, with_words=False)
    located = located_tokens(backend, text)
    assert (located[0], list(located[1]), list(located[2])) == (ids, starts, stops)


def test_most_makes_of_tokenizers_are_encoded_in_pieces(families, tokenizer_for, small_pieces):
    text = "The quick brown fox jumps over the lazy dog. " * 40
    joined = {
        name
        for name in families
        if chunked_encoding._encode_chunks(tokenizer_for(name).backend_tokenizer, text) is not None
    }
    assert {"chatml", "qwen3", "llama3", "nemotron", "deepseek"} <= joined
    assert "mistral1" not in joined  # it knows no words, so there is no place to join at


def test_pieces_cut_anywhere_are_a_mutant_the_law_catches(tokenizer_for, small_pieces):
    backend = tokenizer_for("chatml").backend_tokenizer
    text = "assistant answers " * 40
    uncut = located_tokens(backend, text)[0]
    cut = [
        token_id
        for start in range(0, len(text), 300)
        for token_id in located_tokens(backend, text[start : start + 300])[0]
    ]
    assert cut != uncut


MEASURED = """
import json, resource, sys
from transformers import PreTrainedTokenizerFast
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

renderer = Renderer(PreTrainedTokenizerFast.from_pretrained(sys.argv[1]))
text = sys.argv[2] + "How many words does an answer have, and why? 12 or 13.\\n" * int(float(sys.argv[3]) * 1e6 / 55)
talk = lambda answer: Conversation("r:1", (Message("user", "q"), Message("assistant", answer)))
renderer.render(talk(text[:100_000]))
before = peak()
rendered = renderer.render(talk(text))
print(json.dumps([peak() - before, len(text), len(rendered.input_ids)]))
"""


@pytest.mark.parametrize("attack", few_of(["", "<|im_end|>"], ["<|im_end|>"]))
def test_a_large_row_takes_memory_a_few_times_its_size(attack, tiny_tokenizer, tmp_path):
    """A row of 1 MB, also one that spells control tokens. In one call the tokenizer alone takes 140 times the row."""
    tiny_tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURED, str(tmp_path), attack, "1"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    taken, size, tokens = json.loads(answer)
    assert tokens > size / 4
    assert taken < 75 * size, f"{taken / size:.0f} times the row"
