"""The architectures that are written as GGUF: a row for each `model_type` of transformers.

A row holds its name in llama.cpp, the keys that describe it, the layout of its weights there, and the features that
llama.cpp computes otherwise or that the file cannot express. The keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Legend: H heads, D width of a head, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
from torch import Tensor

from llmtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "ARCHITECTURES",
    "GgufArchitecture",
    "Layout",
    "gguf_name_map",
    "refuse_unwritable",
    "refused",
    "split_pairs",
]

Move = Callable[[str, "PreTrainedConfig", Tensor], Tensor]
Keys = Iterator[tuple[str, object]]


class Layout(NamedTuple):
    """How a weight of a name stands in the file, and how it is read from there."""

    write: Move
    read: Move


def split_pairs(weight: Tensor, heads: int) -> Tensor:
    """Put the rows of a query or key matrix [H D, I] in llama.cpp's order: 0, D/2, 1, D/2 + 1, ... within each head.

    Both orders rotate the same pairs of entries (rotary positions, Su et al. 2021, arXiv:2104.09864).

    >>> import torch
    >>> split_pairs(torch.arange(8).unsqueeze(1), heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _joined_pairs(weight: Tensor, heads: int) -> Tensor:
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _on_pairs(move: Callable[[Tensor, int], Tensor]) -> Move:
    def moved(name: str, config: PreTrainedConfig, weight: Tensor) -> Tensor:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return weight
        heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads
        return move(weight, int(heads))

    return moved


def _transposed(name: str, config: PreTrainedConfig, weight: Tensor) -> Tensor:  # noqa: ARG001 - a `Move`
    """GPT-2 keeps inputs x outputs; every other matrix is outputs x inputs."""
    return weight.t().contiguous() if name.endswith(("attn.weight", "c_proj.weight", "c_fc.weight")) else weight


def _on_norms(offset: float) -> Move:
    """Gemma multiplies by 1 + weight, llama.cpp by the weight."""
    return lambda name, config, weight: weight.float() + offset if name.endswith("norm.weight") else weight  # noqa: ARG005


def _as_it_is(name: str, config: PreTrainedConfig, weight: Tensor) -> Tensor:  # noqa: ARG001 - a `Move`
    return weight


PLAIN = Layout(_as_it_is, _as_it_is)
PAIRS = Layout(_on_pairs(split_pairs), _on_pairs(_joined_pairs))
"""Rows of q and k change places: llama.cpp rotates neighbouring entries of a head, transformers entries half a head
apart.
"""
TRANSPOSED = Layout(_transposed, _transposed)
NORMS_ABOVE_ONE = Layout(_on_norms(1.0), _on_norms(-1.0))


def _decoder_keys(config: PreTrainedConfig) -> Keys:
    """Keys of every decoder with rotary positions and RMS norms, by the writer's methods."""
    width = _head_width(config)
    rope = _rope(config)
    yield "add_context_length", config.max_position_embeddings
    yield "add_embedding_length", config.hidden_size
    yield "add_block_count", config.num_hidden_layers
    yield "add_feed_forward_length", config.intermediate_size
    yield "add_head_count", config.num_attention_heads
    yield "add_head_count_kv", config.num_key_value_heads
    yield "add_layer_norm_rms_eps", config.rms_norm_eps
    yield "add_rope_freq_base", float(rope["rope_theta"])
    yield "add_rope_dimension_count", int(width * rope.get("partial_rotary_factor", 1.0))
    yield "add_key_length", width
    yield "add_value_length", width


def _granite_keys(config: PreTrainedConfig) -> Keys:
    yield from _decoder_keys(config)
    yield "add_attention_scale", config.attention_multiplier
    yield "add_embedding_scale", config.embedding_multiplier
    yield "add_residual_scale", config.residual_multiplier
    yield "add_logit_scale", config.logits_scaling


def _phi3_keys(config: PreTrainedConfig) -> Keys:
    yield from _decoder_keys(config)
    original = int(config.original_max_position_embeddings)
    yield "add_rope_scaling_orig_ctx_len", original
    stretch = config.max_position_embeddings / original
    if _rope(config).get("rope_type") == "longrope" and stretch > 1:
        yield "add_rope_scaling_attn_factors", math.sqrt(1 + math.log(stretch) / math.log(original))


def _phi3_tensors(config: PreTrainedConfig) -> Iterator[tuple[str, list[float]]]:
    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", rope["long_factor"]
        yield "rope_factors_short.weight", rope["short_factor"]


def _gemma3_keys(config: PreTrainedConfig) -> Keys:
    yield from _decoder_keys(config)
    yield "add_sliding_window", config.sliding_window
    yield "add_rope_freq_base_swa", float(config.rope_parameters["sliding_attention"]["rope_theta"])


def _gpt2_keys(config: PreTrainedConfig) -> Keys:
    yield "add_context_length", config.n_positions
    yield "add_embedding_length", config.n_embd
    yield "add_block_count", config.n_layer
    yield "add_feed_forward_length", config.n_inner or 4 * config.n_embd
    yield "add_head_count", config.n_head
    yield "add_layer_norm_eps", config.layer_norm_epsilon


def _no_tensors(_config: PreTrainedConfig) -> Iterable[tuple[str, list[float]]]:
    return ()


def _decoder_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    yield from _other_rope(config, "default")
    yield from _other(config, "hidden_act", "silu", "a feed-forward activated by")
    if getattr(config, "mlp_bias", False):
        yield "biases in the feed-forward"


def _no_attention_bias(config: PreTrainedConfig) -> Iterator[str]:
    yield from _decoder_obstacles(config)
    if getattr(config, "attention_bias", False):
        yield "biases in the attention"


def _no_window(config: PreTrainedConfig) -> Iterator[str]:
    yield from _decoder_obstacles(config)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        yield "a sliding window of attention"


def _qwen3_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    yield from _no_window(config)
    if config.attention_bias:
        yield "biases in the attention"
    if _head_width(config) != 128:
        yield f"heads of a width of {_head_width(config)} that transformers could check (it reads 128 from a file)"


def _smollm3_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    yield from _no_attention_bias(config)
    yield from _other(config, "use_sliding_window", False, "a sliding window of attention:")
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != expected:
        yield "other layers without rotary positions than every fourth"


def _phi3_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    yield from _other_rope(config, "default", "longrope")
    yield from _other(config, "hidden_act", "silu", "a feed-forward activated by")
    if (config.sliding_window or config.max_position_embeddings) < config.max_position_embeddings:
        yield f"a sliding window of attention below the context (set both to {config.sliding_window} in config.json)"


def _gemma3_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    yield from _other_rope(config, "default")
    yield from _other(config, "hidden_activation", "gelu_pytorch_tanh", "a feed-forward activated by")
    for name in ("attention_bias", "use_bidirectional_attention"):
        yield from _other(config, name, False, f"{name} of")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        yield from _other(config, name, None, f"{name} of")
    # The model of 27 B divides by another width, and llama.cpp recognizes it by its number of layers.
    width = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    yield from _other(config, "query_pre_attn_scalar", width, "attention scaled by")
    kinds = [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(len(config.layer_types))
    ]
    if list(config.layer_types) != kinds:
        yield "other layers of full attention than every sixth"


def _gpt2_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    yield from _other(config, "activation_function", "gelu_new", "a feed-forward activated by")
    yield from _other(config, "scale_attn_weights", True, "attention that is scaled:")
    yield from _other(config, "scale_attn_by_inverse_layer_idx", False, "attention scaled by its layer:")
    yield from _other(config, "add_cross_attention", False, "cross attention:")


def _other(config: PreTrainedConfig, name: str, expected: object, words: str) -> Iterator[str]:
    if (value := getattr(config, name, expected)) != expected:
        yield f"{words} `{value}` in this architecture"


def _other_rope(config: PreTrainedConfig, *known: str) -> Iterator[str]:
    if (kind := _rope(config).get("rope_type", "default")) not in known:
        yield f"rotary positions of type `{kind}` (as this writes them)"


def _rope(config: PreTrainedConfig) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)  # one for each kind of layer, or one


