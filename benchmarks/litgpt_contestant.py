"""litgpt as a contestant: its model, LoRA layers, chunked loss and Fabric, in the loop that its recipes run.

Weights and the adapter's first values are those every contestant starts from. Its recipes average the losses of
micro-batches; here each is weighted by its trained tokens, which costs nothing and makes the sums those of the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from starting_point import Rows, Step, Training, load_model, zero_first
from workloads import Workload

if TYPE_CHECKING:
    from litgpt import GPT
    from torch import Tensor
    from transformers import PreTrainedModel

NAME = "SmolLM2-135M-Instruct"
CHUNK = 128
"""Tokens of a chunk of the head and of its loss: what litgpt's recipes take."""

LAYERS = {
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}
"""Names of layers in transformers -> in litgpt."""
JOINED = ("q_proj", "k_proj", "v_proj")
"""Layers of transformers that are one in litgpt."""


def train(workload: Workload, rows: Rows, device: str, micro_batch: int) -> Training:
    """Train with micro-batches of `micro_batch` rows: bf16 autocast over float32 weights, AdamW, clipping at 1."""
    source = load_model(workload, "cpu", "float32")
    # Only litgpt's model stays: the generator holds the one reference to it, and this function's are gone.
    return Training(source.config, _steps(workload, build(workload, source), rows, device, micro_batch))


def _steps(workload: Workload, model: GPT, rows: Rows, device: str, micro_batch: int) -> Iterator[Step]:
    import lightning
    import torch
    from litgpt.utils import chunked_cross_entropy

    fabric = lightning.Fabric(accelerator=device, devices=1, precision="bf16-mixed")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = fabric.setup(
        model, torch.optim.AdamW(parameters, lr=workload.learning_rate, weight_decay=0.0, fused=True)
    )
    model.train()
    for start in range(0, len(rows), workload.rows_a_step):
        step = rows[start : start + workload.rows_a_step]
        trained = sum(int((zero_first(weights) > 0).sum()) for _, weights in step)
        began, mean = time.perf_counter(), 0.0
        for first in range(0, len(step), micro_batch):
            ids, targets = padded(step[first : first + micro_batch])
            logits = model(ids.to(device), lm_head_chunk_size=CHUNK)
            logits[-1] = logits[-1][..., :-1, :]
            share = int((targets[:, 1:] != -100).sum()) / trained
            loss = chunked_cross_entropy(logits, targets[:, 1:].to(device), chunk_size=CHUNK) * share
            fabric.backward(loss)
            mean += float(loss.detach())
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield Step(time.perf_counter() - began, mean)


def padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Ids and targets, int64 [rows, longest]; -100 where nothing is learned."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids, targets = np.zeros((len(rows), longest), dtype=np.int64), np.full((len(rows), longest), -100, dtype=np.int64)
    for number, (tokens, weights) in enumerate(rows):
        ids[number, : len(tokens)] = tokens
        targets[number, : len(tokens)] = np.where(zero_first(weights) > 0, tokens, -100)
    return torch.from_numpy(ids), torch.from_numpy(targets)


def build(workload: Workload, source: PreTrainedModel) -> GPT:
    """Build litgpt's model with the weights (and the adapter) of a transformers model, embeddings tied as there."""
    import torch

    state = dict(source.state_dict())
    if workload.method == "lora":
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

        everywhere = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
        model = GPT(
            Config.from_name(NAME, lora_r=workload.rank, lora_alpha=2 * workload.rank, lora_dropout=0.0, **everywhere)
        )
    else:
        from litgpt import GPT, Config

        model = GPT(Config.from_name(NAME))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.cat([state[part] for part in sources(name, workload.method == "lora")]))
    if workload.method == "lora":
        mark_only_lora_as_trainable(model)
    else:
        model.lm_head.weight = model.transformer.wte.weight
    return model


NORMS = {"norm_1.weight": "input_layernorm.weight", "norm_2.weight": "post_attention_layernorm.weight"}


def sources(name: str, with_adapter: bool) -> list[str]:
    """Names of the transformers (or peft) tensors that make up one tensor of litgpt."""
    outer = "base_model.model." if with_adapter else ""
    if name.startswith(("lm_head", "transformer.wte")):
        return [f"{outer}model.embed_tokens.weight"]
    if name == "transformer.ln_f.weight":
        return [f"{outer}model.norm.weight"]
    _, _, block, rest = name.split(".", 3)
    inside = f"{outer}model.layers.{block}."
    if rest in NORMS:
        return [inside + NORMS[rest]]
    if rest.startswith("attn.qkv"):
        layers = [f"self_attn.{layer}" for layer in JOINED]
    else:
        layers = [layer for layer, name_there in LAYERS.items() if rest.startswith(f"{name_there}.")]
    for matrix in ("lora_A", "lora_B"):
        if rest.endswith(matrix):
            return [f"{inside}{layer}.{matrix}.default.weight" for layer in layers]
    return [f"{inside}{layer}.{'base_layer.' if with_adapter else ''}weight" for layer in layers]
