"""Short trainings on the pretend GPU and on the CPU, by the package's own engine and loop."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pretend import numbers

from example_list import ExampleList
from llmtune.adapters.attach import attach_adapter
from llmtune.config.schema import AdapterConfig, Config, ModelConfig, TrainingConfig
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.packing import plan_packs
from llmtune.data.example import Example
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine, build_engine
from llmtune.engine.loop import train_steps
from llmtune.engine.masters import MasterOptimizer, make_masters
from llmtune.engine.neftune import Neftune
from llmtune.engine.objective import next_token_objective
from llmtune.engine.optim import build_optimizer, matrices_of_blocks
from llmtune.engine.precision import Precision
from llmtune.engine.state import TrainingState
from llmtune.engine.update import StepAfterBackward, StepInBackward
from llmtune.kernels import weight_offload
from llmtune.models.parameters import freeze_all_but, trained_parameters

VOCABULARY, LENGTHS = 301, (37, 90, 12, 64, 130, 25, 41, 8)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "deep": lambda: transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 4}),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=16, sliding_window=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
}


@dataclass
class Trained:
    """What a short training showed."""

    engine: Engine
    losses: list[float]
    norms: list[float]
    weights: list[torch.Tensor]
    """The trained ones afterwards, on the host."""
    waits: Counter[str]
    """Waits of the host in the steps, by place."""
    pageable: Counter[str]
    peak_bytes: int = 0
    """The most that tensors held on the device in the steps."""

    @property
    def decided(self) -> dict[str, Any]:
        return {decision.key: decision.value for decision in self.engine.decisions}

    @property
    def reasons(self) -> dict[str, str]:
        return {decision.key: decision.reason for decision in self.engine.decisions}


def examples(lengths: tuple[int, ...] = LENGTHS) -> ExampleList:
    random = np.random.default_rng(0)
    made = []
    for number, length in enumerate(lengths):
        weights = (random.random(length) < 0.8).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        made.append(Example(f"row:{number}", random.integers(3, VOCABULARY, length).astype(np.int32), weights))
    return ExampleList(made)


def train(
    device: torch.device,
    family: str = "llama",
    *,
    precision: str = "bf16",
    lora: bool = True,
    dropout: float = 0.0,
    offload_weights: bool = False,
    train_only: Sequence[str] = (),
    **options: Any,
) -> Trained:
    """Train a small random model on `device`, two micro-batches a step; with no steps its engine is built only."""
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision if lora else "fp32"]
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype)
    adapter = AdapterConfig(method="lora", r=4, alpha=8.0, dropout=dropout) if lora else AdapterConfig()
    if train_only:
        freeze_all_but(model, train_only)
    if lora:
        model, _ = attach_adapter(model, adapter, seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    if offload_weights:
        weight_offload.offload_weights(model, device)
    else:
        model = model.to(device)
    return train_model(model, device, adapter=adapter, precision=precision, **options)


def train_model(
    model: torch.nn.Module,
    device: torch.device,
    *,
    adapter: AdapterConfig,
    precision: str = "bf16",
    recompute: bool | str = False,
    attention: str = "auto",
    engine: str = "auto",
    optimizer: str = "adamw",
    in_backward: bool = False,
    masters: bool = False,
    neftune_alpha: float | None = None,
    steps: int = 2,
    lengths: tuple[int, ...] = LENGTHS,
    pack: int = 150,
    accumulation: int = 2,
) -> Trained:
    """Train a model that is on the device already, on packs of documents of these lengths."""
    rounded = make_masters(model) if masters else {}
    arithmetic = Precision(precision, device)
    config = Config(
        model=ModelConfig(gradient_checkpointing=recompute, attention=attention),
        adapter=adapter,
        training=TrainingConfig(engine=engine),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = build_engine(model, config=config, device=device, precision=arithmetic)
    if steps == 0:
        return Trained(built, [], [], [], Counter(), Counter())
    model.train()
    parameters = rounded or trained_parameters(model)
    orthogonal = matrices_of_blocks(model, trained_parameters(model))
    rule = {"learning_rate": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "device": device}
    made, _ = build_optimizer(optimizer, parameters, orthogonal=orthogonal, **rule)
    if masters:
        made = MasterOptimizer(made, model, parameters)
    weights, devices = list(parameters.values()), Devices(device)
    update = (
        StepInBackward(weights, made)
        if in_backward
        else StepAfterBackward(weights, made, arithmetic, devices.sync_gradients, max_grad_norm=1.0)
    )
    packs = plan_packs(np.array(lengths), pack, "best_fit", None)
    plan = BatchPlan(
        examples(lengths),
        packs,
        batch_size=1,
        accumulation=1 if in_backward else accumulation,
        epochs=1,
        max_steps=steps,
        shuffle_seed=None,
        layout=built.layout,
    )
    nll_sum = built.nll_sum
    if neftune_alpha is not None:
        nll_sum = Neftune(nll_sum, model.get_input_embeddings(), neftune_alpha)
    numbers.DEVICE.waits.clear()
    numbers.DEVICE.pageable.clear()
    numbers.DEVICE.peak = numbers.DEVICE.now  # the steps' own, without the probe's
    results = list(
        train_steps(
            objective=next_token_objective(nll_sum),
            update=update,
            windows=plan.windows(),
            learning_rate=lambda _step: 1e-3,
            precision=arithmetic,
            state=TrainingState(),
            devices=devices,
            max_skipped_steps=0,
        )
    )
    waits, pageable, peak = Counter(numbers.DEVICE.waits), Counter(numbers.DEVICE.pageable), numbers.DEVICE.peak
    assert len(results) == steps
    return Trained(
        built,
        [result.mean_loss for result in results],
        [result.grad_norm for result in results],
        [weight.detach().cpu() for weight in weights],
        waits,
        pageable,
        peak,
    )


def on(card: str = "rtx4090", family: str = "llama", *, pinned_limit: int = 2**63, **options: Any) -> Trained:
    """Train on a pretended card, or on the CPU where that is named."""
    if card == "cpu":
        return train(torch.device("cpu"), family, **options)
    with numbers.machine(card, pinned_limit):
        return train(torch.device("cuda", 0), family, **options)


@pytest.fixture(name="train_model")
def model_trainer() -> Callable[..., Trained]:
    """Train a model that the test has put on the device."""
    return train_model


@pytest.fixture
def make_examples() -> Callable[..., ExampleList]:
    """The rows that `train_model` trains on."""
    return examples


@pytest.fixture
def train_on() -> Callable[..., Trained]:
    """Train as the test has set things up."""
    return on


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, Trained]:
    """Trainings with which others are compared."""
    deep = on(family="deep", recompute=True)
    return {"gpu": on(), "cpu": on("cpu"), "recomputed": on(recompute=True), "deep": deep}
