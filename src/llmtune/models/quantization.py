"""bitsandbytes: 4-bit NF4 and 8-bit frozen weights, and its optimizers.

bitsandbytes 0.50 tries to fetch a CPU kernel from a hub when it is imported, and in evaluation on CPUs with AVX512-BF16
it repacks its 4-bit weights in place, after which they neither train nor give the same numbers as in training. This
module switches both off, so no other module may import bitsandbytes.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llmtune.errors import MachineError
from llmtune.models.read_config import quiet_libraries

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

__all__ = [
    "bnb_optimizer",
    "dequantized_weight",
    "disable_cpu_repacking",
    "import_bitsandbytes",
    "import_bitsandbytes_before_peft",
    "is_quantized_linear",
    "quantization_config",
    "quantize_dequantize",
    "quantized_layers",
    "widen_to_float32",
]


def import_bitsandbytes() -> Any:
    """Import and return bitsandbytes without its request to a hub and without its log line.

    Raises MachineError where it cannot work.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    # For the life of the process: it would repeat its advice at every layer of every step.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kernels = sys.modules.pop("kernels", None)
    # None makes `import kernels`, the package that fetches code from a hub, fail at once and without a connection.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        with _compile_at_first_call():
            return importlib.import_module("bitsandbytes")
    except (ImportError, RuntimeError, OSError) as error:
        raise MachineError(
            f"bitsandbytes cannot be used here: {error}",
            where="model.quantization / training.optimizer",
            fix="pip install 'bitsandbytes>=0.49', or use model.quantization=none and training.optimizer=adamw",
        ) from error
    finally:
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def import_bitsandbytes_before_peft() -> None:
    """Import bitsandbytes where it is installed, as `import_bitsandbytes` does.

    peft imports it when it is loaded, and then it asks a hub for code; so this comes before every first import of peft.
    """
    if importlib.util.find_spec("bitsandbytes"):
        import_bitsandbytes()


@contextmanager
def _compile_at_first_call() -> Iterator[None]:
    """Let `torch.compile` load the compiler when the compiled function is called, for functions decorated meanwhile.

    bitsandbytes decorates its fallbacks for devices without a kernel. Most runs never call them, and loading the
    compiler takes 0.8 s of every start with an adapter.
    """
    compile_now = torch.compile

    def at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(at_first_call, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            return compiled()(*args, **named)

        return call

    torch.compile = at_first_call  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def quantization_config(
    kind: Literal["4bit", "8bit"], compute_dtype: torch.dtype, keeps: Sequence[str] = ()
) -> BitsAndBytesConfig:
    """Return the config that quantizes every linear layer but the head while it is loaded.

    keeps: names of modules that stay as they are, in the place of the head that predicts tokens.

    4bit: NF4 with double quantization (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). 8bit: LLM.int8 (Dettmers et al.
    2022, arXiv:2208.07339). compute_dtype: type of the arithmetic with 4-bit weights.

    Raises MachineError where bitsandbytes cannot work.
    """
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig  # takes seconds, and `doctor` asks for bitsandbytes alone

    if kind == "8bit":
        # Columns with values above 6 stay in 16 bits, as in the paper.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=list(keeps) or None)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(keeps) or None,
    )


def disable_cpu_repacking(model: nn.Module) -> int:
    """Switch off the in-place repacking of 4-bit weights in evaluation on CPU; returns the number of 4-bit layers."""
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for module in layers:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        # Where weights are sharded the parameter is another object, without its scales; the layer keeps them.
        module.quant_state = module.weight.quant_state  # type: ignore[assignment, union-attr]
    return len(layers)


