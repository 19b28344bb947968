"""One bench for every law of training: tiny models, ragged examples, runs of the real loop, and broken copies of our
modules.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from example_list import ExampleList
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.packing import plan_packs
from llmtune.data.example import Example
from llmtune.engine import loop
from llmtune.engine.devices import Devices
from llmtune.engine.objective import next_token_objective, plain_nll_sum
from llmtune.engine.optim import build_optimizer
from llmtune.engine.precision import Precision
from llmtune.engine.schedule import learning_rate_at
from llmtune.engine.state import Snapshot, TrainingState, capture, restore
from llmtune.engine.update import StepAfterBackward, StepInBackward

CPU = torch.device("cpu")
VOCABULARY = 64


def make_model(*, seed=0, lora=False, **changes):
    """A random Llama of 2 layers x 32, or LoRA adapters (r 4, both matrices random) on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    if lora:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name it is about to drop
            import peft

            model = peft.get_peft_model(
                model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
            )
    return model.train()


def make_examples(count=37, *, seed=0, shortest=2, longest=40, empty_every=None):
    """Ragged examples with fractional weights; every `empty_every`-th has no trained token."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(rng.integers(shortest, longest + 1))
        weights = rng.choice(np.array([0, 0.25, 1, 1], dtype=np.float32), length)
        weights[0] = 0
        weights[-1] = 1
        if empty_every and index % empty_every == 0:
            weights[:] = 0
        examples.append(
            Example(f"rows.jsonl:{index + 1}", rng.integers(0, VOCABULARY, length).astype(np.int32), weights)
        )
    return ExampleList(examples)


def make_plan(
    examples, *, packing="none", batch_size=4, accumulation=2, epochs=1, max_steps=None, shuffle_seed=1, **more
):
    packs = plan_packs(examples.lengths, 64, packing, shuffle_seed)
    return BatchPlan(
        examples,
        packs,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        max_steps=max_steps,
        shuffle_seed=shuffle_seed,
        **more,
    )


class Recorder:
    """An optimizer that moves nothing and keeps the gradients it is given, one dict a step."""

    def __init__(self, named):
        self.named = named
        self.param_groups = [{"params": list(named.values()), "lr": 0.0}]
        self.steps = []

    def step(self):
        """Keep the gradients."""
        self.steps.append({name: p.grad.clone() for name, p in self.named.items() if p.grad is not None})

    def zero_grad(self, set_to_none=True):
        """Drop the gradients."""
        for parameter in self.named.values():
            parameter.grad = None


@dataclass
class Training:
    """A model in training, as a pipeline would hold it."""

    model: Any
    plan: BatchPlan
    optimizer_name: str = "adamw"
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    precision_name: str = "fp32"
    schedule: str = "linear"
    warmup_steps: int = 1
    max_grad_norm: float | None = 1.0
    step_in_backward: bool = False
    max_skipped_steps: int = 3
    nll_sum: Any = None
    mfu: Any = None
    train_steps: Any = loop.train_steps
    optimizer: Any = None
    devices: Devices = field(default_factory=lambda: Devices(CPU))
    state: TrainingState = field(default_factory=TrainingState)

    def __post_init__(self):
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.precision = Precision(self.precision_name, CPU)
        self.rate = learning_rate_at(
            self.schedule, peak=self.learning_rate, total_steps=self.plan.total_steps, warmup_steps=self.warmup_steps
        )
        if self.optimizer is None:
            from llmtune.engine.optim import matrices_of_blocks

            self.optimizer, _ = build_optimizer(
                self.optimizer_name,
                self.parameters,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                betas=(0.9, 0.999),
                eps=1e-8,
                device=CPU,
                orthogonal=matrices_of_blocks(self.model, self.parameters),
            )
        if self.nll_sum is None:
            self.nll_sum = lambda batch: plain_nll_sum(self.model, batch)

    def steps(self, windows=None):
        """The real loop, from where the state stands."""
        return self.train_steps(
            objective=next_token_objective(self.nll_sum),
            update=self.update(),
            windows=self.plan.windows(self.state.windows) if windows is None else windows,
            learning_rate=self.rate,
            precision=self.precision,
            state=self.state,
            devices=self.devices,
            max_skipped_steps=self.max_skipped_steps,
            mfu=self.mfu,
        )

    def update(self):
        """As a pipeline would choose it."""
        parameters = list(self.parameters.values())
        if self.step_in_backward:
            assert self.max_grad_norm is None
            return StepInBackward(parameters, self.optimizer)
        return StepAfterBackward(
            parameters, self.optimizer, self.precision, self.devices.sync_gradients, max_grad_norm=self.max_grad_norm
        )

    def run(self):
        """All steps."""
        return list(self.steps())

    def weights(self):
        """A copy of the trained weights."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def capture(self) -> Snapshot:
        return capture(parameters=self.parameters, optimizer=self.optimizer, precision=self.precision, state=self.state)

    def restore(self, snapshot, weights):
        """Weights as a checkpoint would give them, and the rest."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        restore(
            snapshot, parameters=self.parameters, optimizer=self.optimizer, precision=self.precision, state=self.state
        )


def same_bits(ours, theirs):
    """Whether two dicts of tensors hold the same bytes under the same names."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and ours[name].numpy().tobytes() == theirs[name].numpy().tobytes()
        for name in ours
    )


def relative_difference(ours, theirs):
    """Norm of the difference of two dicts of tensors over the norm of the second."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return (difference / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5


class Bench:
    """What the tests of this folder build with."""

    model = staticmethod(make_model)
    examples = staticmethod(make_examples)
    plan = staticmethod(make_plan)
    training = Training
    recorder = Recorder
    same_bits = staticmethod(same_bits)
    relative_difference = staticmethod(relative_difference)


@pytest.fixture(scope="session")
def bench():
    return Bench()


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums of floats depend on the number of threads; the tests use one, also where torch was loaded before them."""
    torch.set_num_threads(1)
