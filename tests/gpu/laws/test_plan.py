"""The memory that a plan counts is what the tensors of a training hold on the device, for models of any size."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from pretend import numbers
from torch import nn
from workloads import SHAPES as WORKLOADS

from llmtune.adapters.attach import attach_adapter
from llmtune.config.schema import AdapterConfig, Config, ModelConfig, TrainingConfig
from llmtune.data.dataset.packing import plan_packs
from llmtune.kernels.weight_offload import is_offloaded, offload_weights
from llmtune.models.parameters import base_model_of
from llmtune.models.quantization import import_bitsandbytes
from llmtune.plan import activation_trace, memory
from llmtune.plan.activation_trace import TRACED_BLOCKS, Gradients, MicroBatchShape, Peaks, extrapolate, trace
from llmtune.plan.memory import MemoryPlan, division_of, plan_memory
from llmtune.plan.meta_model import count_sizes

LORA = AdapterConfig(method="lora", r=16, alpha=32.0)
SHAPES = WORKLOADS | {"small": WORKLOADS["tiny"] | {"num_hidden_layers": 4}}


def build(shape: str, blocks: int | None = None, *, full: bool = False) -> Any:
    """A bf16 model with a LoRA, or one in float32 that is trained in full, without weights."""
    config = transformers.LlamaConfig(**SHAPES[shape])
    config.num_hidden_layers = blocks or config.num_hidden_layers
    with torch.device("meta"):
        if full:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return attach_adapter(model, LORA, seed=0)[0]


def put_on_device(model: nn.Module) -> None:
    """Give a model without weights tensors of the device, which have a shape and no numbers."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_cuda:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
                tensors[name] = made[id(tensor)]


def quantize(model: nn.Module) -> None:
    """Give the adapter frozen layers of 4 bits, on the device."""
    bitsandbytes = import_bitsandbytes()
    kind = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    for module in model.modules():
        if (layer := getattr(module, "base_layer", None)) is None:
            continue
        made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta", **kind)
        weight = torch.empty(layer.weight.shape, dtype=torch.bfloat16, device="cuda")
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        made.weight = nn.Parameter(packed, requires_grad=False)  # bitsandbytes' own class cannot hold such a tensor
        made.weight.quant_state = made.quant_state = state
        module.base_layer = made
    base_model_of(model).is_quantized = True


class Case(NamedTuple):
    """A training."""

    shape: str
    documents: tuple[int, ...]
    """Tokens of the documents of a micro-batch, end to end."""
    micro_batches: int = 1
    """Of a step."""
    recompute: bool = False
    bits: int = 16
    """Of a frozen weight."""
    masters: bool = False
    """Full tuning in bf16 beside float32 masters."""
    offload_weights: bool = False
    """Frozen weights of blocks wait on the host."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of all documents of two steps."""
        return self.documents * 2 * self.micro_batches


def plan_of(case: Case, batch: MicroBatchShape) -> MemoryPlan:
    """The plan of that micro-batch, as the forecast of a run makes it."""
    quantization = "4bit" if case.bits == 4 else "none"
    config = Config(
        model=ModelConfig(
            gradient_checkpointing=case.recompute, quantization=quantization, offload_weights=case.offload_weights
        ),
        adapter=AdapterConfig() if case.masters else LORA,
        training=TrainingConfig(precision="bf16", master_weights=case.masters),
    )
    gradients: Gradients = "summed" if case.micro_batches > 1 else "single"

    def peaks(blocks: int) -> Peaks:
        model = build(case.shape, blocks, full=case.masters)
        options = {"checkpointing": case.recompute, "gradients": gradients, "masters": case.masters}
        options["is_quantized"] = case.bits == 4
        return trace(model, batch, device_type="cuda", compute=torch.bfloat16, **options)

    blocks = SHAPES[case.shape]["num_hidden_layers"]
    return plan_memory(
        count_sizes(build(case.shape, full=case.masters), config),
        extrapolate(peaks(TRACED_BLOCKS), peaks(TRACED_BLOCKS + 1), blocks),
        batch,
        kind="cuda",
        optimizer="adamw",
        gradients=gradients,
        thread_caches=False,
        process_bytes=0,
        file_bytes=0,
        division=division_of(config, 1),
    )


