"""Write a model with its tokenizer, chat template and generation settings in the formats of transformers.

Every function writes into a staging folder that the caller commits (see `durable.commit_folder`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtune import durable
from llmtune.errors import CheckpointError, Problem
from llmtune.models.parameters import trained_parameters
from llmtune.models.quiet_libraries import translate_save_errors
from llmtune.models.scan import read_json_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "MAX_SHARD_BYTES",
    "restore_weights",
    "write_generation_config",
    "write_model",
    "write_tokenizer",
]

MAX_SHARD_BYTES = 5_000_000_000
"""Largest weight file, as transformers cuts them by default; hubs and proxies refuse or drop larger ones."""


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    stop_token_ids: Sequence[int] = (),
) -> None:
    """Write a model as transformers and vLLM read it: config, safetensors, tokenizer, generation config.

    state: the model's tensors by name, in their full shapes, where they were gathered already. stop_token_ids: all
    tokens that end an answer. Raises MachineError when the system refuses to write.
    """
    before = model.config.dtype
    with translate_save_errors(folder):
        model.save_pretrained(
            str(folder), state_dict=model.state_dict() if state is None else dict(state), max_shard_size=MAX_SHARD_BYTES
        )
    model.config.dtype = before  # save_pretrained replaces it by its name; saving must change nothing (N12)
    write_generation_config(model, tokenizer, stop_token_ids, folder)
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer and its chat template as `AutoTokenizer.from_pretrained` reads them.

    Raises MachineError when the system refuses to write.
    """
    with translate_save_errors(folder):
        tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    # How the tokenizer was opened, a path of this machine among it, is no part of it.
    traces = ("is_local", "local_files_only", "name_or_path")
    durable.write_json(path, {key: value for key, value in read_json_file(path).items() if key not in traces})


def restore_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put trained weights back, bit for bit.

    tensors: by parameter name. Raises CheckpointError unless names, shapes and types are exactly those of the model's
    trained weights.
    """
    parameters = trained_parameters(model)
    problems = [
        Problem(f"the weight `{name}` is missing in the checkpoint")
        for name in sorted(parameters.keys() - tensors.keys())[:3]
    ]
    problems += [
        Problem(f"the checkpoint has a weight `{name}` that is not trained here")
        for name in sorted(tensors.keys() - parameters.keys())[:3]
    ]
    for name in sorted(parameters.keys() & tensors.keys()):
        parameter, saved = parameters[name], tensors[name]
        if parameter.shape != saved.shape or parameter.dtype != saved.dtype:
            stored = f"{saved.dtype} {tuple(saved.shape)} in the checkpoint"
            problems.append(Problem(f"`{name}` is {stored}, {parameter.dtype} {tuple(parameter.shape)} here"))
    if problems:
        raise CheckpointError.all(
            problem._replace(fix="resume with the config the run was started with") for problem in problems[:6]
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def write_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop_token_ids: Sequence[int], folder: Path
) -> None:
    """Write generation_config.json with every token that ends an answer, so that other programs stop there too."""
    generation = copy.deepcopy(model.generation_config)
    published = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    candidates = (*stop_token_ids, *published, tokenizer.eos_token_id)
    ids = list(dict.fromkeys(token for token in candidates if token is not None))
    generation.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else generation.bos_token_id
    durable.write_text(folder / "generation_config.json", generation.to_json_string())