def _head_width(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class GgufArchitecture:
    """The way a `model_type` of transformers is written."""

    name: str
    """Its name in llama.cpp."""
    obstacles: Callable[[PreTrainedConfig], Iterator[str]]
    """Yields the features of a config that llama.cpp would compute otherwise."""
    layout: Layout = PLAIN
    keys: Callable[[PreTrainedConfig], Keys] = _decoder_keys
    """Yields (method of the gguf package's writer, value)."""
    tensors: Callable[[PreTrainedConfig], Iterable[tuple[str, list[float]]]] = _no_tensors
    """Yields vectors that are settings in transformers."""
    reads_back: bool = False
    """transformers reads its files; of others the weights are read by the names they were written under."""


def refuse_unwritable(config: PreTrainedConfig) -> GgufArchitecture:
    """Return the way this model is written. Raises ModelError with everything that the format cannot express."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise refused(f"the architecture `{config.model_type}` is not written as GGUF; these are: {known}")
    obstacles = list(architecture.obstacles(config))
    if obstacles:
        raise refused(f"llama.cpp has no place for {'; '.join(obstacles)}")
    return architecture


def gguf_name_map(config: PreTrainedConfig) -> gguf.TensorNameMap:
    """Return the map from the names of weights in transformers to those in a file."""
    architecture = refuse_unwritable(config)
    # The package names architectures by number.
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    return gguf.get_tensor_name_map(number, config.num_hidden_layers)


def refused(problem: str) -> ModelError:
    """Return the refusal of a model that a GGUF file cannot express."""
    fix = "export as safetensors, which keeps every model; llama.cpp's `convert_hf_to_gguf.py` may know this one"
    return ModelError(problem, where="--to gguf", fix=fix)


ARCHITECTURES: dict[str, GgufArchitecture] = {
    "gemma3_text": GgufArchitecture("gemma3", _gemma3_obstacles, NORMS_ABOVE_ONE, _gemma3_keys),
    "gpt2": GgufArchitecture("gpt2", _gpt2_obstacles, TRANSPOSED, _gpt2_keys),
    "granite": GgufArchitecture("granite", _no_attention_bias, PAIRS, _granite_keys),
    "llama": GgufArchitecture("llama", _no_attention_bias, PAIRS, reads_back=True),
    "mistral": GgufArchitecture("llama", _no_window, PAIRS, reads_back=True),
    "phi3": GgufArchitecture("phi3", _phi3_obstacles, keys=_phi3_keys, tensors=_phi3_tensors),
    "qwen2": GgufArchitecture("qwen2", _no_window, reads_back=True),
    "qwen3": GgufArchitecture("qwen3", _qwen3_obstacles, reads_back=True),
    "smollm3": GgufArchitecture("smollm3", _smollm3_obstacles, PAIRS),
}
