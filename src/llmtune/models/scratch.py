"""Build from-scratch models as standard Hugging Face architectures, so that they load anywhere without llmtune.

rotary positions, norm before each sublayer   Llama   (gated feed-forward, RMSNorm, grouped-query attention)
rotary positions, norm after each sublayer    OLMo 2  (the same, with query/key norms)
learned positions, norm before each sublayer  GPT-2   (plain feed-forward, LayerNorm, dropout)

Shapes: V entries of the vocabulary, D width, H query heads, G key/value heads, F feed-forward width, L blocks, P
positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from llmtune.config.schema import ArchitectureConfig
from llmtune.errors import ConfigError, ModelError, Problem
from llmtune.models.catalog import CATALOG
from llmtune.models.catalog_entry import CatalogEntry
from llmtune.models.read_config import auto_class, quiet_libraries
from llmtune.models.score_head import zero_new_head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Architecture", "build_config", "build_model", "choose_architecture", "parameter_count"]


class _TokenIds(TypedDict):
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None


INITIAL_STD = 0.02
"""Standard deviation of fresh weights; that of matrices which write into the residual stream is divided by sqrt(2 L).

So the variance of the residual stream does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).
"""


@dataclass(frozen=True)
class Architecture:
    """A complete and consistent shape of a model."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    d_ff: int
    max_seq_len: int
    vocab_size: int
    """Rows of the embedding."""
    dropout: float
    attention_dropout: float
    activation: Literal["silu", "gelu", "relu"]
    pre_norm: bool
    positions: Literal["rotary", "learned"]
    tie_embeddings: bool


def choose_architecture(entry: CatalogEntry | str, requested: ArchitectureConfig, vocabulary: int) -> Architecture:
    """Fill the open keys of `model.architecture` from the named model, and check that the result can be built.

    vocabulary: ids of the tokenizer (its largest id + 1).

    Raises ConfigError with every impossible value, each with the fix, and ModelError for a name of no from-scratch
    model.
    """
    row = _scratch_row(entry)
    shape = row.shape
    assert shape is not None, "only from-scratch rows come here"
    requested = _with_row_values(row, requested)
    d_model = _default(requested.d_model, shape.d_model)
    learned = requested.positions == "learned"
    activation = requested.activation or ("gelu" if learned else "silu")
    n_heads = _default(requested.n_heads, _heads_for(d_model, shape.n_heads, shape.d_model))
    chosen = Architecture(
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=_default(requested.n_kv_heads, n_heads),
        n_layers=_default(requested.n_layers, shape.n_layers),
        # A gated feed-forward has three matrices instead of two: 8/3 of the width keeps the number of weights
        # (Shazeer 2020, arXiv:2002.05202), rounded up to a multiple of 64 as kernels like it.
        d_ff=_default(requested.d_ff, 64 * math.ceil(8 * d_model / 3 / 64) if activation == "silu" else 4 * d_model),
        max_seq_len=_default(requested.max_seq_len, shape.max_seq_len),
        vocab_size=max(vocabulary, requested.vocab_size or 0),
        dropout=requested.dropout or 0.0,
        attention_dropout=requested.attention_dropout or 0.0,
        activation=activation,
        pre_norm=True if requested.pre_norm is None else requested.pre_norm,
        positions=requested.positions or "rotary",
        tie_embeddings=True if requested.tie_embeddings is None else requested.tie_embeddings,
    )
    problems = _problems(chosen, requested, vocabulary)
    if problems:
        raise ConfigError.all(problems)
    return chosen


def parameter_count(shape: Architecture) -> int:
    """Return the exact number of parameters of the model that `build_model` makes; tied embeddings count once.

    Llama: V D (twice when untied) + L (2 D^2 + 2 D^2 G/H + 3 D F + 2 D) + D.
    OLMo 2: the same + L (D + D G/H) for the norms of queries and keys.
    GPT-2: V D (twice when untied) + P D + L (4 D^2 + 4 D + 2 D F + F + D + 4 D) + 2 D.
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


def build_config(
    entry: CatalogEntry | str, architecture: ArchitectureConfig, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedConfig:
    """Return the Hugging Face config of a from-scratch model for this tokenizer.

    Raises ConfigError for an impossible shape, ModelError for a name of no from-scratch model.
    """
    from transformers import AutoConfig  # only here: models are listed and counted without transformers

    shape = choose_architecture(entry, architecture, max(tokenizer.get_vocab().values()) + 1)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    # A pad id that also ends a document would give that row of the embedding no gradient.
    ids = _TokenIds(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=pad if pad != end else None)
    family = "gpt2" if shape.positions == "learned" else "llama" if shape.pre_norm else "olmo2"
    config = AutoConfig.for_model(family, **_FAMILIES[family](shape), **ids)
    config.dtype = "float32"
    return config


def build_model(config: PreTrainedConfig, *, seed: int, labels: Sequence[str] = ()) -> PreTrainedModel:
    """Return a causal LM with fresh float32 weights, which are a function of (config, seed) alone.

    labels: of a model that gives scores, whose head is 0 (see `score_head`).

    Matrices are drawn from N(0, 0.02^2), those that write into the residual stream from N(0, 0.02^2 / (2 L)); biases
    are 0, weights of norms 1. The global random state stays as it was.
    """
    import torch  # as above

    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(labels).from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    # A generator of its own: the library's initialization has drawn from the global one, and may draw otherwise
    # tomorrow.
    generator = torch.Generator().manual_seed(seed)
    into_residual = INITIAL_STD / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        # Sorted, so that the draws do not depend on the order in which the library lists the weights.
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 2:
                std = into_residual if name.endswith(_WRITES_INTO_RESIDUAL) else INITIAL_STD
                weight.normal_(0.0, std, generator=generator)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.fill_(1.0)
    if labels:
        zero_new_head(model)
    return model


def _scratch_row(entry: CatalogEntry | str) -> CatalogEntry:
    if isinstance(entry, CatalogEntry):
        return entry
    row = next((row for row in CATALOG if row.name == entry and row.shape), None)
    if row is None:
        names = ", ".join(row.name for row in CATALOG if row.shape)
        raise ModelError(f"`{entry}` is no model that is built from scratch", where="model.name", fix=f"one of {names}")
    return row


def _with_row_values(row: CatalogEntry, requested: ArchitectureConfig) -> ArchitectureConfig:
    """Fill open keys from a user's own row, which may set any key of `model.architecture`; the config wins over it."""
    values = {field.name: getattr(requested, field.name) for field in fields(requested)}
    given = {key: value for key, value in values.items() if value is not None}
    return replace(ArchitectureConfig(), **{**{k: v for k, v in row.architecture.items() if v is not None}, **given})


