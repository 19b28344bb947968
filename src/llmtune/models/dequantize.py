"""A weight through 4 or 8 bit and back, one at a time: the base an adapter was trained on, without holding the whole of it."""

from __future__ import annotations

from typing import Any, Literal

from llmtune.models.quantization import dequantized_weight, import_bitsandbytes, is_quantized_linear, quantization_config
from llmtune.models.silence import quiet_libraries

__all__ = ["quantized_layers", "through_quantization"]


def quantized_layers(meta_model: Any, kind: Literal["4bit", "8bit"]) -> set[str]:
    """Return the names of the layers that loading with `model.quantization` holds in `kind`, decided by transformers itself.

    meta_model: the unquantized model on the meta device; its layers are replaced.
    """
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    with quiet_libraries(), torch.device("meta"):
        quantizer = AutoHfQuantizer.from_config(quantization_config(kind, torch.float32), pre_quantized=False)
        quantizer.preprocess_model(model=meta_model, device_map={"": "cpu"})
    return {name for name, module in meta_model.named_modules() if is_quantized_linear(module)}


def through_quantization(weight: Any, kind: Literal["4bit", "8bit"], dtype: Any) -> Any:
    """Return a linear layer's weight [out, in] as its quantized layer's arithmetic sees it, float32 [out, in].

    dtype: the type the base was loaded in, from which it was quantized. Settings are those of `quantization_config`.
    """
    bitsandbytes = import_bitsandbytes()
    outputs, inputs = weight.shape
    if kind == "4bit":
        layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compress_statistics=True, quant_type="nf4", device="meta")
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.to(dtype).contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
    else:
        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bitsandbytes.nn.Int8Params(weight.to(dtype).contiguous(), requires_grad=False, has_fp16_weights=False)
    return dequantized_weight(layer.to(weight.device))
