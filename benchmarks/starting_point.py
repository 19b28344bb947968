"""The model, adapter and rows that every contestant starts from, and what a contestant returns."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from workloads import SCRATCH_VOCABULARY, SHAPES, Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from example_list import ExampleList
    from llmtune.config.schema import AdapterConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for `example_list`

Rows = list[tuple[np.ndarray, np.ndarray]]
"""Token ids, int32 [T], and loss weights, float32 [T], of each row."""


class Step(NamedTuple):
    """One step of a contestant."""

    seconds: float
    loss: float
    tokens: int | None = None
    """Real tokens, where the contestant counts them."""


"""Seconds and mean loss (nats per trained token) of one step."""


@dataclass(frozen=True)
class Training:
    """A contestant that is ready for its first step."""

    config: PretrainedConfig
    """Of the model."""
    steps: Iterator[Step]
    decisions: tuple[str, ...] = ()
    """What llmtune chose, with its reasons."""


def load_model(workload: Workload, device: str, base_dtype: str = "auto") -> PreTrainedModel:
    """Load the workload's model, with its adapter attached, exactly as a run would.

    Every contestant starts from these weights.
    """
    import torch
    import transformers

    from llmtune.adapters import attach as adapters
    from llmtune.config.schema import ArchitectureConfig, ModelConfig
    from llmtune.models import load, scratch
    from llmtune.models.catalog import resolve
    from llmtune.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    if workload.shape is not None:
        model = random_model(workload, device)
    elif workload.method == "scratch":
        vocabulary = {str(number): number for number in range(SCRATCH_VOCABULARY)}
        tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, pad_token_id=0, eos_token_id=1, bos_token_id=None)
        model = scratch.build_model(scratch.build_config(workload.model, ArchitectureConfig(), tokenizer), seed=0)
    else:
        quantization = "4bit" if workload.method == "qlora" else "none"
        model_config = ModelConfig(name=workload.model, quantization=quantization, dtype=base_dtype)  # type: ignore[arg-type]
        source = resolve(workload.model, offline=True)
        tokenizer = load_tokenizer(source, model_config).tokenizer
        model = load.load_model(
            source,
            model_config,
            tokenizer=tokenizer,
            device=torch.device(device),
            trained="adapter" if workload.has_adapter else "full",
            precision="bf16",
            seed=0,
        ).model
    model.config.use_cache = False
    if workload.has_adapter:
        model, _ = adapters.attach_adapter(model, adapter_of(workload), seed=0)
    assert isinstance(model, torch.nn.Module)
    transformers.set_seed(0)
    return model.to(device)


def adapter_of(workload: Workload) -> AdapterConfig:
    """The adapter as a config of llmtune names it."""
    from llmtune.config.schema import AdapterConfig

    if not workload.has_adapter:
        return AdapterConfig()
    return AdapterConfig(method="lora", r=workload.rank, alpha=2.0 * workload.rank)


def random_model(workload: Workload, device: str) -> PreTrainedModel:
    """Build a model of a published shape with random weights: float32 where all are trained, else bf16 or NF4."""
    import torch
    import transformers

    assert workload.shape is not None
    config = transformers.LlamaConfig(**SHAPES[workload.shape], max_position_embeddings=131072, rope_theta=500000.0)
    with torch.device(device):
        torch.set_default_dtype(torch.float32 if workload.method == "full" else torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    if workload.method == "qlora":
        _quantize(model, device)
    return model


def _quantize(model: PreTrainedModel, device: str) -> None:
    """Replace every linear layer but the head by its NF4 form, layer by layer: all in float would not fit beside it."""
    import torch

    from llmtune.models.quantization import import_bitsandbytes

    layers = import_bitsandbytes().nn
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                quantized = layers.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                weight = child.weight.data.cpu()
                quantized.weight = layers.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                setattr(parent, name, quantized.to(device))


def zero_first(weights: np.ndarray) -> np.ndarray:
    """The same loss weights with 0 on the first token, which nothing predicts."""
    return np.concatenate([np.zeros(1, dtype=np.float32), weights[1:]])


def example_list(rows: Rows) -> ExampleList:
    """The rows as llmtune's examples."""
    from example_list import ExampleList
    from llmtune.data.example import Example

    return ExampleList([Example(str(number), ids, zero_first(weights)) for number, (ids, weights) in enumerate(rows)])
