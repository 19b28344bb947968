"""Load an adapter from its folder: the config is read against an allow-list, tensors must fit exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from llmtune.adapters.attach import wrap_with_peft
from llmtune.adapters.config_file import WEIGHTS_FILE, read_adapter_config, read_base_record
from llmtune.adapters.write import adapter_state_and_config
from llmtune.errors import AdapterError, ModelError, Problem
from llmtune.models.parameters import SCORE_HEADS
from llmtune.models.read_config import quiet_libraries
from llmtune.models.weights import inspect_weights, refuse_changed_weights

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["copy_tensors", "load_adapter", "load_adapter_weights", "read_adapter_tensors", "refuse_other_base"]


def load_adapter(base_model: PreTrainedModel, folder: Path, *, base_digest: str | None = None) -> PeftModel:
    """Put the adapter in `folder` on a base model, and return the peft model in evaluation mode.

    base_digest: digest of this base; an adapter that records another one is refused.

    Raises AdapterError for a config with unknown or unsafe keys, for another base, and for tensors that are missing,
    unexpected, of another shape, not finite or stored in another format than safetensors.
    """
    options = read_adapter_config(folder)
    if base_digest:
        refuse_other_base(folder, base_digest)
    tensors = read_adapter_tensors(folder)
    adapted = wrap_with_peft(base_model, {**options, "inference_mode": True})
    copy_tensors(adapted, tensors, str(folder))
    adapted.eval()
    return adapted


def refuse_other_base(folder: Path, base_digest: str) -> None:
    """Raise AdapterError for an adapter that records another base than the one with this digest."""
    recorded = read_base_record(folder).get("base_digest")
    if recorded and recorded != base_digest:
        own = read_adapter_config(folder).get("base_model_name_or_path") or "unknown"
        digests = f"(digest {str(recorded)[:12]}..., here {base_digest[:12]}...)"
        raise AdapterError(
            "this adapter was trained on other weights than this base has",
            where=str(folder),
            fix=f"use its own base, `{own}` {digests}",
        )


def load_adapter_weights(model: PeftModel, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Put the adapter weights saved in `folder` into a model that `attach_adapter` made, bit for bit.

    tensors: A [r, in], B [out, r] and others by name, where they were read and checked before. Raises AdapterError when
    names or shapes are not exactly those of this adapter.
    """
    copy_tensors(model, read_adapter_tensors(folder) if tensors is None else dict(tensors), str(folder))


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of `adapter_model.safetensors` by name (A [r, in], B [out, r], ...), checked to be finite.

    The format is peft's: https://huggingface.co/docs/peft/developer_guides/checkpoint

    Raises AdapterError when the file is missing (also where there is only a `.bin`), damaged or changed since it was
    written, or has values that are not finite.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            problem = "is only there as adapter_model.bin, a format that can run code when it is opened"
            fix = "load it once with peft in a place you trust and save it with safe_serialization=True"
        else:
            problem, fix = "has no adapter_model.safetensors", "name an adapter's folder"
        raise AdapterError(f"the adapter in {folder} {problem}", where=str(folder), fix=fix)
    try:
        refuse_changed_weights(folder)
        inspect_weights([path])
    except ModelError as error:
        raise AdapterError.all(error.problems) from error
    return load_file(path)


def copy_tensors(
    adapted: PeftModel, tensors: Mapping[str, torch.Tensor], where: str, *, new_head: bool = False
) -> None:
    """Copy the file's tensors into the adapter. Raises AdapterError unless names and shapes are the adapter's.

    new_head: a head of scores that the file lacks stays as it is.
    """
    from peft import set_peft_model_state_dict

    expected, _ = adapter_state_and_config(adapted)
    if new_head and not any(_is_of_head(name) for name in tensors):
        tensors = {**{name: tensor for name, tensor in expected.items() if _is_of_head(name)}, **tensors}
    problems = [
        Problem(f"the adapter lacks the tensor `{name}`", where)
        for name in sorted(expected.keys() - tensors.keys())[:3]
    ]
    problems += [
        Problem(f"the adapter has a tensor `{name}` that has no place here", where)
        for name in sorted(tensors.keys() - expected.keys())[:3]
    ]
    problems += [
        Problem(f"`{name}` has shape {tuple(tensors[name].shape)}, and {tuple(expected[name].shape)} fits here", where)
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ][:3]
    if problems:
        fix = "use the base model this adapter was made for"
        raise AdapterError.all(problem._replace(fix=fix) for problem in problems)
    with quiet_libraries():
        set_peft_model_state_dict(adapted, dict(tensors))


def _is_of_head(name: str) -> bool:
    return name.split(".")[-2] in SCORE_HEADS
