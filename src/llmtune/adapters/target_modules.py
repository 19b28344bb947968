"""Resolve which layers of a model get an adapter: `target_modules`, `exclude_modules`, `layers`, `modules_to_save`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.config_file import LoraOptions
from llmtune.config.schema import AdapterConfig
from llmtune.errors import AdapterError, Problem
from llmtune.models.parameters import alternatives, find_score_head, near_pattern
from llmtune.models.quantization import import_bitsandbytes_before_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "adapted_layers",
    "block_of",
    "check_modules_to_save",
    "check_pattern",
    "chosen_layers",
    "ends_with",
    "resolve_target_modules",
    "targets_are_transposed",
]

_MARKS = re.compile(r"[*+?()\[\]|\\^$]")
"""Characters of regular expressions that no module's name has."""

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
    if "all-linear" in endings:
        others = [ending for ending in endings if ending != "all-linear"]
        together = ",".join(dict.fromkeys([*map(_last_part, linear), *others]))
        fix = f"name the layers: adapter.target_modules=[{together}]" if others else "write it without brackets"
        raise AdapterError("`all-linear` stands alone, not in a list", where="adapter.target_modules", fix=fix)
    problems = [_no_match(ending, linear) for ending in endings if not any(ends_with(name, ending) for name in names)]
    if problems or not endings:
        raise AdapterError.all(problems or [Problem("the list is empty", "adapter.target_modules", "use all-linear")])
    return endings


def chosen_layers(model: PreTrainedModel, adapter_config: AdapterConfig) -> LoraOptions:
    """Return the options of peft that choose layers: targets, those left out of them, and the blocks.

    Raises AdapterError for names and patterns that match no layer, and for more blocks than the model has.
    """
    targets = resolve_target_modules(model, adapter_config.target_modules)
    options = LoraOptions(target_modules=targets, modules_to_save=list(adapter_config.modules_to_save) or None)
    before = adapted_layers(model, options)
    excluded = adapter_config.exclude_modules
    if excluded:
        options["exclude_modules"] = excluded if isinstance(excluded, str) else list(excluded)
        _check_excluded(excluded, before)
    if adapter_config.layers is not None:
        blocks = int(model.config.get_text_config().num_hidden_layers)
        if adapter_config.layers > blocks:
            fix = f"adapter.layers={blocks} or less; leave it out for all of them"
            raise AdapterError(f"the model has {blocks} blocks", where="adapter.layers", fix=fix)
        last = range(blocks - adapter_config.layers, blocks)
        if isinstance(targets, str) or not set(targets).isdisjoint(before):
            # peft takes blocks beside the ends of names only, not beside a pattern or full names.
            options["target_modules"] = [name for name in before if (place := block_of(name)) and place[0] in last]
        else:
            options["layers_to_transform"] = list(last)
    if not adapted_layers(model, options):
        problem = "no layer is left to get an adapter"
        raise AdapterError(problem, where="adapter.exclude_modules / adapter.layers", fix="leave one of them out")
    return options


def adapted_layers(model: PreTrainedModel, options: LoraOptions) -> list[str]:
    """Return the full names of the modules that get an adapter, by peft's own rules.

    Raises AdapterError where one of them is no layer with a weight.
    """
    import_bitsandbytes_before_peft()
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    config = LoraConfig(**{key: value for key, value in options.items() if key in keys})  # type: ignore[arg-type]
    matched = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    layers = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    containers = [name for name, module in matched.items() if not isinstance(module, layers)]
    if containers:
        module = matched[containers[0]]
        inside = sorted({_last_part(name) for name, part in module.named_modules() if isinstance(part, nn.Linear)})
        requested = options.get("target_modules")
        written = requested if isinstance(requested, str) else _last_part(containers[0])
        names = "|".join(inside) or "q_proj|v_proj"
        fix = (
            f"let the pattern end with names of layers, such as `.*({names})`"
            if isinstance(requested, str)
            else f"name {'the layers in it' if inside else 'layers'}: {', '.join(inside or _endings(model))}"
        )
        problem = f"`{written}` matches `{containers[0]}`, a {type(module).__name__}, which is no layer with a weight"
        raise AdapterError(problem, where="adapter.target_modules", fix=fix)
    return list(matched)


def check_pattern(key: str, pattern: Mapping[str, float], layers: Sequence[str]) -> None:
    """Raise AdapterError for each entry of `adapter.rank_pattern` or `adapter.alpha_pattern` that is 0, or no layer's.

    layers: full names of the adapted layers. An entry is the end of a name, or a regular expression for it, as in peft.
    """
    problems = []
    for entry, value in pattern.items():
        if value <= 0:
            problems.append(Problem(f"`{entry}: {value}` is not above 0", key, "give a number above 0"))
            continue
        try:
            if any(re.match(rf"(.*\.)?({entry})$", name) for name in layers):
                continue
            problem = f"no adapted layer is called `{entry}`"
        except re.error as error:
            problem = f"`{entry}` is no regular expression: {error}"
        names = ", ".join(sorted({_last_part(name) for name in layers}))
        problems.append(Problem(problem, key, f"adapted are {names}; an entry is the end of a name"))
    if problems:
        raise AdapterError.all(problems)


