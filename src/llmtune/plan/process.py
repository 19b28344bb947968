"""What this process itself holds before a model is in it: measured, at plan time."""

from __future__ import annotations

import torch
from torch import nn

from llmtune.plan.devices import resident_bytes
from llmtune.training.memory import release_free_memory

__all__ = ["process_bytes"]

WIDTH = 256


def process_bytes(compute: torch.dtype | None) -> int:
    """Bytes resident once the libraries' own code, threads and buffers are in memory; makes one tiny step to bring them in.

    compute: autocast's type, None for float32 arithmetic. Draws no random numbers.
    """
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    with torch.autocast("cpu", dtype=compute or torch.bfloat16, enabled=compute is not None):
        output = layers(torch.ones(WIDTH, WIDTH))
        scores = torch.softmax(torch.bmm(output[None], output[None].transpose(1, 2)), dim=-1, dtype=torch.float32)
    scores.square().mean().backward()
    nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
    optimizer.step()
    release_free_memory()
    return resident_bytes()
