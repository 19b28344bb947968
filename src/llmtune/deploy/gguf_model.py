"""Write a model as one GGUF file, which llama.cpp and the programs built on it run.

Each architecture is a row of `ARCHITECTURES` (`gguf_architectures.py`). Names of tensors come from the gguf package.
Vectors are written in float32, as llama.cpp requires; matrices in the requested type where their rows fit it.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtune.deploy.gguf_architectures import gguf_name_map, refuse_unwritable, refused
from llmtune.deploy.gguf_types import GGUF_TYPES, GgufType, gguf_type_of
from llmtune.deploy.gguf_vocabulary import Vocabulary, gguf_vocabulary
from llmtune.deploy.model_folder import ModelFolder
from llmtune.errors import ModelError
from llmtune.models.gguf import read_gguf, read_gguf_tokenizer
from llmtune.models.read_config import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer

__all__ = ["Place", "places_of", "read_back", "write_gguf"]


def write_gguf(model_folder: ModelFolder, path: Path, *, requested: GgufType | None, name: str) -> Vocabulary:
    """Write the model and its tokenizer as the GGUF file `path`, one weight in memory at a time.

    Returns the vocabulary written. requested: type of all matrices that fit it; as each is stored when None. name:
    shown by programs.

    Raises ModelError and TokenizerError for what a GGUF file cannot express, OSError when the system refuses to write.
    """
    architecture = refuse_unwritable(model_folder.config)
    vocabulary = gguf_vocabulary(model_folder.tokenizer, model_folder.rows)
    main_type = requested or _stored_type(model_folder)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, architecture.name)
    # llama.cpp expects other tokens of a file whose name says Phi-3, and does not load one that lacks them.
    writer.add_name("model" if re.search(r"phi-?3", name, re.IGNORECASE) else name)
    writer.add_vocab_size(model_folder.rows)
    for method, value in architecture.keys(model_folder.config):
        getattr(writer, method)(value)
    writer.add_file_type(main_type.file_type)
    if main_type.is_quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, vocabulary, model_folder)
    places = places_of(model_folder, main_type)
    settings = [(name, np.array(numbers, np.float32)) for name, numbers in architecture.tensors(model_folder.config)]
    for name, numbers in settings:
        writer.add_tensor_info(name, numbers.shape, numbers.dtype, numbers.nbytes)
    for place in places.values():
        # The numpy type decides nothing beside a `raw_dtype`, unless it is uint8: then the shape would be one in bytes.
        raw_dtype, size = gguf.GGMLQuantizationType[place.kind.name], place.kind.size(place.shape)
        writer.add_tensor_info(place.name, place.shape, np.dtype(np.float32), size, raw_dtype=raw_dtype)
    try:
        # Header and sizes first, then one weight at a time: the file never has to fit into memory.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, numbers in settings:
            writer.write_tensor_data(numbers)
        for weight, place in places.items():
            tensor = model_folder.rounded(weight, place.kind.torch_dtype)
            writer.write_tensor_data(place.kind.encode(place.write(tensor)))
    finally:
        writer.close()
    return vocabulary


class Place(NamedTuple):
    """Where and how a weight stands in the file."""

    name: str
    shape: tuple[int, ...]
    kind: GgufType
    write: Callable[[Tensor], Tensor]
    """The weight in the file's order."""
    read: Callable[[Tensor], Tensor]
    """The weight in the model's order again."""

    def round(self, weight: Tensor) -> Tensor:
        """Return the numbers that a program reads for this weight, of any shape.

        rounded = read(kind.round(write(weight))): written in the file's order, rounded there, and put back.
        """
        return self.read(self.kind.round(self.write(weight)))


def places_of(model_folder: ModelFolder, requested: GgufType) -> dict[str, Place]:
    """Return the place of each weight. Raises ModelError for a weight that llama.cpp has none for."""
    architecture, config = refuse_unwritable(model_folder.config), model_folder.config
    places = {}
    for weight, name in _gguf_names(model_folder).items():
        write = functools.partial(architecture.layout.write, weight, config)
        read = functools.partial(architecture.layout.read, weight, config)
        shape = tuple(write(torch.empty(model_folder.weights.shape(weight), device="meta")).shape)
        # llama.cpp adds positions up as they are, without decoding them.
        kind = GGUF_TYPES["f32"] if name == "position_embd.weight" else gguf_type_of(shape, requested)
        places[weight] = Place(name, shape, kind, write, read)
    return places


def read_back(path: Path, model_folder: ModelFolder, empty_folder: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Return (model in float32, tokenizer) as they stand in the file.

    The model is read by transformers where it reads all of it. Else its weights are read by the names and into the
    shapes they were written from, so that the numbers are checked, and not the keys.

    empty_folder: see `read_gguf`. Raises ModelError when the file cannot be read as a model.
    """
    if refuse_unwritable(model_folder.config).reads_back:
        return read_gguf(path, empty_folder)
    tokenizer = read_gguf_tokenizer(path, empty_folder)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with quiet_libraries():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_folder.config, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight, place in places_of(model_folder, GGUF_TYPES["f32"]).items():
            tensor = stored[place.name]
            values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            parameters[weight].copy_(place.read(torch.from_numpy(values).reshape(place.shape)))
    return model, tokenizer


def _stored_type(model_folder: ModelFolder) -> GgufType:
    matrices = [weight for weight in model_folder.names if len(model_folder.weights.shape(weight)) > 1]
    stored = {model_folder.dtype(weight, None) for weight in matrices}
    plain = [kind for kind in GGUF_TYPES.values() if {kind.torch_dtype} == stored and not kind.is_quantized]
    if not plain:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
        raise ModelError(
            f"the weights are stored as {kinds}", where="--to gguf", fix="say which type to write, with --type"
        )
    return plain[0]


def _gguf_names(model_folder: ModelFolder) -> dict[str, str]:
    """Return name in the model -> name in the file. Raises ModelError for a weight without one."""
    names = gguf_name_map(model_folder.config)
    gguf_names = {weight: names.get_name(weight, try_suffixes=(".weight", ".bias")) for weight in model_folder.names}
    unknown = [weight for weight, name in gguf_names.items() if name is None]
    if unknown:
        raise refused(f"llama.cpp has no place for the weight `{unknown[0]}`")
    return {weight: str(name) for weight, name in gguf_names.items()}


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, model_folder: ModelFolder) -> None:
    """Add the tokenizer, the special ids and the chat template."""
    tokenizer = model_folder.tokenizer
    writer.add_tokenizer_model("gpt2" if vocabulary.pre else "llama")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.leads_with_space)
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
