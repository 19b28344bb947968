"""Tiny random models of the architectures people tune, and examples to run them on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example

VOCABULARY = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "llama-tied": lambda: transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, head_dim=8, sliding_window=16),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SHAPE, head_dim=8, sliding_window=16, attn_logit_softcapping=2.0, final_logit_softcapping=1.5
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=16),
    "granite": lambda: transformers.GraniteConfig(**_SHAPE, logits_scaling=3.0, attention_multiplier=0.3),
    "cohere": lambda: transformers.CohereConfig(**_SHAPE, logit_scale=0.3),
    "phi": lambda: transformers.PhiConfig(**_SHAPE),
    "phi3": lambda: transformers.Phi3Config(**_SHAPE),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, **_STILL),
}


class Arithmetic:
    """Forward passes in one type: float32 as it is, or autocast to bfloat16."""

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)


@pytest.fixture
def arithmetic() -> type[Arithmetic]:
    return Arithmetic


@pytest.fixture
def build_model() -> Callable[..., Any]:
    def build(name: str, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(
            MODELS[name](), attn_implementation="eager" if name == "gemma2" else "sdpa"
        ).train()

    return build


@pytest.fixture
def make_examples() -> Callable[..., list[Example]]:
    def make(
        lengths: tuple[int, ...] = (23, 5, 1, 40, 150), seed: int = 0, vocabulary: int = VOCABULARY
    ) -> list[Example]:
        random = np.random.default_rng(seed)
        examples = []
        for number, length in enumerate(lengths):
            weights = (random.random(length) < 0.7).astype(np.float32) * random.choice([1.0, 0.5, 2.0], length).astype(
                np.float32
            )
            weights[0] = 0
            examples.append(Example(f"row:{number}", random.integers(0, vocabulary, length).astype(np.int32), weights))
        return examples

    return make


@pytest.fixture
def flat(make_examples: Callable[..., list[Example]]) -> MicroBatch:
    return make_micro_batch(make_examples(), "flat", 0)


@pytest.fixture
def padded(make_examples: Callable[..., list[Example]]) -> MicroBatch:
    return make_micro_batch(make_examples(), "padded", 0)
