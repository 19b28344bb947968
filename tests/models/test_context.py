"""The longest sequence a model sees, read from its config alone."""

import pytest
from transformers import CONFIG_MAPPING

from llmtune.config.schema import ArchitectureConfig
from llmtune.models.catalog import resolve
from llmtune.models.read_config import Context, context_of
from llmtune.prepare import find_context, find_model_config

YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("gpt2", {"n_positions": 64}, Context(64, ends=True)),
        ("opt", {"max_position_embeddings": 64}, Context(64, ends=True)),
        ("gptj", {"n_positions": 64}, Context(64, ends=True)),
        ("gpt_neo", {"max_position_embeddings": 64}, Context(64, ends=True)),
        ("llama", {"max_position_embeddings": 64}, Context(64, ends=False)),
        ("gpt_neox", {"max_position_embeddings": 64}, Context(64, ends=False)),
        ("qwen2", {"max_position_embeddings": 512, "rope_parameters": YARN}, Context(2048, ends=False)),
        ("falcon", {"max_position_embeddings": 64, "alibi": True}, Context(64, ends=False)),
        ("jamba", {"max_position_embeddings": 64}, Context(64, ends=False)),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_a_context_ends_where_positions_come_from_a_table(model_type, options, expected):
    assert context_of(CONFIG_MAPPING[model_type](**options)) == expected


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gptj", "gpt_neo"])
def test_a_model_whose_context_ends_fails_on_one_token_more(model_type):
    import torch
    from transformers import AutoModelForCausalLM

    small = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20}
    options = {
        "gpt2": {"n_layer": 1},
        "gptj": {"n_layer": 1, "rotary_dim": 4},
        "opt": {"num_hidden_layers": 1, "ffn_dim": 16, "word_embed_proj_dim": 16},
        "gpt_neo": {"num_layers": 1, "attention_types": [[["global"], 1]]},
    }[model_type]
    config = CONFIG_MAPPING[model_type](max_position_embeddings=8, **small, **options)
    model, context = AutoModelForCausalLM.from_config(config), context_of(config)
    model(torch.arange(context.tokens)[None])
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.arange(context.tokens + 1)[None])


def test_a_model_from_scratch_has_the_context_that_its_shape_asks_for(tiny_model_folder):
    source = resolve("custom-nano")
    learned = ArchitectureConfig(max_seq_len=64, positions="learned")
    assert find_context(source, find_model_config(source), ArchitectureConfig()) == Context(2048, ends=False)
    assert find_context(source, find_model_config(source), learned) == Context(64, ends=True)
    source = resolve(str(tiny_model_folder))
    assert find_context(source, find_model_config(source), ArchitectureConfig()) == Context(256, ends=False)
