"""The operations of a model as TensorBoard draws them."""

from __future__ import annotations

import copy
import warnings
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmtune.errors import ModelError, in_one_line

__all__ = ["model_graph"]

BLOCKS, TOKENS = 2, 8


class _Logits(nn.Module):
    """A model with a tensor in and a tensor out, as the tracer needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (1, tokens) become logits (1, tokens, vocabulary)."""
        return cast("Tensor", self.model(input_ids=input_ids, use_cache=False).logits)


def model_graph(config: PretrainedConfig) -> bytes:
    """Return a serialized GraphDef of a model of this shape with two of its blocks, traced on a few tokens.

    A model of its own is traced, on the CPU: the one that is trained is not touched, nor are its random numbers. Raises
    ModelError for a model that cannot be traced.
    """
    try:
        return _traced(config)
    except Exception as error:
        problem = f"the model's operations cannot be traced: {in_one_line(error)}"
        raise ModelError(problem, where="tracking.graph", fix="leave it out") from error


def _traced(config: PretrainedConfig) -> bytes:
    from torch.utils.tensorboard._pytorch_graph import graph

    small = copy.deepcopy(config)
    small.num_hidden_layers = min(BLOCKS, small.num_hidden_layers)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    with torch.random.fork_rng(), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about itself and about branches of the model
        model = AutoModelForCausalLM.from_config(small).eval()
        drawn, _ = graph(_Logits(model), (torch.zeros(1, TOKENS, dtype=torch.long),), use_strict_trace=False)
    return cast("bytes", drawn.SerializeToString())
