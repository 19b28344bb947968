"""Write a model as one GGUF file, which llama.cpp and the programs built on it run.

Each architecture is a row of `ARCHITECTURES`: its name in llama.cpp, and the features that llama.cpp computes otherwise
or that the file cannot express. Names of tensors come from the gguf package. Vectors are written in float32, as
llama.cpp requires; matrices in the requested type where their rows fit it.

Legend: H heads, D width of a head, I inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from llmtune.deploy.gguf_types import GGUF_TYPES, GgufType, gguf_type_of
from llmtune.deploy.gguf_vocabulary import Vocabulary, gguf_vocabulary
from llmtune.deploy.model_folder import ModelFolder
from llmtune.errors import ModelError

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedConfig

__all__ = ["ARCHITECTURES", "refuse_unwritable", "split_pairs", "types_of", "write_gguf"]


@dataclass(frozen=True)
class GgufArchitecture:
    """The way a `model_type` of transformers is written."""

    name: str
    """Its name in llama.cpp."""
    splits_pairs: bool
    """Rows of q and k change places: llama.cpp rotates neighbouring entries of a head, transformers entries half a head
    apart.
    """
    obstacles: Callable[[PreTrainedConfig], Iterator[str]]
    """Yields the features of a config that llama.cpp would compute otherwise."""


def refuse_unwritable(config: PreTrainedConfig) -> GgufArchitecture:
    """Return the way this model is written. Raises ModelError with everything that the format cannot express."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise _refused(f"the architecture `{config.model_type}` is not written as GGUF; these are: {known}")
    obstacles = [*_common_obstacles(config), *architecture.obstacles(config)]
    if obstacles:
        raise _refused(f"llama.cpp has no place for {'; '.join(obstacles)}")
    return architecture


def write_gguf(model_folder: ModelFolder, path: Path, *, requested: GgufType | None, name: str) -> Vocabulary:
    """Write the model and its tokenizer as the GGUF file `path`, one weight in memory at a time.

    Returns the vocabulary written. requested: type of all matrices that fit it; as each is stored when None. name:
    shown by programs.

    Raises ModelError and TokenizerError for what a GGUF file cannot express, OSError when the system refuses to write.
    """
    import gguf

    architecture = refuse_unwritable(model_folder.config)
    vocabulary = gguf_vocabulary(model_folder.tokenizer, model_folder.rows)
    main_type = requested or _stored_type(model_folder)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, architecture.name)
    gguf_names = _gguf_names(model_folder, architecture)
    types = types_of(model_folder, main_type)
    _add_shape(writer, model_folder.config, name)
    writer.add_file_type(main_type.file_type)
    if main_type.is_quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, vocabulary, model_folder)
    for weight in model_folder.names:
        shape = model_folder.weights.shape(weight)
        kind = types[weight]
        # The numpy type decides nothing beside a `raw_dtype`, unless it is uint8: then the shape would be one in bytes.
        raw_dtype = gguf.GGMLQuantizationType[kind.name]
        writer.add_tensor_info(gguf_names[weight], shape, np.dtype(np.float32), kind.size(shape), raw_dtype=raw_dtype)
    try:
        # Header and sizes first, then one weight at a time: the file never has to fit into memory.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in model_folder.names:
            tensor = model_folder.rounded(weight, types[weight].torch_dtype)
            if architecture.splits_pairs and weight.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = split_pairs(tensor, _heads_of(weight, model_folder.config))
            writer.write_tensor_data(types[weight].encode(tensor))
    finally:
        writer.close()
    return vocabulary


def split_pairs(weight: Tensor, heads: int) -> Tensor:
    """Put the rows of a query or key matrix [H D, I] in llama.cpp's order: 0, D/2, 1, D/2 + 1, ... within each head.

    Both orders rotate the same pairs of entries (rotary positions, Su et al. 2021, arXiv:2104.09864).

    >>> import torch
    >>> split_pairs(torch.arange(8).unsqueeze(1), heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _heads_of(weight: str, config: PreTrainedConfig) -> int:
    return int(config.num_attention_heads if weight.endswith("q_proj.weight") else config.num_key_value_heads)


def types_of(model_folder: ModelFolder, requested: GgufType) -> dict[str, GgufType]:
    """Return the type that each weight is written in."""
    return {weight: gguf_type_of(model_folder.weights.shape(weight), requested) for weight in model_folder.names}


def _stored_type(model_folder: ModelFolder) -> GgufType:
    matrices = [weight for weight in model_folder.names if len(model_folder.weights.shape(weight)) > 1]
    stored = {model_folder.dtype(weight, None) for weight in matrices}
    plain = [kind for kind in GGUF_TYPES.values() if {kind.torch_dtype} == stored and not kind.is_quantized]
    if not plain:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
        raise ModelError(
            f"the weights are stored as {kinds}", where="--format gguf", fix="say which type to write, with --type"
        )
    return plain[0]


def _gguf_names(model_folder: ModelFolder, architecture: GgufArchitecture) -> dict[str, str]:
    """Return name in the model -> name in the file. Raises ModelError for a weight without one."""
    import gguf

    # The package names architectures by number.
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, model_folder.config.num_hidden_layers)
    gguf_names = {weight: names.get_name(weight, try_suffixes=(".weight", ".bias")) for weight in model_folder.names}
    unknown = [weight for weight, name in gguf_names.items() if name is None]
    if unknown:
        raise _refused(f"llama.cpp has no place for the weight `{unknown[0]}`")
    return {weight: str(name) for weight, name in gguf_names.items()}


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig, name: str) -> None:
    width = _head_width(config)
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, model_folder: ModelFolder) -> None:
    """Add the tokenizer, the special ids and the chat template."""
    tokenizer = model_folder.tokenizer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    # llama.cpp stops at both, so an answer ends though the template closes turns with another token than EOS.
    end_of_turn = next((token for token in model_folder.stop_token_ids if token != tokenizer.eos_token_id), None)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, end_of_turn),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    template = tokenizer.chat_template
    if template:
        named = template.items() if isinstance(template, dict) else ()
        writer.add_chat_template([{"name": name, "template": text} for name, text in named] if named else template)


def _head_width(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _common_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        yield f"rotary positions of type `{rope['rope_type']}` (as this writes them)"
    if config.hidden_act != "silu":
        yield f"a feed-forward activated by `{config.hidden_act}` in this architecture"
    if getattr(config, "mlp_bias", False):
        yield "biases in the feed-forward"


def _no_attention_bias(config: PreTrainedConfig) -> Iterator[str]:
    if getattr(config, "attention_bias", False):
        yield "biases in the attention"


def _no_window(config: PreTrainedConfig) -> Iterator[str]:
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        yield "a sliding window of attention"


def _qwen3_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    yield from _no_attention_bias(config)
    yield from _no_window(config)
    if _head_width(config) != 128:
        yield f"heads of a width of {_head_width(config)} that transformers could check (it reads 128 from a file)"


def _refused(problem: str) -> ModelError:
    return ModelError(problem, where="--format gguf", fix="export as safetensors, which keeps every model")


ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", True, _no_attention_bias),
    "mistral": GgufArchitecture("llama", True, _no_window),
    "qwen2": GgufArchitecture("qwen2", False, _no_window),
    "qwen3": GgufArchitecture("qwen3", False, _qwen3_obstacles),
}