def _check_excluded(excluded: str | Sequence[str], layers: Sequence[str]) -> None:
    """Raise AdapterError for what leaves nothing out."""
    problems = []
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        try:
            if any(is_target(name, entry if isinstance(excluded, str) else [entry]) for name in layers):
                continue
            problem = f"no targeted layer is called `{entry}`, so it leaves nothing out"
        except re.error as error:
            problem = f"`{entry}` is no regular expression: {error}"
        names = ", ".join(sorted({_last_part(name) for name in layers}))
        fix = f"targeted are {names}; a list holds ends of names, one text is a regular expression over full names"
        problems.append(Problem(problem, "adapter.exclude_modules", fix))
    if problems:
        raise AdapterError.all(problems)


def check_modules_to_save(model: PreTrainedModel, requested: Sequence[str]) -> None:
    """Raise AdapterError for each of `adapter.modules_to_save` that no module is called, with the nearest names."""
    names = [name for name, _ in model.named_modules() if name]
    problems = []
    for ending in requested:
        if not any(ends_with(name, ending) for name in names):
            near = get_close_matches(_last_part(ending), sorted({_last_part(name) for name in names}), n=2, cutoff=0.4)
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


def block_of(name: str) -> tuple[int, str] | None:
    """Return the block of a layer and its name within it; None for one outside of the blocks.

    >>> block_of("model.layers.12.self_attn.q_proj"), block_of("lm_head")
    ((12, 'self_attn.q_proj'), None)
    """
    found = re.match(r".*?\.(\d+)\.(.*)", name)
    return (int(found[1]), found[2]) if found else None


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
            fix=_near(requested, names) or "close its brackets, or give a list of names",
        ) from error
    if any(pattern.fullmatch(name) for name in names):
        for part in alternatives(requested):
            if not any(re.fullmatch(part, name) for name in names):
                problem = f"no layer's full name matches `{part}`, a part of `{requested}`"
                fix = _near(requested, linear) or "take that part out, or let it begin with `.*`"
                raise AdapterError(problem, where="adapter.target_modules", fix=fix)
        return requested
    # The usual slip: a list of one name written as that name.
    if any(ends_with(name, requested) for name in names):
        fix = (
            "a single string is a regular expression over full names; "
            f"write a list: adapter.target_modules=[{requested}]"
        )
        raise AdapterError(f"no full name matches `{requested}`", where="adapter.target_modules", fix=fix)
    listed = re.split(r"[\s;]+", requested.strip())
    if len(listed) > 1 and all(any(ends_with(name, ending) for name in names) for ending in listed):
        fix = f"write a list: 'adapter.target_modules=[{','.join(listed)}]'"
        raise AdapterError(f"no full name matches `{requested}`", where="adapter.target_modules", fix=fix)
    full = next(iter(linear), "model.layers.0.self_attn.q_proj")
    fix = _near(requested, linear)
    fix = fix or f"a full name is `{full}`: a pattern begins with `.*`, and a list holds ends of names"
    raise AdapterError(f"no layer's full name matches `{requested}`", where="adapter.target_modules", fix=fix)


def _near(requested: str, names: Sequence[str]) -> str:
    near = near_pattern("adapter.target_modules", requested, names)
    return near and f"did you mean {near}?"


def _no_match(requested: str, linear: Sequence[str]) -> Problem:
    if _MARKS.search(requested):
        pattern = near_pattern("adapter.target_modules", requested, linear)
        fix = f"a list holds ends of names; one text is a regular expression{pattern and f': {pattern}'}"
        return Problem(f"no layer is called `{requested}`", "adapter.target_modules", fix)
    endings = sorted({_last_part(name) for name in linear})
    near = get_close_matches(_last_part(requested), endings, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'`{ending}`' for ending in near)}? " if near else ""
    return Problem(
        f"no layer is called `{requested}`",
        "adapter.target_modules",
        f"{hint}this model has {', '.join(endings)}; or use all-linear",
    )


def _endings(model: PreTrainedModel) -> list[str]:
    return sorted({_last_part(name) for name in _linear_names(model)})


def _linear_names(model: PreTrainedModel) -> Iterator[str]:
    """Yield the full names of the language model's linear layers; the head and other towers are left out."""
    head = model.get_output_embeddings() or find_score_head(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not _OTHER_TOWERS.search(name):
            yield name


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]
