"""LoRA and its family through peft: attach, count, write out in peft's own format, and read back only what is safe and
fits.

peft names what it trains after the layer it stands beside; the names in our files are exactly peft's, so
`PeftModel.from_pretrained` reads them.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.adapters.config_file import read_adapter_config, read_base_record
from llmtune.common.decisions import Decision
from llmtune.config.schema import AdapterConfig
from llmtune.errors import AdapterError, ModelError, Problem
from llmtune.models.parameters import count_parameters, trained_parameters
from llmtune.models.quantization import import_bitsandbytes
from llmtune.models.quiet_libraries import quiet_libraries

if TYPE_CHECKING:
    import torch

__all__ = ["adapter_state_and_config", "attach_adapter", "load_adapter", "load_adapter_weights", "read_adapter_tensors"]


def attach_adapter(
    model: Any, adapter_config: AdapterConfig, *, seed: int, tokenizer: Any = None, token_ids: Sequence[int] = ()
) -> tuple[Any, list[Decision]]:
    """Freeze the model and put LoRA beside its layers; returns the peft model and what was chosen.

    The update is alpha / r * B A (alpha / sqrt(r) with rslora). B starts at 0, so outputs are unchanged before the
    first step; A is drawn uniformly from +-1/sqrt(inputs), a function of (seed, layer names) alone. Trained weights are
    float32 whatever the base is. tokenizer gives the ids of `train_tokens` (or give `token_ids`). Raises AdapterError
    for names that match nothing, with the nearest.
    """
    targets = _targets(model, adapter_config.target_modules)
    _check_modules_to_save(model, adapter_config.modules_to_save)
    ids = [*token_ids, *_token_ids(adapter_config.train_tokens, tokenizer)]
    options = {
        "task_type": "CAUSAL_LM",
        "r": adapter_config.r,
        "lora_alpha": adapter_config.alpha,
        "lora_dropout": adapter_config.dropout,
        "target_modules": targets,
        "use_rslora": adapter_config.rslora,
        "use_dora": adapter_config.dora,
        "modules_to_save": list(adapter_config.modules_to_save) or None,
        "trainable_token_indices": sorted(set(ids)) or None,
        "fan_in_fan_out": _all_transposed(model, targets),
    }
    adapted = _wrap(model, options)
    _seed_weights(adapted, seed)
    adapted.eval()
    layers = sum(
        name.endswith(("lora_A.default.weight", "lora_embedding_A.default")) for name, _ in adapted.named_parameters()
    )
    trained = sum(one.numel() for one in trained_parameters(adapted).values())
    total = count_parameters(adapted)
    shown = targets if isinstance(targets, str) else ", ".join(targets[:12]) + (" ..." if len(targets) > 12 else "")
    reason = f"{layers} layers get rank {adapter_config.r}; {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
    return adapted, [Decision("adapter.target_modules", shown, reason)]


def adapter_state_and_config(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, adapter_config) of an adapted model in peft's file format: tensors on the CPU, contiguous, in the order
    of names.
    """
    from peft import get_peft_model_state_dict

    with quiet_libraries():
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    return tensors, {key: _plain(config[key]) for key in sorted(config) if key != "runtime_config"}


def load_adapter(base_model: Any, folder: Path, *, base_digest: str | None = None, trainable: bool = False) -> Any:
    """Put the adapter in `folder` on a base model; returns the peft model.

    Its config is read against an allow-list and its weights only from safetensors; a missing, unexpected, misshapen or
    non-finite tensor is refused. base_digest: digest of this base; an adapter that records another one is refused.
    Raises AdapterError.
    """
    options = read_adapter_config(folder)
    recorded = read_base_record(folder).get("base_digest")
    if base_digest and recorded and recorded != base_digest:
        raise AdapterError(
            "this adapter was trained on other weights than this base has",
            where=str(folder),
            fix=f"use its own base, `{options.get('base_model_name_or_path') or 'unknown'}` (digest {str(recorded)[:12]}..., "
            f"here {base_digest[:12]}...)",
        )
    tensors = read_adapter_tensors(folder)
    adapted = _wrap(base_model, {**options, "inference_mode": not trainable})
    _fill(adapted, tensors, str(folder))
    adapted.eval()
    return adapted


