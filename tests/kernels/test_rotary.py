"""The attention modules whose rotation a kernel takes over call Llama's, and the CPU's forward stays the library's."""

import ast
import importlib
import inspect
import textwrap

import pytest
import torch
from torch import nn

from llmtune.kernels.patch_model import patch_model, undo_patches
from llmtune.kernels.rotary import ATTENTIONS, NAME, is_rotary_attention

MODULES = {"SmolLM3": "smollm3", "Qwen3Moe": "qwen3_moe"}


def attention_of(name):
    family = name.removesuffix("Attention")
    folder = MODULES.get(family, family.lower())
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return module, getattr(module, name)


def body(function):
    parsed = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    return [ast.dump(line) for line in parsed.body if not isinstance(line, ast.Expr)]


@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_each_class_taken_over_rotates_as_llama_does(name):
    """A new release of the library may change one."""
    llama, _ = attention_of("LlamaAttention")
    module, kind = attention_of(name)
    for function in (NAME, "rotate_half"):
        assert body(getattr(module, function)) == body(getattr(llama, function))
    assert is_rotary_attention(object.__new__(kind))


def test_only_the_name_is_another_and_only_in_the_patched_module(build_model, monkeypatch):
    model = build_model("llama").model
    first, second = model.layers[0].self_attn, model.layers[1].self_attn
    calls = []

    def rotate(query, key, cos, sin, backward):
        calls.append(backward)

    monkeypatch.setattr(torch.ops.llmtune, "rotate_", rotate)
    assert patch_model(nn.ModuleList([first]), "cuda", ["liger-kernel"])["rotary positions by Liger"] == 1
    x = torch.randn(1, 5, 48)
    positions = model.rotary_emb(x, torch.arange(5)[None])
    with torch.no_grad():
        second(x, position_embeddings=positions, attention_mask=None)
        assert calls == []
        first(x, position_embeddings=positions, attention_mask=None)
        assert calls == [False]
        undo_patches(first)
        first(x, position_embeddings=positions, attention_mask=None)
    assert calls == [False]
    assert patch_model(model, "cpu")["rotary positions by Liger"] == 0