def widen_to_float32(model: nn.Module) -> None:
    """Let a model of which parts are quantized compute in float32, with the numbers that training multiplied.

    All other weights, of any shape, get that type. Quantized ones stay as they are, because quantizing the widened
    numbers would give others; those of 4 bits are rounded to the type that they were loaded in, then widened.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # The library's product with float32 inputs leaves that rounding out.
            module.forward = functools.partial(_multiply_in_float32, module)
            module.compute_dtype = torch.float32  # type: ignore[assignment]  # what fused LoRA layers multiply in
        elif not is_quantized_linear(module):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()


def _multiply_in_float32(layer: nn.Module, inputs: Tensor) -> Tensor:
    bias = layer.bias.float() if isinstance(layer.bias, Tensor) else None
    return nn.functional.linear(inputs.float(), dequantized_weight(layer), bias)


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether this layer holds its weight in 4 or 8 bits; compares names, so bitsandbytes is not imported."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def dequantized_weight(module: nn.Module) -> Tensor:
    """Return the weight of a 4-bit or 8-bit layer as its arithmetic uses it, float32 [out, in].

    4-bit: the NF4 value of each entry times the scale of its block of 64. 8-bit: W = codes * scale / 127 with one scale
    for each output.
    """
    bitsandbytes = import_bitsandbytes()
    weight: Any = module.weight
    if type(module).__name__ == "Linear4bit":
        # In the type of the layer's arithmetic, as training multiplied it; only then widened.
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)
    state: Any = module.state
    # The first forward moves the codes from the weight to the layer's state.
    codes, scales = (state.CB, state.SCB) if state.CB is not None else (weight.CB, weight.SCB)
    return codes.to(torch.float32) * (scales.to(torch.float32).unsqueeze(1) / 127.0)


def bnb_optimizer(
    name: Literal["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion"],
    groups: Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Return an optimizer of bitsandbytes over parameter groups; decay is decoupled, a group's `weight_decay` wins.

    8-bit states are quantized blockwise, for tensors of 4096 entries or more (Dettmers et al. 2022, arXiv:2110.02861).
    Raises MachineError where bitsandbytes cannot work.
    """
    bitsandbytes = import_bitsandbytes()
    make = getattr(bitsandbytes.optim, _OPTIMIZERS[name])
    options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    if name != "lion":
        options["eps"] = eps
    optimizer: torch.optim.Optimizer = make(list(groups), **options)
    return optimizer


_OPTIMIZERS = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion": "Lion",
}


def quantized_layers(meta_model: nn.Module, kind: Literal["4bit", "8bit"], keeps: Sequence[str] = ()) -> set[str]:
    """Return the names of the layers that loading with `model.quantization` quantizes; transformers decides them.

    meta_model: the unquantized model on the meta device; its layers are replaced. Raises MachineError where
    bitsandbytes cannot work.
    """
    from transformers.quantizers.auto import AutoHfQuantizer  # as above

    with quiet_libraries(), torch.device("meta"):
        quantizer = AutoHfQuantizer.from_config(quantization_config(kind, torch.float32, keeps), pre_quantized=False)
        quantizer.preprocess_model(model=meta_model, device_map={"": "cpu"})
    return {name for name, module in meta_model.named_modules() if is_quantized_linear(module)}


def quantize_dequantize(weight: Tensor, kind: Literal["4bit", "8bit"], dtype: torch.dtype) -> Tensor:
    """Return a linear layer's weight [out, in] as the arithmetic of its quantized layer uses it, float32 [out, in].

    dtype: the type the base was loaded in, from which it was quantized. Settings and papers are those of
    `quantization_config` (4bit: arXiv:2305.14314, 8bit: arXiv:2208.07339).

    Raises MachineError where bitsandbytes cannot work.
    """
    bitsandbytes = import_bitsandbytes()
    outputs, inputs = weight.shape
    if kind == "4bit":
        layer = bitsandbytes.nn.Linear4bit(
            inputs, outputs, bias=False, compress_statistics=True, quant_type="nf4", device="meta"
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.to(dtype).contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
    else:
        layer = bitsandbytes.nn.Linear8bitLt(
            inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.weight = bitsandbytes.nn.Int8Params(
            weight.to(dtype).contiguous(), requires_grad=False, has_fp16_weights=False
        )
    return dequantized_weight(layer.to(weight.device))