def load_adapter_weights(model: Any, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Put the adapter weights saved in `folder` into a model that `attach_adapter` made, bit for bit.

    `tensors`: what its file holds, where that was read and checked already. Raises AdapterError when names or shapes
    are not exactly those of this adapter.
    """
    _fill(model, read_adapter_tensors(folder) if tensors is None else dict(tensors), str(folder))


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of `adapter_model.safetensors`, checked to be finite.

    Raises AdapterError, also for a `.bin`-only adapter.
    """
    from safetensors.torch import load_file

    from llmtune.models.weights import inspect_weights, refuse_changed_weights

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = (
            "is only there as adapter_model.bin, a format that can run code when it is opened"
            if pickled
            else "has no adapter_model.safetensors"
        )
        fix = (
            "load it once with peft in a place you trust and save it with safe_serialization=True"
            if pickled
            else "name an adapter's folder"
        )
        raise AdapterError(f"the adapter in {folder} {what}", where=str(folder), fix=fix)
    try:
        refuse_changed_weights(folder)
        inspect_weights([path])
    except ModelError as error:
        raise AdapterError.all(error.problems) from error
    return load_file(path)


def _wrap(model: Any, options: Mapping[str, Any]) -> Any:
    """Peft around the model, without touching the global random state, the network or the screen.

    Trained weights in float32.
    """
    import torch

    if importlib.util.find_spec("bitsandbytes"):
        import_bitsandbytes()  # peft imports it when it looks for quantized layers; this way it stays quiet
    from peft import LoraConfig, get_peft_model

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=devices):
            adapted = get_peft_model(model, LoraConfig(**options))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise AdapterError(
            f"the adapter does not fit this model: {error}", where="adapter", fix="check adapter.target_modules"
        ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
    return adapted


def _fill(adapted: Any, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy the file's tensors into the adapter; names and shapes must be exactly those the adapter has."""
    from peft import set_peft_model_state_dict

    expected, _ = adapter_state_and_config(adapted)
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


def _targets(model: Any, wanted: str | Sequence[str]) -> list[str] | str:
    """The layers an adapter is put beside: a sorted list of name endings, or the regular expression as given."""
    linear = list(_linear_names(model))
    if wanted == "all-linear":
        endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
        matched = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings]
        return endings if set(matched) == set(linear) else sorted(linear)
    names = [name for name, _ in model.named_modules()]
    if isinstance(wanted, str):
        return _pattern(wanted, names, linear)
    endings = sorted(wanted)
    problems = [_no_match(one, linear) for one in endings if not any(_ends(name, one) for name in names)]
    if problems or not endings:
        raise AdapterError.all(problems or [Problem("the list is empty", "adapter.target_modules", "use all-linear")])
    return endings


def _pattern(wanted: str, names: Sequence[str], linear: Sequence[str]) -> str:
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise AdapterError(
            f"`{wanted}` is no regular expression: {error}",
            where="adapter.target_modules",
            fix="or give a list of names",
        ) from error
    if any(pattern.fullmatch(name) for name in names):
        return wanted
    if any(_ends(name, wanted) for name in names):
        fix = (
            f"a single string is a regular expression over full names; write a list: adapter.target_modules=[{wanted}]"
        )
        raise AdapterError(f"no full name matches `{wanted}`", where="adapter.target_modules", fix=fix)
    raise AdapterError.all([_no_match(wanted, linear)])


def _no_match(wanted: str, linear: Sequence[str]) -> Problem:
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    near = get_close_matches(wanted.rsplit(".", 1)[-1], endings, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'`{one}`' for one in near)}? " if near else ""
    return Problem(
        f"no layer is called `{wanted}`",
        "adapter.target_modules",
        f"{hint}this model has {', '.join(endings)}; or use all-linear",
    )


def _check_modules_to_save(model: Any, wanted: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    problems = []
    for one in wanted:
        if not any(_ends(name, one) for name in names):
            near = get_close_matches(one, sorted({name.rsplit(".", 1)[-1] for name in names}), n=2, cutoff=0.4)
            fix = (
                f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
                if near
                else "name a module of this model, for example lm_head"
            )
            problems.append(Problem(f"no module is called `{one}`", "adapter.modules_to_save", fix))
    if problems:
        raise AdapterError.all(problems)


def _token_ids(wanted: Sequence[str], tokenizer: Any) -> list[int]:
    if not wanted:
        return []
    if tokenizer is None:
        raise AdapterError(
            "the ids of the tokens to train are not known", where="adapter.train_tokens", fix="give the tokenizer"
        )
    vocabulary = tokenizer.get_vocab()
    missing = [one for one in wanted if one not in vocabulary]
    if missing:
        raise AdapterError(
            f"the tokenizer has no token `{missing[0]}`",
            where="adapter.train_tokens",
            fix="add it to the tokenizer first",
        )
    return [vocabulary[one] for one in wanted]


def _linear_names(model: Any) -> Iterator[str]:
    """Full names of the language model's linear layers; the output head and other towers (vision, audio) are left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head and not _OTHER_TOWERS.search(name):
            yield name


def _all_transposed(model: Any, targets: list[str] | str) -> bool:
    """Whether the targeted layers keep their weight as [in, out] (GPT-2's Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    def matches(name: str) -> bool:
        return (
            bool(re.fullmatch(targets, name)) if isinstance(targets, str) else any(_ends(name, one) for one in targets)
        )

    kinds = {isinstance(module, Conv1D) for name, module in model.named_modules() if name and matches(name)}
    return kinds == {True}


def _seed_weights(adapted: Any, seed: int) -> None:
    """Draw A anew from a generator of its own, layer by layer in the order of names: the same on every device, library
    version and rank.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if name.endswith("lora_A.default.weight"):
                bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
                weight.copy_(
                    torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                )
            elif name.endswith("lora_embedding_B.default"):
                weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(generator=generator))


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _plain(value: Any) -> Any:
    """A JSON value with one spelling: sets and tuples as lists, enums as their value."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    return getattr(value, "value", value)


_OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal_projector|multimodal)")
