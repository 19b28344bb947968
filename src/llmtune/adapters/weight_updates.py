"""List the changes an adapter makes to the weights of its base, as peft resolves them.

peft is put around a model on the meta device, which holds no numbers, so every pattern, rank and scale is resolved by
the code that resolved it in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.attach import wrap_with_peft
from llmtune.adapters.config_file import read_adapter_config
from llmtune.errors import AdapterError, Problem
from llmtune.models.read_config import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora.layer import Embedding, Linear
    from transformers import PreTrainedModel

__all__ = ["WeightUpdate", "find_weight_updates"]

_PREFIX = "base_model.model."
"""Put by peft before every name of the model it wraps."""

_Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor in the adapter's file -> its shape."""


@dataclass(frozen=True)
class WeightUpdate:
    """How one weight of the base becomes one of the tuned model."""

    weight: str
    """Name of the weight in the base model's state dict."""

    kind: Literal["low_rank", "bias", "rows", "replace"]
    """`low_rank`: W + scaling * B A, each row scaled to the length m when DoRA; `bias`: b + scaling * b'; `rows`: some
    rows replaced; `replace`: the weight replaced.
    """

    tensors: Mapping[str, str]
    """Role (`A`, `B`, `magnitude`, or `value`) -> name of the tensor in the adapter's file."""

    scaling: float = 1.0

    is_transposed: bool = False
    """The weight is stored as [in, out] (GPT-2's Conv1D, an embedding), while B A is [out, in]."""

    rows: tuple[int, ...] = ()
    """Rows that `rows` replaces, in the order of its value."""


def find_weight_updates(meta_model: PreTrainedModel, folder: Path, shapes: _Shapes) -> list[WeightUpdate]:
    """Return every update the adapter in `folder` makes to a base of this architecture.

    meta_model: the base's model class on the meta device; it is wrapped and must not be used afterwards. shapes: shape
    of every tensor in the adapter's file.

    Raises AdapterError for an adapter that does not fit the base, or that cannot be merged.
    """
    adapted = wrap_with_peft(
        meta_model,
        read_adapter_config(folder),
        model_word="base",
        where="--base",
        fix="use the base it was trained on",
    )
    _check_shapes(adapted, shapes, str(folder))
    updates = [
        update for name, module in adapted.named_modules() for update in _updates_of(name, module, shapes, str(folder))
    ]
    # A tensor that is merged nowhere would be lost from the result without a word.
    unused = sorted(shapes.keys() - {tensor for update in updates for tensor in update.tensors.values()})
    if unused:
        raise AdapterError(
            f"the adapter's tensor `{unused[0]}` cannot be merged into a weight",
            where=str(folder),
            fix="use it as an adapter",
        )
    return updates


def _check_shapes(adapted: PeftModel, shapes: _Shapes, where: str) -> None:
    from peft import get_peft_model_state_dict

    with quiet_libraries():
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    fix = "use the base model this adapter was trained on"
    problems = [
        Problem(f"the adapter has no tensor `{name}`, which this base needs", where, fix)
        for name in sorted(expected.keys() - shapes.keys())
    ]
    problems += [
        Problem(f"the adapter's tensor `{name}` has no place in this base", where, fix)
        for name in sorted(shapes.keys() - expected.keys())
    ]
    problems += [
        Problem(f"`{name}` has shape {shapes[name]}, and this base needs {expected[name]}", where, fix)
        for name in sorted(expected.keys() & shapes.keys())
        if shapes[name] != expected[name]
    ]
    if problems:
        raise AdapterError.all(problems[:6])


def _updates_of(full_name: str, module: nn.Module, shapes: _Shapes, where: str) -> Iterator[WeightUpdate]:
    """Yield the updates that one of peft's modules makes to the weights it wraps."""
    from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    name = full_name.removeprefix(_PREFIX)
    if isinstance(module, TrainableTokensWrapper):
        rows = tuple(int(row) for row in module.token_adapter.token_indices["default"])
        value = f"{full_name}.token_adapter.trainable_tokens_delta"
        if value in shapes:  # a tied head follows its embedding and has no tensor of its own
            yield WeightUpdate(f"{name}.weight", "rows", {"value": value}, rows=rows)
    elif isinstance(module, ModulesToSaveWrapper):
        for parameter, _ in module.modules_to_save["default"].named_parameters():
            yield WeightUpdate(f"{name}.{parameter}", "replace", {"value": f"{full_name}.{parameter}"})
    elif isinstance(module, (Linear, Embedding)):
        yield from _low_rank(name, full_name, module, shapes, where)
    elif isinstance(module, LoraLayer):
        raise AdapterError(
            f"`{name}` is a {type(module).__name__} layer, which cannot be merged here",
            where=where,
            fix="use it as an adapter",
        )


def _low_rank(
    name: str, full_name: str, module: Linear | Embedding, shapes: _Shapes, where: str
) -> Iterator[WeightUpdate]:
    base = module.get_base_layer()
    is_embedding = isinstance(base, nn.Embedding)
    ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    tensors = {"A": f"{full_name}.{ends[0]}", "B": f"{full_name}.{ends[1]}"}
    magnitude = f"{full_name}.lora_magnitude_vector"
    if magnitude in shapes:
        tensors["magnitude"] = magnitude
    scaling = float(module.scaling["default"])
    yield WeightUpdate(
        f"{name}.weight", "low_rank", tensors, scaling, is_transposed=isinstance(base, (nn.Embedding, Conv1D))
    )
    if (bias := f"{full_name}.lora_B.bias") in shapes:
        if getattr(base, "bias", None) is None:
            raise AdapterError(
                f"the adapter trains a bias of `{name}`, which has none to merge it into",
                where=where,
                fix="use it as an adapter",
            )
        yield WeightUpdate(f"{name}.bias", "bias", {"value": bias}, scaling)
