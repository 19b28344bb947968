"""The keys `model.*` and `model.architecture.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ArchitectureConfig", "ModelConfig"]


@dataclass(frozen=True)
class ArchitectureConfig:
    """Shape of a from-scratch model; what is not given comes from the named custom model."""

    d_model: int | None = None
    """Width of the residual stream."""

    n_heads: int | None = None
    """Attention heads; must divide `d_model`."""

    n_kv_heads: int | None = None
    """Key/value heads for grouped-query attention; must divide `n_heads`. Same as `n_heads` when not given."""

    n_layers: int | None = None
    """Transformer blocks."""

    d_ff: int | None = None
    """Width of the feed-forward layer. 4 x `d_model` for gelu, 8/3 x `d_model` rounded up to 64 for silu when not given."""

    max_seq_len: int | None = None
    """Longest sequence the model can see, in tokens."""

    dropout: float | None = None
    """Fraction of residual activations dropped in training (GPT-2-like architecture only)."""

    attention_dropout: float | None = None
    """Fraction of attention weights dropped in training."""

    activation: Literal["silu", "gelu", "relu"] | None = None
    """Activation of the feed-forward layer."""

    pre_norm: bool | None = None
    """Normalise before each sublayer (true) or after it (false; refused where no standard architecture has it)."""

    positions: Literal["rotary", "learned"] | None = None
    """Rotary positions give a Llama-like architecture, learned positions a GPT-2-like one."""

    tie_embeddings: bool | None = None
    """Share the input embedding and the output head."""

    vocab_size: int | None = None
    """Entries of the tokenizer trained for this model, and of its embedding."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and how it is held in memory."""

    name: str = "custom-tiny"
    """A name of `llmtune list-models`, a local folder, a `.gguf` file or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it resolves to is recorded."""

    tokenizer: str | None = None
    """Folder or hub id of another tokenizer; the model's own when not given."""

    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own, or the name of a shipped one (`chatml`)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which frozen weights are held; trained weights are always held in float32 unless this names another type."""

    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen base in 4-bit NF4 with double quantization (QLoRA) or in 8 bit; needs an adapter."""

    attention: Literal["auto", "sdpa", "flash", "flex", "eager"] = "auto"
    """Attention implementation; `auto` takes the fastest exact one for this device and says which."""

    gradient_checkpointing: bool | Literal["auto", "offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more work. `offload` is for very long rows: also keeps what
    blocks need for it in host memory, and runs feed-forward layers over tiles of tokens. `auto` decides by the plan."""

    weights_prepack: bool | Literal["auto"] = "auto"
    """Keep frozen weights under LoRA layers also as a CPU's matrix kernels read them, in bf16, and dequantized: a few per cent faster, the
    same bits, for two copies in memory. `auto` does where no block is recomputed and the plan has room."""

    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Shape of a from-scratch model."""

    @property
    def recomputes(self) -> bool:
        """Whether blocks are computed again in the backward pass, as far as that is settled (`auto` is not)."""
        return self.gradient_checkpointing in (True, "offload")