@pytest.fixture
def counted(train_model):
    """Train two steps; returns the bytes of the weights, and the most that was held beside them."""

    def count(case: Case) -> tuple[int, int]:
        with numbers.machine("h200", has_numbers=False) as device:
            model = build(case.shape, full=case.masters)
            if case.bits == 4:
                quantize(model)
            if case.offload_weights:
                blocks = base_model_of(model.to_empty(device="cpu")).model.layers
                offload_weights(model, torch.device("cuda", 0))
            put_on_device(model)
            weights = device.now // 2 if case.masters else device.now  # the model's own are rounded later
            if case.offload_weights:  # and those of two blocks, in a step
                weights += 2 * sum(one.nbytes for one in blocks[0].parameters() if is_offloaded(one))
            options: dict[str, Any] = {"adapter": AdapterConfig() if case.masters else LORA, "masters": case.masters}
            options |= {"lengths": case.lengths, "pack": sum(case.documents), "accumulation": case.micro_batches}
            trained = train_model(model, torch.device("cuda", 0), recompute=case.recompute, **options)
        assert trained.decided["model.attention"] == "varlen"
        return weights, trained.peak_bytes - weights

    return count


@pytest.fixture
def planned(make_examples):
    """Plan the same; returns the same two."""

    def plan(case: Case) -> tuple[int, int]:
        tokens = [round(float(example.weights.sum())) for example in make_examples(case.lengths)]
        packs = plan_packs(np.array(case.lengths), sum(case.documents), "best_fit", None)
        trained = max(sum(tokens[number] for number in pack) for pack in packs)
        found = plan_of(case, MicroBatchShape(case.documents, trained, "flat"))
        weights = found.parts["weights"] + found.parts["adapter"]
        return weights, found.peak_bytes - weights - found.parts["process"] - found.parts["allocator"]

    return plan


def hold(counted: tuple[int, int], planned: tuple[int, int]) -> bool:
    """Whether both are within 1 %."""
    return counted == pytest.approx(planned, rel=0.01)


def test_a_plan_is_what_the_tensors_of_a_training_hold(counted, planned, monkeypatch):
    case = Case("small", (200, 700, 124), micro_batches=2, recompute=True)
    found = counted(case)
    assert hold(found, planned(case)), (found, planned(case))
    # The tester is tested: an optimizer with one moment of two.
    monkeypatch.setitem(memory.OPTIMIZER_BYTES, "adamw", lambda _entries, entry_bytes: entry_bytes)
    assert not hold(found, planned(case))


def test_it_is_with_float32_masters(counted, planned, monkeypatch):
    case = Case("small", (200, 700, 124), micro_batches=2, masters=True)
    found = counted(case)
    assert hold(found, planned(case)), (found, planned(case))
    monkeypatch.setattr(f"{__name__}.division_of", lambda _config, _processes: memory.Division())
    assert not hold(found, planned(case)), "masters are part of it"


def test_it_is_with_weights_of_4_bits(counted, planned, monkeypatch):
    """They are made in full for each product, beside its result, and not at any other moment."""
    wide = SHAPES["small"] | {"vocab_size": 600, "intermediate_size": 8192}
    monkeypatch.setitem(SHAPES, "wide", wide)
    case = Case("wide", (20, 70, 12), micro_batches=2, recompute=True, bits=4)
    found = counted(case)
    assert hold(found, planned(case)), (found, planned(case))
    monkeypatch.setattr(activation_trace, "quantized_weights", lambda _model: {})
    assert not hold(found, planned(case)), "the largest of them is part of it"


def test_it_is_with_weights_that_wait_on_the_host(counted, planned):
    case = Case("small", (200, 700, 124), recompute=True, offload_weights=True)
    found = counted(case)
    assert hold(found, planned(case)), (found, planned(case))
    assert not hold(found, planned(case._replace(offload_weights=False)))


ONE, FOUR = (4096,), (1024,) * 4


@pytest.mark.campaign
@pytest.mark.parametrize(
    "case",
    [
        Case("llama-3-8b", FOUR),
        Case("llama-3-8b", ONE, micro_batches=2, recompute=True),
        Case("llama-3-8b", FOUR, bits=4),
        Case("llama-3-8b", FOUR, micro_batches=2, recompute=True, bits=4),
        Case("llama-3.2-1b", ONE, micro_batches=2),
        Case("llama-3.2-1b", FOUR, recompute=True),
        Case("llama-3.2-1b", FOUR, recompute=True, bits=4),
        Case("llama-3.2-1b", FOUR, masters=True),
    ],
    ids=lambda case: f"{case.shape}-{len(case.documents)}-{case.bits}-{case.recompute}",
)
def test_it_is_for_the_published_shapes(counted, planned, case):
    found, expected = counted(case), planned(case)
    assert hold(found, expected), (found, expected)
