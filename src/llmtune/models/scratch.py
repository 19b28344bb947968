"""Models built from nothing, as standard Hugging Face architectures: what they train into loads anywhere without
llmtune.

rotary positions, norm before each sublayer   Llama   (gated feed-forward, RMSNorm, grouped-query attention)
rotary positions, norm after each sublayer    OLMo 2  (the same, with query/key norms)
learned positions, norm before each sublayer  GPT-2   (plain feed-forward, LayerNorm, dropout)

Shapes: V entries of the vocabulary, D width, H query heads, G key/value heads, F feed-forward width, L blocks, P
positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from llmtune.config.schema import ArchitectureConfig
from llmtune.errors import ConfigError, ModelError, Problem
from llmtune.models.catalog import CATALOG
from llmtune.models.catalog_entry import CatalogEntry
from llmtune.models.quiet_libraries import quiet_libraries

__all__ = ["Architecture", "build_config", "build_model", "choose_architecture", "parameter_count"]

INITIAL_STD = 0.02
"""Standard deviation of fresh weights; matrices that write into the residual stream get this over sqrt(2 L) (GPT-2's
rule), so that its variance does not grow with depth."""


@dataclass(frozen=True)
class Architecture:
    """A complete, possible shape. `vocab_size` is the number of embedding rows."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    d_ff: int
    max_seq_len: int
    vocab_size: int
    dropout: float
    attention_dropout: float
    activation: Literal["silu", "gelu", "relu"]
    pre_norm: bool
    positions: Literal["rotary", "learned"]
    tie_embeddings: bool


def choose_architecture(entry: CatalogEntry | str, wanted: ArchitectureConfig, vocabulary: int) -> Architecture:
    """Fill what `model.architecture` leaves open from the named model, and check that the result can be built.

    vocabulary: ids of the tokenizer (its largest id + 1). Raises ConfigError with every impossible value, each with the
    fix.
    """
    shape = _entry(entry).shape
    assert shape is not None, "only from-scratch rows come here"
    wanted = _merged(_entry(entry), wanted)
    d_model = _or(wanted.d_model, shape.d_model)
    learned = wanted.positions == "learned"
    activation = wanted.activation or ("gelu" if learned else "silu")
    n_heads = _or(wanted.n_heads, _heads_for(d_model, shape.n_heads, shape.d_model))
    chosen = Architecture(
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=_or(wanted.n_kv_heads, n_heads),
        n_layers=_or(wanted.n_layers, shape.n_layers),
        d_ff=_or(wanted.d_ff, 64 * math.ceil(8 * d_model / 3 / 64) if activation == "silu" else 4 * d_model),
        max_seq_len=_or(wanted.max_seq_len, shape.max_seq_len),
        vocab_size=max(vocabulary, wanted.vocab_size or 0),
        dropout=wanted.dropout or 0.0,
        attention_dropout=wanted.attention_dropout or 0.0,
        activation=activation,
        pre_norm=True if wanted.pre_norm is None else wanted.pre_norm,
        positions=wanted.positions or "rotary",
        tie_embeddings=True if wanted.tie_embeddings is None else wanted.tie_embeddings,
    )
    problems = _problems(chosen, wanted, vocabulary)
    if problems:
        raise ConfigError.all(problems)
    return chosen


def parameter_count(shape: Architecture) -> int:
    """The exact number of parameters of the model that `build_model` makes; tied embeddings count once.

    Llama: V D (twice when untied) + L (2 D^2 + 2 D^2 G/H + 3 D F + 2 D) + D. OLMo 2 adds query and key norms, GPT-2 P D
    positions, biases.
    """
    width, heads, blocks = shape.d_model, shape.n_heads, shape.n_layers
    embeddings = shape.vocab_size * width * (1 if shape.tie_embeddings else 2)
    if shape.positions == "learned":
        block = 4 * width**2 + 4 * width + 2 * width * shape.d_ff + shape.d_ff + width + 4 * width
        return embeddings + shape.max_seq_len * width + blocks * block + 2 * width
    kv_width = width // heads * shape.n_kv_heads
    block = 2 * width**2 + 2 * width * kv_width + 3 * width * shape.d_ff + 2 * width
    if not shape.pre_norm:
        block += width + kv_width
    return embeddings + blocks * block + width


def build_config(entry: CatalogEntry | str, architecture: ArchitectureConfig, tokenizer: Any) -> Any:
    """The Hugging Face config of a from-scratch model for this tokenizer.

    Raises ConfigError for an impossible shape.
    """
    shape = choose_architecture(entry, architecture, max(tokenizer.get_vocab().values()) + 1)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": pad if pad != end else None}
    family = "gpt2" if shape.positions == "learned" else "llama" if shape.pre_norm else "olmo2"
    config = _FAMILIES[family](shape, ids)
    config.dtype = "float32"
    return config


