"""bitsandbytes, kept quiet, off the network and exact: 4-bit NF4 and 8-bit frozen weights, and its optimizers.

bitsandbytes 0.50 tries to fetch a CPU kernel from a hub when it is imported, and in evaluation on CPUs with AVX512-BF16
it repacks its 4-bit weights in place, after which they neither train nor give the same numbers as in training. Both are
switched off here; nothing else may import it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from llmtune.errors import MachineError
from llmtune.models.quiet_libraries import quiet_libraries

__all__ = [
    "bnb_optimizer",
    "dequantized_weight",
    "disable_cpu_repacking",
    "import_bitsandbytes",
    "is_quantized_linear",
    "quantization_config",
    "quantize_dequantize",
    "quantized_layers",
]

_ABSENT = object()


def import_bitsandbytes() -> Any:
    """The bitsandbytes module, imported without its look at a hub and without its log line.

    Raises MachineError where it cannot work.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # for good: it would repeat its advice at every layer of every step
    before = sys.modules.get("kernels", _ABSENT)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # the import of a hub's code then fails at once, without a connection
    try:
        with _compiling_at_first_call():
            return importlib.import_module("bitsandbytes")
    except (ImportError, RuntimeError, OSError) as error:
        raise MachineError(
            f"bitsandbytes cannot be used here: {error}",
            where="model.quantization / training.optimizer",
            fix="pip install 'bitsandbytes>=0.49', or use model.quantization=none and training.optimizer=adamw",
        ) from error
    finally:
        if before is _ABSENT:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


@contextmanager
def _compiling_at_first_call() -> Iterator[None]:
    """What is decorated with `torch.compile` meanwhile loads the compiler when it is called.

    bitsandbytes so decorates what it falls back to where it has no kernel of its own. Most runs never call that, and
    each would load the compiler for it: 0.8 s of every start with an adapter.
    """
    import torch

    at_once = torch.compile

    def at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(at_first_call, **options)
        compiled = functools.cache(lambda: at_once(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            return compiled()(*args, **named)

        return call

    torch.compile = at_first_call  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = at_once


def quantization_config(kind: Literal["4bit", "8bit"], compute_dtype: Any) -> Any:
    """The config that loads every linear layer but the head in NF4 with double quantization (arXiv:2305.14314), or in 8
    bit.
    """
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def disable_cpu_repacking(model: Any) -> int:
    """Switch off the in-place repacking of 4-bit weights in evaluation on CPU; returns how many layers are 4-bit."""
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for module in layers:
        module.support_avx512bf16_for_cpu = False
    return len(layers)


def is_quantized_linear(module: Any) -> bool:
    """Whether this layer holds its weight in 4 or 8 bit."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def dequantized_weight(module: Any) -> Any:
    """The weight of a 4-bit or 8-bit layer as the layer's arithmetic sees it, float32 [out, in].

    What a merge folds an adapter into.
    """
    import torch

    bitsandbytes = import_bitsandbytes()
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)
    codes, scales = (module.state.CB, module.state.SCB) if module.state.CB is not None else (weight.CB, weight.SCB)
    return codes.to(torch.float32) * (scales.to(torch.float32).unsqueeze(1) / 127.0)


def bnb_optimizer(
    name: Literal["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion"],
    groups: Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> Any:
    """An optimizer of bitsandbytes over parameter groups; decay is decoupled, and a group's own `weight_decay` wins.

    8-bit states are kept blockwise for tensors of 4096 entries or more (arXiv:2110.02861). Raises MachineError when it
    cannot work here.
    """
    bitsandbytes = import_bitsandbytes()
    make = getattr(bitsandbytes.optim, _OPTIMIZERS[name])
    options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    if name != "lion":
        options["eps"] = eps
    return make(list(groups), **options)


_OPTIMIZERS = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion": "Lion",
}


def quantized_layers(meta_model: Any, kind: Literal["4bit", "8bit"]) -> set[str]:
    """Return the names of the layers that loading with `model.quantization` holds in `kind`, decided by transformers
    itself.

    meta_model: the unquantized model on the meta device; its layers are replaced.
    """
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    with quiet_libraries(), torch.device("meta"):
        quantizer = AutoHfQuantizer.from_config(quantization_config(kind, torch.float32), pre_quantized=False)
        quantizer.preprocess_model(model=meta_model, device_map={"": "cpu"})
    return {name for name, module in meta_model.named_modules() if is_quantized_linear(module)}


def quantize_dequantize(weight: Any, kind: Literal["4bit", "8bit"], dtype: Any) -> Any:
    """Return a linear layer's weight [out, in] as its quantized layer's arithmetic sees it, float32 [out, in].

    dtype: the type the base was loaded in, from which it was quantized. Settings are those of `quantization_config`.
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
