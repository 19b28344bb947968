"""A model's trained parameters, their number, the model inside peft's wrapper, evaluation mode (N12), and dropout."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llmtune.common.decisions import Decision
from llmtune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "SCORE_HEADS",
    "alternatives",
    "base_model_of",
    "checkpointable_blocks",
    "count_parameters",
    "eval_mode",
    "find_score_head",
    "freeze_all_but",
    "near_pattern",
    "switch_off_dropout",
    "trained_parameters",
]

SCORE_HEADS = ("score", "classifier")
"""Names in transformers' models of the layer that gives scores, and those that peft saves whole for `SEQ_CLS`."""

DROPOUT_RATES = ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "dropout_p", "drop")
"""Attributes in which modules of transformers hold a rate as a number, beside modules of torch."""


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", model) if get_base_model is None else get_base_model()


def checkpointable_blocks(module: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the decoder blocks inside a module, in order: those that transformers can recompute one by one."""
    return [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]


def find_score_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the head of a model that gives scores (peft's wrapper of it, where it has one); None of any other."""
    if model.get_output_embeddings() is not None:
        return None
    return next((head for name in SCORE_HEADS if (head := getattr(model, name, None)) is not None), None)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def freeze_all_but(model: nn.Module, patterns: Sequence[str]) -> Decision:
    """Freeze every parameter whose full name none of the `patterns` matches, and return that choice.

    A pattern is a regular expression over the full name (`model.layers.2[0-9].*`). Raises ConfigError for one that
    matches no parameter.
    """
    # Tied weights under all of their names: a pattern may know the head and not the embedding.
    named = list(model.named_parameters(remove_duplicate=False))
    names = [name for name, _ in named]
    kept: set[int] = set()
    problems = []
    for pattern in patterns:
        try:
            kept |= {id(parameter) for name, parameter in named if re.fullmatch(pattern, name)}
            lost = next(
                (part for part in alternatives(pattern) if not any(re.fullmatch(part, name) for name in names)), None
            )
            part_of = "" if lost == pattern else f", a part of `{pattern}`,"
            problem = None if lost is None else f"`{lost}`{part_of} matches no parameter"
        except re.error as error:
            problem = f"`{pattern}` is no regular expression: {error}"
        if problem is not None:
            fix = near_pattern("model.train_only", pattern, names)
            fix = (
                f"did you mean {fix}?"
                if fix
                else f"a full name is `{names[len(names) // 2]}`: a pattern matches the whole of it"
            )
            problems.append(Problem(problem, "model.train_only", fix))
    if problems:
        raise ConfigError.all(problems)
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in kept)
    trained = trained_parameters(model)
    entries, total = sum(map(_entries, trained.values())), count_parameters(model)
    reason = f"{entries:,} of {total:,} parameters are trained ({entries / total:.2%})"
    return Decision("model.train_only", f"{len(trained)} tensors", reason)


def near_pattern(key: str, written: str, names: Sequence[str]) -> str:
    """The setting of `key` with the regular expression that was surely meant by one that matches no full name.

    Tried are the text as it is, a glob's `*` as `.*`, and both with anything before and behind. Empty where none of
    them matches one of `names`.

    >>> near_pattern("k", "(q|v)_proj", ["layers.0.q_proj", "layers.0.v_proj"])
    "'k=.*(q|v)_proj'"
    >>> near_pattern("k", "q_proj|v_proj", ["layers.0.q_proj", "layers.0.v_proj"])
    "'k=.*q_proj|.*v_proj'"
    """
    # A list of names is no pattern: an ending alone would match far too much.
    for pattern in (written, re.sub(r"(?<![.\])])\*", ".*", written)):
        parts = alternatives(pattern)
        fronted = [part if part.startswith(".*") else f".*{part}" for part in parts]
        both = [part if part.endswith(".*") else f"{part}.*" for part in fronted]
        for around in map("|".join, (parts, fronted, both)):
            try:
                if all(any(re.fullmatch(each, name) for name in names) for each in alternatives(around)):
                    return f"'{key}={around}'"
            except re.error:
                break
    return ""


def alternatives(pattern: str) -> list[str]:
    """The parts of a regular expression between the `|` that stand outside of all brackets.

    >>> alternatives(".*(q|v)_proj|[|]k"), alternatives("q_proj")
    (['.*(q|v)_proj', '[|]k'], ['q_proj'])
    """
    marks = [mark for mark in re.finditer(r"\\.|\[\^?\]?[^\]]*\]|[()|]", pattern) if mark[0] in "()|"]
    depths = itertools.accumulate({"(": 1, ")": -1}.get(mark[0], 0) for mark in marks)
    bars = [mark.start() for mark, depth in zip(marks, depths, strict=True) if mark[0] == "|" and depth == 0]
    return [pattern[start + 1 : stop] for start, stop in itertools.pairwise([-1, *bars, len(pattern)])]


def count_parameters(model: nn.Module) -> int:
    """Return the number of entries of all parameters, tied ones once; a packed 4-bit weight counts its entries."""
    return sum(_entries(parameter) for parameter in model.parameters())


def _entries(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # set by bitsandbytes on a 4-bit weight
    return int(math.prod(state.shape)) if state is not None else parameter.numel()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients; restore every module's mode and torch's random state after."""
    # Module by module, because a frozen part may be in evaluation mode while its parent trains.
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def switch_off_dropout(model: nn.Module) -> int:
    """Set every rate of dropout in the model to 0, for good; returns how many were above 0.

    Its modules stay in training mode, which recomputation of blocks asks for.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            changed += module.p > 0
            module.p = 0.0
        for name in DROPOUT_RATES:
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                changed += 1
    return changed