def build_model(config: Any, *, seed: int) -> Any:
    """A causal LM with fresh float32 weights that are a function of (config, seed) alone.

    The global random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    into_residual = INITIAL_STD / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in sorted(
            model.named_parameters()
        ):  # sorted: the draw does not depend on the order a library lists them in
            if weight.ndim == 2:
                weight.normal_(
                    0.0, into_residual if name.endswith(_WRITES_INTO_RESIDUAL) else INITIAL_STD, generator=generator
                )
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.fill_(1.0)
    return model


def _entry(entry: CatalogEntry | str) -> CatalogEntry:
    if isinstance(entry, CatalogEntry):
        return entry
    found = next((row for row in CATALOG if row.name == entry and row.shape), None)
    if found is None:
        names = ", ".join(row.name for row in CATALOG if row.shape)
        raise ModelError(f"`{entry}` is no model that is built from scratch", where="model.name", fix=f"one of {names}")
    return found


def _merged(entry: CatalogEntry, wanted: ArchitectureConfig) -> ArchitectureConfig:
    """A user's own row may set any key of `model.architecture`; the config itself wins over it."""
    own = {key: value for key, value in entry.architecture.items() if value is not None}
    given = {one.name: getattr(wanted, one.name) for one in fields(wanted) if getattr(wanted, one.name) is not None}
    return replace(ArchitectureConfig(), **{**own, **given})


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _heads_for(d_model: int, n_heads: int, named_width: int) -> int:
    """Heads for a width that is not the named model's: the same width per head when it divides, else one that does."""
    if d_model == named_width:
        return n_heads
    per_head = named_width // n_heads
    return next((d_model // size for size in (per_head, 64, 32, 16, 8) if d_model > 0 and d_model % size == 0), 1)


def _problems(shape: Architecture, wanted: ArchitectureConfig, vocabulary: int) -> list[Problem]:
    found: list[Problem] = []

    def wrong(key: str, problem: str, fix: str) -> None:
        found.append(Problem(problem, f"model.architecture.{key}", fix))

    for key in ("d_model", "n_heads", "n_kv_heads", "n_layers", "d_ff", "max_seq_len"):
        derived = key != "d_model" and getattr(wanted, key) is None  # then another key is at fault, and is named
        if getattr(shape, key) < 1 and not derived:
            wrong(key, f"{key} is {getattr(shape, key)}", "give a whole number of 1 or more")
    if found:
        return found
    if shape.d_model % shape.n_heads:
        near = sorted(
            (n for n in range(1, shape.d_model + 1) if shape.d_model % n == 0), key=lambda n: abs(n - shape.n_heads)
        )[:2]
        wrong(
            "n_heads",
            f"{shape.n_heads} heads do not divide a width of {shape.d_model}",
            f"n_heads={' or '.join(map(str, near))}",
        )
    elif shape.positions == "rotary" and shape.d_model // shape.n_heads % 2:
        width = shape.d_model // shape.n_heads
        wrong(
            "n_heads",
            f"rotary positions need an even width per head, and {shape.d_model} / {shape.n_heads} is {width}",
            "halve n_heads",
        )
    if shape.n_heads % shape.n_kv_heads:
        wrong(
            "n_kv_heads",
            f"{shape.n_kv_heads} key/value heads do not divide {shape.n_heads} heads",
            "use a divisor of n_heads",
        )
    for key in ("dropout", "attention_dropout"):
        if not 0 <= getattr(shape, key) < 1:
            wrong(key, f"{key} is {getattr(shape, key)}", "give a fraction from 0 to below 1")
    if shape.positions == "rotary" and shape.dropout > 0:
        wrong(
            "dropout",
            "Llama-like models have no dropout on the residual stream",
            "positions=learned, or use attention_dropout",
        )
    if shape.positions == "learned" and shape.n_kv_heads != shape.n_heads:
        wrong(
            "n_kv_heads",
            "GPT-2-like models have no grouped-query attention",
            "leave n_kv_heads out, or positions=rotary",
        )
    if shape.positions == "learned" and not shape.pre_norm:
        problem = "no standard architecture has learned positions and norms after each sublayer"
        wrong("pre_norm", problem, "pre_norm=true, or positions=rotary")
    if wanted.vocab_size is not None and wanted.vocab_size < vocabulary:
        problem = f"the tokenizer has {vocabulary:,} ids, more than {wanted.vocab_size:,}"
        wrong("vocab_size", problem, f"vocab_size={vocabulary} or leave it out")
    return found


def _llama(shape: Architecture, ids: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_gated(shape), head_dim=shape.d_model // shape.n_heads, **ids)


def _olmo2(shape: Architecture, ids: dict[str, Any]) -> Any:
    from transformers import Olmo2Config

    return Olmo2Config(**_gated(shape), **ids)


def _gated(shape: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "hidden_act": shape.activation,
        "max_position_embeddings": shape.max_seq_len,
        "attention_dropout": shape.attention_dropout,
        "tie_word_embeddings": shape.tie_embeddings,
        "initializer_range": INITIAL_STD,
        "rms_norm_eps": 1e-5,
    }


def _gpt2(shape: Architecture, ids: dict[str, Any]) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=shape.vocab_size,
        n_embd=shape.d_model,
        n_inner=shape.d_ff,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_positions=shape.max_seq_len,
        activation_function="gelu_new" if shape.activation == "gelu" else shape.activation,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.attention_dropout,
        tie_word_embeddings=shape.tie_embeddings,
        initializer_range=INITIAL_STD,
        **ids,
    )


_WRITES_INTO_RESIDUAL = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "attn.c_proj.weight", "mlp.c_proj.weight")
_FAMILIES: dict[str, Callable[[Architecture, dict[str, Any]], Any]] = {"llama": _llama, "olmo2": _olmo2, "gpt2": _gpt2}
