"""Shared by tests of the plan: a target with room, the training that a plan is about, and traces of its model."""

from llmtune.config.process_options import Options
from llmtune.engine.devices import open_devices
from llmtune.models.load import choose_weight_dtype
from llmtune.plan.activation_trace import MicroBatchShape, trace
from llmtune.plan.hardware import Target
from llmtune.plan.meta_model import build_meta_model
from llmtune.plan.resolve_auto import resolve_rates
from llmtune.training.build import build_setup
from training_helpers import LORA

OPTIONS = Options(no_cuda=True, offline=True)
FEW_LAYERS = (*LORA[:2], "adapter.target_modules=[q_proj,down_proj]")
"""LoRA on one layer of attention and one of the feed-forward network: a trace then has fewer operators."""
ROOMY = Target("a roomy machine", "cpu", 1 << 40, is_local=True)


def assembled_like(forecaster):
    """The training that this forecast is about, before its first step."""
    prepared, _ = resolve_rates(forecaster)
    return build_setup(prepared, OPTIONS, open_devices(forecaster.config, OPTIONS)[0])


def traced(
    forecaster, lengths, *, trained_tokens=None, blocks=None, checkpointing=False, device_type="cpu", compute=None
):
    """Peaks of a flat micro-batch of documents of these lengths; without `trained_tokens` all tokens carry loss."""
    config = forecaster.config
    is_full = config.adapter.method == "none"
    precision = "fp32" if compute is None else "bf16"
    dtype, _ = choose_weight_dtype(config.model.dtype, trained=is_full, precision=precision)
    tokenizer = forecaster.prepared.tokenizer.tokenizer
    model = build_meta_model(forecaster.shape, config, tokenizer, dtype=dtype, blocks=blocks)
    batch = MicroBatchShape(lengths, trained_tokens or sum(lengths), "flat")
    return trace(
        model,
        batch,
        device_type=device_type,
        compute=compute,
        checkpointing=checkpointing,
        gradients="single",
    )
