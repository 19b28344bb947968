"""Write what a user takes away: a model or an adapter with its tokenizer, chat template, generation settings and model
card.

Everything is written into a staging folder that the caller commits (see `durable.commit_folder`), in formats of
transformers and peft.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import durable
from llmtune.models.parameters import trained_parameters
from llmtune.models.quiet_libraries import translate_save_errors
from llmtune.models.scan import read_json_file

if TYPE_CHECKING:
    import torch

__all__ = ["restore_weights", "write_generation_config", "write_model", "write_tokenizer", "write_weights"]

MAX_SHARD_BYTES = 5_000_000_000


def write_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    stop_token_ids: Sequence[int] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a full model as transformers and vLLM read it: config, safetensors (in shards), tokenizer, generation
    config.

    dtype: type the weights are rounded to, once; as they are when None. stop_token_ids: every token that ends an
    answer. Raises MachineError when the disk refuses.
    """
    state = _rounded(model.state_dict(), dtype)
    before = model.config.dtype
    with translate_save_errors(folder):
        model.save_pretrained(str(folder), state_dict=state, max_shard_size=max_shard_bytes)
    model.config.dtype = before  # the library leaves its name there instead; writing changes nothing (N12)
    write_generation_config(model, tokenizer, stop_token_ids, folder)
    if dtype is not None:  # the library writes the type of the model at hand
        config = read_json_file(folder / "config.json")
        durable.write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer and its chat template as `AutoTokenizer.from_pretrained` reads them.

    Traces of how it was opened are left out.
    """
    with translate_save_errors(folder):
        tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = {
        key: value
        for key, value in read_json_file(path).items()
        if key not in ("is_local", "local_files_only", "name_or_path")
    }
    durable.write_json(path, config)


def write_weights(model: Any, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write the trained weights of a run, bit for bit, by parameter name: what a checkpoint needs beside the base it
    started from.
    """
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(model).items()}
    durable.write_tensors(path, tensors, dict(metadata or {}))


def restore_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put trained weights back, bit for bit.

    Names, shapes and types must be exactly those of this model's trained weights.

    Raises CheckpointError otherwise.
    """
    import torch

    from llmtune.errors import CheckpointError, Problem

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
        here, there = parameters[name], tensors[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            problems.append(
                Problem(
                    f"`{name}` is {there.dtype} {tuple(there.shape)} in the checkpoint, {here.dtype} {tuple(here.shape)} here"
                )
            )
    if problems:
        raise CheckpointError.all(
            problem._replace(fix="resume with the config the run was started with") for problem in problems[:6]
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _rounded(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors in `dtype`; tensors that were one in memory (a tied head) stay one, so that they are written once."""
    if dtype is None:
        return dict(state)
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in state.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: done[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def write_generation_config(model: Any, tokenizer: Any, stop_token_ids: Sequence[int], folder: Path) -> None:
    """Say in generation_config.json where an answer ends, so that every program that loads the folder stops there."""
    generation = copy.deepcopy(model.generation_config)
    known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ids = list(dict.fromkeys(one for one in (*stop_token_ids, *known, tokenizer.eos_token_id) if one is not None))
    generation.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else generation.bos_token_id
    durable.write_text(folder / "generation_config.json", generation.to_json_string())
