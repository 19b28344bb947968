"""A model's shape without its weights: built on torch's `meta` device, counted exactly, and given stand-in tensors to
be traced with.

A stand-in knows shape and type and holds no numbers, so the skeleton of an 8B model costs a few megabytes.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtune.adapters import attach
from llmtune.common.dtypes import torch_dtype
from llmtune.config.process_options import Options
from llmtune.config.schema import Config, ModelConfig
from llmtune.errors import LlmtuneError, ModelError, in_one_line
from llmtune.kernels.lora import fuse_adapters, unfuse_adapters
from llmtune.kernels.patch_model import prepackable
from llmtune.kernels.weight_prepack import COPIES, DTYPE
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.load import refuse_foreign_quantization
from llmtune.models.quiet_libraries import quiet_libraries
from llmtune.models.read_config import read_config
from llmtune.models.scan import refuse_unsafe_folder, weight_files
from llmtune.models.scratch import build_config
from llmtune.prepare import Prepared

__all__ = ["Counted", "Shape", "base_of", "blocks_of", "build", "count", "give_stand_ins", "open_shape", "weight_dtype"]


@dataclass(frozen=True)
class Shape:
    """What a model looks like: its library config with the tokenizer's rows, and the bytes of its published weights."""

    config: Any
    """A transformers config; `num_hidden_layers` may be lowered in a copy."""
    file_bytes: int
    """Size of the weight files that loading reads; 0 from scratch and where they are not on this machine yet."""
    trust_remote_code: bool = False

    @property
    def blocks(self) -> int:
        """Decoder blocks."""
        return int(self.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class Counted:
    """Exact sizes of a model with its adapter."""

    parameters: int
    """All entries, tied ones once; a 4-bit weight counts its entries."""
    trained: int
    """Entries that training changes."""
    base_bytes: int
    """Bytes of the model's own weights (frozen, or trained in full) and buffers as held in memory."""
    adapter_bytes: int
    """Bytes of what an adapter adds."""
    gradient_bytes: int
    """Bytes of one gradient for each trained weight, in its type."""
    largest_gradient_bytes: int
    """Bytes of the largest of these."""
    largest_linear_bytes: int
    """Bytes of the largest quantized weight, unpacked in the type of the arithmetic; 0 when none is quantized."""
    prepacked_bytes: int = 0
    """Bytes of the layouts for a CPU's kernels, of all frozen weights that may have them (`model.weights_prepack`)."""


def open_shape(prepared: Prepared, options: Options) -> Shape:
    """Read the shape of the run's model; fetches a hub model's small files only.

    Raises what loading would raise about them.
    """
    config, source, tokenizer = prepared.config, prepared.source, prepared.tokenizer.tokenizer
    if source.kind == "scratch":
        return Shape(build_config(source.entry or source.name, config.model.architecture, tokenizer), 0)
    trust = options.trust_remote_code
    folder = local_folder(source, weights=False, code=trust)
    refuse_unsafe_folder(folder, trust_remote_code=trust, ignore_auto_map=may_ignore_auto_map(source))
    refuse_foreign_quantization(folder, "adapter" if config.adapter.method != "none" else "full")
    shape = read_config(folder, trust_remote_code=trust)
    text = shape.get_text_config()
    text.vocab_size = max(text.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    try:
        file_bytes = sum(file.stat().st_size for file in weight_files(folder))
    except LlmtuneError:
        file_bytes = 0  # a hub model that is not fetched yet
    return Shape(shape, file_bytes, trust)


def weight_dtype(model: ModelConfig, *, trained: bool, precision: str, scratch: bool) -> torch.dtype:
    """The type weights are held in: as asked, float32 for trained ones, else the type of the arithmetic (the rule of
    loading).
    """
    if model.dtype != "auto":
        return torch_dtype(model.dtype)
    if trained or scratch or precision == "fp32":
        return torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float16


def build(shape: Shape, config: Config, tokenizer: Any, *, dtype: torch.dtype, blocks: int | None = None) -> Any:
    """The model of that shape on the meta device, with the adapter of `config`.

    Only the first `blocks` blocks when given.

    Raises ModelError for a shape that no model can have, AdapterError for an adapter that does not fit it.
    """
    from transformers import AutoModelForCausalLM

    wanted = copy.deepcopy(shape.config)
    if blocks is not None:
        text = wanted.get_text_config()
        text.num_hidden_layers = blocks
        for key in ("layer_types", "mlp_layer_types"):
            if getattr(text, key, None):
                setattr(text, key, getattr(text, key)[:blocks])
    with quiet_libraries(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        try:
            model = AutoModelForCausalLM.from_config(wanted, dtype=dtype, trust_remote_code=shape.trust_remote_code)
        except (
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            ArithmeticError,
            RuntimeError,
            ImportError,
        ) as error:
            problem = f"the model that its config.json describes cannot be built: {in_one_line(error)}"
            raise ModelError(
                problem, where=config.model.name, fix="fetch the file again, or name another model"
            ) from error
        if config.adapter.method != "none":
            model, _ = attach.attach_adapter(model, config.adapter, seed=0, tokenizer=tokenizer)
    return model


def base_of(model: Any) -> Any:
    """The transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks_of(model: Any) -> list[nn.Module]:
    """The decoder blocks in order: the longest list of modules in the decoder."""
    lists = [module for module in base_of(model).get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def count(model: Any, config: Config) -> Counted:
    """Count a skeleton of all blocks exactly; 4-bit and 8-bit weights by the formula of how bitsandbytes holds them."""
    quantized = _quantized_weights(model) if config.model.quantization != "none" else {}
    held: Counter[str] = Counter()
    for weight in model.parameters():
        part = "adapter" if weight.requires_grad and config.adapter.method != "none" else "base"
        held[part] += (
            quantized_bytes(weight.shape, config.model.quantization) if id(weight) in quantized else _bytes(weight)
        )
    held["base"] += sum(_bytes(buffer) for buffer in model.buffers())
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return Counted(
        parameters=sum(weight.numel() for weight in model.parameters()),
        trained=sum(weight.numel() for weight in trained),
        base_bytes=held["base"],
        adapter_bytes=held["adapter"],
        gradient_bytes=sum(_bytes(weight) for weight in trained),
        largest_gradient_bytes=max((_bytes(weight) for weight in trained), default=0),
        largest_linear_bytes=max((_bytes(weight) for weight in quantized.values()), default=0),
        prepacked_bytes=_prepacked_bytes(base_of(model)),
    )


def _prepacked_bytes(base: Any) -> int:
    fuse_adapters(base)
    entries = sum(source.read().numel() for source in prepackable(base))
    unfuse_adapters(base)
    return COPIES * DTYPE.itemsize * entries


def quantized_bytes(shape: torch.Size, kind: str) -> int:
    """Bytes of one frozen weight in NF4 with double quantization (`4bit`) or in 8 bit, with its scales.

    NF4: half a byte an entry, one byte of scale for 64 entries, four bytes for 256 of those scales, two code tables
    (arXiv:2305.14314). 8 bit: a byte an entry, four bytes a row.

    >>> quantized_bytes(torch.Size([64, 64]), "4bit"), quantized_bytes(torch.Size([64, 64]), "8bit")
    (3208, 4352)
    """
    entries = shape.numel()
    if kind == "8bit":
        return entries + 4 * shape[0]
    scales = -(-entries // 64)
    return -(-entries // 2) + scales + 4 * -(-scales // 256) + 4 * (256 + 16) + 4


def _quantized_weights(model: Any) -> dict[int, torch.Tensor]:
    """The weights that loading quantizes, by id: those of every linear layer but the output head."""
    head = base_of(model).get_output_embeddings()
    layers = [
        module.get_base_layer() if hasattr(module, "get_base_layer") else module
        for name, module in model.named_modules()
        if "lora_" not in name and "modules_to_save" not in name
    ]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"]
    return {
        id(layer.weight): layer.weight
        for layer in linear
        if layer is not head and layer.weight.dim() == 2 and not layer.weight.requires_grad
    }  # type: ignore[misc]


def give_stand_ins(model: Any, mode: FakeTensorMode) -> None:
    """Replace every meta tensor of `model` by a CPU stand-in of `mode`; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype)
                        made[id(tensor)] = (
                            nn.Parameter(new, requires_grad=tensor.requires_grad)
                            if isinstance(tensor, nn.Parameter)
                            else new
                        )
                    table[name] = made[id(tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
