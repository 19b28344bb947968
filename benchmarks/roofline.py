"""Tokens a second of a GPU at best, counted and not measured: `python benchmarks/roofline.py [--card h100] [...]`.

The engine itself runs one micro-batch, forward and backward, on tensors that have a shape and no values. Each operation
takes the longest of its arithmetic at the card's rate of products, its bytes at the card's bandwidth, and 2 us. Nothing
waits for the host, so a real card reaches less: most where models are small. The count needs no GPU.

With full tuning one update is added, AdamW's of all weights: a step is this one micro-batch. `--method full` holds the
weights in float32, `--method masters` in bf16 beside float32 masters (`training.master_weights`). An adapter's update,
1 GB, is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from workloads import SHAPES

from llmtune.adapters.attach import attach_adapter
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.engine.allocator import grow_segments
from llmtune.engine.choose_device import CUDA_CONTEXT_BYTES
from llmtune.engine.masters import make_masters
from llmtune.kernels.chunks import every_chunk
from llmtune.kernels.liger import LIGER
from llmtune.kernels.lora import FROZEN_WEIGHTS
from llmtune.models.quantization import import_bitsandbytes
from llmtune.plan import activation_trace
from llmtune.plan.activation_trace import TRACED_BLOCKS, MicroBatchShape, Peaks, extrapolate
from llmtune.plan.memory import plan_memory
from llmtune.plan.meta_model import count_sizes

aten = torch.ops.aten
import_bitsandbytes()  # its operators

LORA = AdapterConfig(method="lora", r=16, alpha=32.0)

CARDS = {
    "t4": (65e12 * 0.6, 320e9 * 0.8),
    "rtx3090": (71e12 * 0.9, 936e9 * 0.85),
    "rtx4090": (165e12 * 0.9, 1008e9 * 0.88),
    "a100-80": (312e12 * 0.85, 2039e9 * 0.85),
    "h100": (700e12, 3350e9 * 0.85),
    "h200": (790e12, 4800e9 * 0.85),
}
"""Operations a second of large bf16 products and bytes a second of memory: parts of the data sheets' that good kernels
reach. """

LEAST_S = 2e-6
"""Seconds of the smallest kernel."""

ATTENTION = {"_varlen_attn": (2, 0.55), "_varlen_attn_backward": (5, 0.45)}
"""Products of flash attention's two passes, and the part of the rate of products that they reach."""

FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "set_", "_unsafe_view", "_reshape_alias")

WRITES_ONLY = ("zero", "fill", "full", "ones", "new_zeros", "new_full", "new_ones", "uniform", "normal")

GATHERS = ("embedding", "gather", "index", "index_select")

PASSES = {"cross_entropy_": 2}
"""Times that an operation of several passes reads its inputs: no cache holds a chunk of logits."""


UPDATE_BYTES = {"lora": 0, "qlora": 0, "full": 28, "masters": 34}
"""Bytes that an update moves for each trained weight: weight, gradient and two moments are read, all but the gradient
written (AdamW, float32); a master is then read and its bf16 weight written.
"""


@dataclass
class Count:
    """Seconds, bytes and operations, of products, attention and everything else."""

    product_s: float = 0.0
    attention_s: float = 0.0
    other_s: float = 0.0
    other_bytes: float = 0.0
    operations: float = 0.0

    def line(self, larger: Count, blocks: int) -> Count:
        """The count of a model of so many blocks, from those of TRACED_BLOCKS (this one) and of one more."""
        more = blocks - TRACED_BLOCKS
        return Count(**{name: one + more * (getattr(larger, name) - one) for name, one in vars(self).items()})

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        return self.product_s + self.attention_s + self.other_s


