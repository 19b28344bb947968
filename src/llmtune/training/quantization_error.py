"""LoRA that begins with what quantizing took from its base: LoftQ's first step (arXiv:2310.08659).

As peft has it: https://huggingface.co/docs/peft/developer_guides/quantization#loftq-initialization
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from llmtune.adapters.residual_base import lora_layers, strongest_part
from llmtune.common.decisions import Decision
from llmtune.deploy.base_weights import meta_model, open_base_weights, unquantized_folder
from llmtune.errors import AdapterError
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.parameters import base_model_of
from llmtune.models.quantization import dequantized_weight
from llmtune.models.scan import weight_files

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["begin_with_quantization_error"]


def begin_with_quantization_error(adapted: PeftModel, source: ModelSource) -> Decision:
    """Give each adapted 4-bit layer the A and B whose s B A is nearest to W - Q(W); the base stays Q(W).

    source: of the base, whose files hold W; they are read one weight at a time. Raises AdapterError for a layer that is
    not quantized, ModelError for a base whose weights are not in its files under their own names.
    """
    folder = unquantized_folder(source, noun="base", fix="set `adapter.init: kaiming`")
    config = base_model_of(adapted).config.__class__.from_pretrained(folder)
    weights = open_base_weights(weight_files(folder), meta_model(config))
    errors, left = 0.0, 0.0
    for name, layer in lora_layers(adapted):
        base, short = layer.get_base_layer(), name.removeprefix("base_model.model.")
        if type(base).__name__ != "Linear4bit":
            problem = f"loftq begins with what quantizing took from each weight, and `{short}` is not quantized"
            raise AdapterError(problem, "adapter.init", "leave it out with adapter.exclude_modules")
        quantized_OI = dequantized_weight(base)
        error_OI = weights.read(f"{short}.weight").to(quantized_OI.device).float() - quantized_OI
        scale = layer.scaling["default"]
        first_A, first_B = strongest_part(error_OI, layer.r["default"], scale)
        cast("nn.Linear", layer.lora_A["default"]).weight.data = first_A.contiguous()
        cast("nn.Linear", layer.lora_B["default"]).weight.data = first_B.contiguous()
        errors += float(error_OI.square().sum())
        left += float((error_OI - scale * first_B @ first_A).square().sum())
    part = 1 - (left / errors) ** 0.5 if errors else 0.0
    reason = f"the adapter begins with {part:.1%} of what quantizing took from the weights it is beside"
    return Decision("adapter.init", "loftq", reason)
