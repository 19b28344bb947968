"""Resolve which layers of a model get an adapter: `adapter.target_modules` and `adapter.modules_to_save`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.errors import AdapterError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_modules_to_save", "ends_with", "is_target", "resolve_target_modules", "targets_are_transposed"]

_OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal_projector|multimodal)")
"""Parts of a multimodal model beside its language model."""


def resolve_target_modules(model: PreTrainedModel, requested: str | Sequence[str]) -> list[str] | str:
    """Return the layers that get an adapter: a sorted list of name endings, or the regular expression as given.

    requested: `all-linear`, a list of name endings, or one regular expression over full names, as peft takes them.
    Raises AdapterError for names that match no layer, with the nearest.
    """
    linear = list(_linear_names(model))
    names = [name for name, _ in model.named_modules()]
    if requested == "all-linear":
        endings = sorted({_last_part(name) for name in linear})
        matched = {name for name in names if _last_part(name) in endings}
        # Endings are what a reader of adapter_config.json expects; full names where they would match other layers too.
        return endings if matched == set(linear) else sorted(linear)
    if isinstance(requested, str):
        return _checked_pattern(requested, names, linear)
    endings = sorted(requested)
    problems = [_no_match(ending, linear) for ending in endings if not any(ends_with(name, ending) for name in names)]
    if problems or not endings:
        raise AdapterError.all(problems or [Problem("the list is empty", "adapter.target_modules", "use all-linear")])
    return endings


def check_modules_to_save(model: PreTrainedModel, requested: Sequence[str]) -> None:
    """Raise AdapterError for each of `adapter.modules_to_save` that no module is called, with the nearest names."""
    names = [name for name, _ in model.named_modules() if name]
    problems = []
    for ending in requested:
        if not any(ends_with(name, ending) for name in names):
            near = get_close_matches(ending, sorted({_last_part(name) for name in names}), n=2, cutoff=0.4)
            fix = (
                f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
                if near
                else "name a module of this model, for example lm_head"
            )
            problems.append(Problem(f"no module is called `{ending}`", "adapter.modules_to_save", fix))
    if problems:
        raise AdapterError.all(problems)


def targets_are_transposed(model: PreTrainedModel, targets: list[str] | str) -> bool:
    """Return whether the targeted layers store their weight as [in, out] (GPT-2's Conv1D), which peft must be told."""
    # peft has one setting for all layers, so it is set only where all of them are of that kind.
    kinds = {isinstance(module, Conv1D) for name, module in model.named_modules() if name and is_target(name, targets)}
    return kinds == {True}


def is_target(name: str, targets: list[str] | str) -> bool:
    """Return whether peft puts an adapter on the module of that full name: a list holds endings, a text a pattern."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return any(ends_with(name, ending) for ending in targets)


def ends_with(name: str, ending: str) -> bool:
    """Return whether the last parts of a module's dotted name are `ending`.

    >>> ends_with("model.layers.0.mlp.up_proj", "mlp.up_proj"), ends_with("model.backup_proj", "up_proj")
    (True, False)
    """
    return name == ending or name.endswith(f".{ending}")


def _checked_pattern(requested: str, names: Sequence[str], linear: Sequence[str]) -> str:
    try:
        pattern = re.compile(requested)
    except re.error as error:
        raise AdapterError(
            f"`{requested}` is no regular expression: {error}",
            where="adapter.target_modules",
            fix="or give a list of names",
        ) from error
    if any(pattern.fullmatch(name) for name in names):
        return requested
    # The usual slip: a list of one name written as that name.
    if any(ends_with(name, requested) for name in names):
        fix = (
            "a single string is a regular expression over full names; "
            f"write a list: adapter.target_modules=[{requested}]"
        )
        raise AdapterError(f"no full name matches `{requested}`", where="adapter.target_modules", fix=fix)
    raise AdapterError.all([_no_match(requested, linear)])


def _no_match(requested: str, linear: Sequence[str]) -> Problem:
    endings = sorted({_last_part(name) for name in linear})
    near = get_close_matches(_last_part(requested), endings, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'`{ending}`' for ending in near)}? " if near else ""
    return Problem(
        f"no layer is called `{requested}`",
        "adapter.target_modules",
        f"{hint}this model has {', '.join(endings)}; or use all-linear",
    )


def _linear_names(model: PreTrainedModel) -> Iterator[str]:
    """Yield the full names of the language model's linear layers; output head and other towers are left out."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not _OTHER_TOWERS.search(name):
            yield name


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]