def _default(given: int | None, default: int) -> int:
    return default if given is None else given


def _heads_for(d_model: int, n_heads: int, named_width: int) -> int:
    """Return the heads for a width other than the named model's: the same width per head, or one that divides."""
    if d_model == named_width:
        return n_heads
    per_head = named_width // n_heads
    return next((d_model // size for size in (per_head, 64, 32, 16, 8) if d_model > 0 and d_model % size == 0), 1)


def _problems(shape: Architecture, requested: ArchitectureConfig, vocabulary: int) -> list[Problem]:
    problems: list[Problem] = []

    def report(key: str, problem: str, fix: str) -> None:
        problems.append(Problem(problem, f"model.architecture.{key}", fix))

    for key in ("d_model", "n_heads", "n_kv_heads", "n_layers", "d_ff", "max_seq_len"):
        derived = key != "d_model" and getattr(requested, key) is None  # then d_model is at fault, and is named
        if getattr(shape, key) < 1 and not derived:
            report(key, f"{key} is {getattr(shape, key)}", "give a whole number of 1 or more")
    if problems:
        return problems
    if shape.d_model % shape.n_heads:
        # The two nearest divisors, one on either side where there are two.
        near = sorted(
            (n for n in range(1, shape.d_model + 1) if shape.d_model % n == 0), key=lambda n: abs(n - shape.n_heads)
        )[:2]
        report(
            "n_heads",
            f"{shape.n_heads} heads do not divide a width of {shape.d_model}",
            f"n_heads={' or '.join(map(str, near))}",
        )
    elif shape.positions == "rotary" and shape.d_model // shape.n_heads % 2:
        width = shape.d_model // shape.n_heads
        report(
            "n_heads",
            f"rotary positions need an even width per head, and {shape.d_model} / {shape.n_heads} is {width}",
            "halve n_heads",
        )
    if shape.n_heads % shape.n_kv_heads:
        report(
            "n_kv_heads",
            f"{shape.n_kv_heads} key/value heads do not divide {shape.n_heads} heads",
            "use a divisor of n_heads",
        )
    for key in ("dropout", "attention_dropout"):
        if not 0 <= getattr(shape, key) < 1:
            report(key, f"{key} is {getattr(shape, key)}", "give a fraction from 0 to below 1")
    if shape.positions == "rotary" and shape.dropout > 0:
        report(
            "dropout",
            "Llama-like models have no dropout on the residual stream",
            "positions=learned, or use attention_dropout",
        )
    if shape.positions == "learned" and shape.n_kv_heads != shape.n_heads:
        report(
            "n_kv_heads",
            "GPT-2-like models have no grouped-query attention",
            "leave n_kv_heads out, or positions=rotary",
        )
    if shape.positions == "learned" and not shape.pre_norm:
        problem = "no standard architecture has learned positions and norms after each sublayer"
        report("pre_norm", problem, "pre_norm=true, or positions=rotary")
    if requested.vocab_size is not None and requested.vocab_size < vocabulary:
        problem = f"the tokenizer has {vocabulary:,} ids, more than {requested.vocab_size:,}"
        report("vocab_size", problem, f"vocab_size={vocabulary} or leave it out")
    return problems


def _llama(shape: Architecture) -> dict[str, Any]:
    return {**_gated_options(shape), "head_dim": shape.d_model // shape.n_heads}


def _gated_options(shape: Architecture) -> dict[str, Any]:
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


def _gpt2(shape: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "n_embd": shape.d_model,
        "n_inner": shape.d_ff,
        "n_layer": shape.n_layers,
        "n_head": shape.n_heads,
        "n_positions": shape.max_seq_len,
        "activation_function": "gelu_new" if shape.activation == "gelu" else shape.activation,
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.attention_dropout,
        "tie_word_embeddings": shape.tie_embeddings,
        "initializer_range": INITIAL_STD,
    }


_WRITES_INTO_RESIDUAL = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "attn.c_proj.weight", "mlp.c_proj.weight")
_FAMILIES: dict[str, Callable[[Architecture], dict[str, Any]]] = {
    "llama": _llama,
    "olmo2": _gated_options,
    "gpt2": _gpt2,
}
