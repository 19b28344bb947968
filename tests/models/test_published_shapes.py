"""The parameter counts that `list-models` prints are those of the published shapes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from llmtune.models.catalog import CATALOG
from llmtune.models.read_config import quiet_libraries


def shape(kind, vocab, width, layers, heads, kv_heads, feed_forward, *, tied, **more):
    return kind(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **more,
    )


SHAPES = {
    "smollm2-135m": shape(LlamaConfig, 49_152, 576, 30, 9, 3, 1536, tied=True),
    "smollm2-360m": shape(LlamaConfig, 49_152, 960, 32, 15, 5, 2560, tied=True),
    "smollm2-1.7b": shape(LlamaConfig, 49_152, 2048, 24, 32, 32, 8192, tied=True),
    "gpt2-small": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "llama-3.2-1b": shape(LlamaConfig, 128_256, 2048, 16, 32, 8, 8192, tied=True),
    "llama-3.2-3b": shape(LlamaConfig, 128_256, 3072, 28, 24, 8, 8192, tied=True),
    "llama-3.1-8b": shape(LlamaConfig, 128_256, 4096, 32, 32, 8, 14_336, tied=False),
    "mistral-7b-v0.3": shape(MistralConfig, 32_768, 4096, 32, 32, 8, 14_336, tied=False),
    "qwen3-0.6b": shape(Qwen3Config, 151_936, 1024, 28, 16, 8, 3072, tied=True, head_dim=128),
    "qwen3-1.7b": shape(Qwen3Config, 151_936, 2048, 28, 16, 8, 6144, tied=True, head_dim=128),
    "qwen3-4b": shape(Qwen3Config, 151_936, 2560, 36, 32, 8, 9728, tied=True, head_dim=128),
    "qwen3-8b": shape(Qwen3Config, 151_936, 4096, 36, 32, 8, 12_288, tied=False, head_dim=128),
    "gemma-3-1b": shape(Gemma3TextConfig, 262_144, 1152, 26, 4, 1, 6912, tied=True, head_dim=256),
    "phi-4-mini": shape(Phi3Config, 200_064, 3072, 32, 24, 8, 8192, tied=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_catalog_counts_what_the_published_shape_holds(name):
    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name])
    assert sum(one.numel() for one in model.parameters()) == next(row.parameters for row in CATALOG if row.name == name)