class Meter(TorchDispatchMode):
    """Counts every operation that runs under it."""

    def __init__(self, card: str, lengths: Sequence[int]) -> None:
        super().__init__()
        self.matmul, self.bandwidth = CARDS[card]
        self.lengths = lengths
        self.count = Count()
        self.is_counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_counting:
            self._add(func, args, kwargs or {}, result)
        return result

    def masters_of(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """Make the masters of a model, which no step does: not counted."""
        self.is_counting = False
        made = make_masters(model)
        self.is_counting = True
        return made

    def update(self, num_bytes: float) -> None:
        """Count an update that moves so many bytes."""
        self.count.other_s += num_bytes / self.bandwidth
        self.count.other_bytes += num_bytes

    def _add(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = func._schema.name.split("::")[1]
        if name.startswith(FREE) or _is_view(func):
            return
        moved = _moved(name, func, args, kwargs, result)
        if not moved:
            return
        if name in ATTENTION:
            products, share = ATTENTION[name]
            query = args[0] if name == "_varlen_attn" else args[1]
            scores = sum(length * length / 2 for length in self.lengths)
            work = products * 2 * query.shape[1] * query.shape[2] * scores
            self.count.attention_s += max(work / (share * self.matmul), moved / self.bandwidth)
        elif work := _work(func, args, kwargs, result):
            self.count.product_s += max(work / self.matmul, moved / self.bandwidth, LEAST_S)
        else:
            self.count.other_s += max(moved / self.bandwidth, LEAST_S)
            self.count.other_bytes += moved
        self.count.operations += 1


def _moved(name: str, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> float:
    """Bytes that an operation reads and writes."""
    read = sum(map(_bytes, _tensors((args, kwargs))))
    in_place = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    outputs = {id(one): one for one in _tensors((result, in_place))}  # most operations in place return what they wrote
    written = sum(map(_bytes, outputs.values()))
    if not written:  # a question about a tensor
        return 0.0
    if name.startswith(WRITES_ONLY):
        return written
    if name == "copy_":
        return _bytes(args[0]) + _bytes(args[1])
    if name in GATHERS:  # a few entries of the first tensor
        return 2 * written + sum(map(_bytes, _tensors(args[1:])))
    if name == "scatter_add_":
        return _bytes(args[2]) + 3 * _bytes(args[3])
    return PASSES.get(name, 1) * read + written


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_view(func: Any) -> bool:
    """Whether an operation only describes the memory of its input anew."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def _bytes(tensor: torch.Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes()) if 0 in tensor.stride() else size


def _work(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> float:
    packet = aten.addmm if func is aten.addmm_.default else func._overloadpacket
    if packet not in flop_registry:
        return 0.0
    options = {key: value for key, value in kwargs.items() if key not in ("beta", "alpha")}
    return float(flop_registry[packet](*args, **options, out_val=result))


def build(shape: str, blocks: int, method: str = "lora") -> Any:
    """A model without values: in bf16 with a LoRA of rank 16 on all linear layers, or in float32, all of it trained.

    A model of 4 bits is built of 16: what it holds and how it is read is seen to by `planned_bytes` and `_dequantized`.
    """
    config = transformers.LlamaConfig(**{**SHAPES[shape], "num_hidden_layers": blocks})
    with torch.device("meta"):
        if method not in ("lora", "qlora"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return attach_adapter(model, LORA, seed=0)[0]


def _dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """The weight [N, K] of a layer, made of its 4 bits for each product."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    packed = weight.new_empty(weight.numel() // 2, 1, dtype=torch.uint8)
    scales = weight.new_empty(weight.numel() // 64, dtype=torch.float32)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, 64, "nf4", weight.shape, weight.dtype)


def planned_bytes(
    shape: str,
    lengths: Sequence[int],
    libraries: Collection[str],
    *,
    method: str = "lora",
    recompute: bool = False,
    trained: float = 0.8,
) -> int:
    """Bytes that torch holds at most by the plan of an adapter's step, one micro-batch; the driver's come on top."""
    batch = MicroBatchShape(tuple(lengths), round(trained * sum(lengths)), "flat")
    config = Config(model=ModelConfig(quantization="4bit" if method == "qlora" else "none"), adapter=LORA)

    def peaks(blocks: int) -> Peaks:
        options = {"compute": torch.bfloat16, "attention": "varlen", "libraries": libraries}
        options["is_quantized"] = method == "qlora"
        model = build(shape, blocks, method)
        return activation_trace.trace(
            model, batch, device_type="cuda", checkpointing=recompute, gradients="single", **options
        )

    layers = int(SHAPES[shape]["num_hidden_layers"])
    plan = plan_memory(
        count_sizes(build(shape, layers, method), config),
        extrapolate(peaks(TRACED_BLOCKS), peaks(TRACED_BLOCKS + 1), layers),
        batch,
        kind="cuda",
        optimizer="adamw",
        gradients="single",
        thread_caches=False,
        process_bytes=0,
        file_bytes=0,
    )
    return plan.peak_bytes - plan.parts["process"]


def count(
    card: str,
    shape: str,
    lengths: Sequence[int],
    libraries: Collection[str],
    *,
    method: str = "lora",
    recompute: bool = False,
    trained: float = 0.8,
) -> Count:
    """Count one micro-batch of these documents, `trained` of whose tokens carry loss, by the kernels of libraries."""
    batch = MicroBatchShape(tuple(lengths), round(trained * sum(lengths)), "flat")

    def of_blocks(blocks: int) -> Count:
        model = build(shape, blocks, method)  # not under the meter: no step makes weights
        entries = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        with (
            mock.patch.object(activation_trace, "representative_chunks", every_chunk),
            mock.patch.dict(FROZEN_WEIGHTS, {"Linear": _dequantized} if method == "qlora" else {}),
            Meter(card, lengths) as meter,
            mock.patch.object(activation_trace, "make_masters", meter.masters_of),
        ):
            activation_trace.trace(
                model,
                batch,
                device_type="cuda",
                compute=torch.bfloat16,
                checkpointing=recompute,
                gradients="single",
                attention="varlen",
                libraries=libraries,
                masters=method == "masters",
            )
        meter.update(UPDATE_BYTES[method] * entries)
        return meter.count

    return of_blocks(TRACED_BLOCKS).line(of_blocks(TRACED_BLOCKS + 1), int(SHAPES[shape]["num_hidden_layers"]))


LIBRARIES: dict[str, tuple[str, ...]] = {"none": (), "torch": ("torch",), "torch, Liger": ("torch", LIGER)}
"""Rows of the table: the libraries whose kernels are called."""


def main() -> None:
    """Print a table, without and with the device's kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", nargs="+", choices=sorted(CARDS), default=["h100"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--method", choices=tuple(UPDATE_BYTES), default="lora")
    parser.add_argument("--documents", type=int, nargs="+", default=[1024] * 4, help="their tokens")
    parser.add_argument("--recompute", action="store_true", help="blocks are recomputed in the backward pass")
    options = parser.parse_args()
    tokens = sum(options.documents)
    print(f"{options.method} of {options.shape}, {len(options.documents)} documents, {tokens:,} tokens; ", end="")
    print("counted, not measured\n")
    rest = {"method": options.method, "recompute": options.recompute}
    if options.method in ("lora", "qlora"):
        grow_segments()  # as a training does
        cells = []
        for name, libraries in LIBRARIES.items():
            held = planned_bytes(options.shape, options.documents, libraries, **rest) + CUDA_CONTEXT_BYTES
            cells.append(f"{held / 1e9:.1f} GB ({name})")
        print(f"planned on the card, by kernels: {', '.join(cells)}\n")
    print("| card | kernels | products ms | attention ms | other ms | other GB | operations | tokens/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for card in options.card:
        for name, libraries in LIBRARIES.items():
            found = count(card, options.shape, options.documents, libraries, **rest)
            cells = [f"{1e3 * one:.1f}" for one in (found.product_s, found.attention_s, found.other_s)]
            cells += [f"{found.other_bytes / 1e9:.0f}", f"{found.operations:,.0f}", f"{tokens / found.seconds:,.0f}"]
            print(f"| {card} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
