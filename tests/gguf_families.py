"""A tiny random model of each family that is written as GGUF, with every setting that its row of the table writes."""

import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_STRETCH = [1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0]
_DECODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": _STRETCH}
_LONGROPE |= {"long_factor": [2 * one for one in _STRETCH], "original_max_position_embeddings": 256}

FAMILIES = {
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "granite": (
        "granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    ),
    "llama": ("llama", {}),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi3-longrope": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": _LONGROPE,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
}
"""Name -> (`model_type`, what differs from a plain decoder)."""


def write_family(name, folder, tokenizer):
    """Save the model and the tokenizer; biases and norms are not trivial."""
    kind, settings = FAMILIES[name]
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_DECODER, **settings, **ids}))
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SPACES = {
    "llama": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "gemma": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
}
"""Kinds of tokenizers that SentencePiece's become: normalizer, step before the merges."""
WRITTEN_SPACES = ("llama", "gemma")
"""Those that give the ids of llama.cpp for every text; `metaspace` for every text that does not begin with a space."""

_CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"


def sentencepiece_tokenizer(texts, kind="llama"):
    """Train BPE over characters, with bytes for others, as SentencePiece does: no merge crosses into the next word."""
    control = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    rules = json.loads(backend.to_str())
    rules["added_tokens"] = [one for one in rules["added_tokens"] if one["content"] in control]
    backend = Tokenizer.from_str(json.dumps(rules))
    backend.normalizer, backend.pre_tokenizer = SPACES[kind]
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.chat_template = _CHAT
    return tokenizer
