"""Read the config of an adapter from any source: only known keys with harmless values reach peft.

peft imports the module that `auto_mapping.parent_library` or `megatron_core` names; a file with such a key is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from llmtune.errors import AdapterError, ModelError, Problem
from llmtune.models.parameters import SCORE_HEADS
from llmtune.models.scan import read_json_file

__all__ = [
    "BASE_RECORD",
    "WEIGHTS_FILE",
    "BaseRecord",
    "LoraOptions",
    "read_adapter_config",
    "read_base_record",
    "shape_of",
    "trained_token_ids",
]

DtypeName = Literal["float32", "bfloat16", "float16"]

WEIGHTS_FILE = "adapter_model.safetensors"
"""Tensors of an adapter, beside its `adapter_config.json`."""

BASE_RECORD = "adapter_base.json"
"""Written beside an adapter: the base it was trained on, as a `BaseRecord`."""


class BaseRecord(TypedDict, total=False):
    """The base an adapter was trained on."""

    base_digest: str | None
    """sha256 over its weights (see `WeightsReport`)."""
    base_name: str | None
    """`model.name` of the run."""
    base_path: str | None
    """Folder or hub id as transformers loads it."""
    base_revision: str | None
    quantization: Literal["4bit", "8bit"] | None
    """How its linear layers were held in training."""
    dtype: DtypeName | None
    """Type it was loaded in, and quantized from."""
    labels: list[str]
    """Labels of the units of its head, where it gives scores."""


class LoraOptions(TypedDict, total=False):
    """The keyword arguments of `peft.LoraConfig` that llmtune sets or reads."""

    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    modules_to_save: list[str] | None
    fan_in_fan_out: bool
    bias: Literal["none"]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    ensure_weight_tying: bool


def read_adapter_config(folder: Path) -> LoraOptions:
    """Return the LoRA options in `adapter_config.json`.

    Raises AdapterError without such a file, and with every key that is unknown and set, names code, is missing or has a
    value of the wrong kind.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no adapter_config.json", where=str(folder), fix="name the folder of a LoRA adapter"
        )
    try:
        content = read_json_file(path)
    except ModelError as error:
        raise AdapterError.all(error.problems) from error
    if not isinstance(content, dict):
        raise AdapterError("adapter_config.json holds no mapping", where=str(path), fix="fetch the adapter again")
    objections = ((key, _objection(key, value)) for key, value in content.items())
    problems = [Problem(f"`{key}` {objection}", str(path), _FIX) for key, objection in objections if objection]
    if content.get("peft_type") != "LORA":
        problem = f"the adapter is of type `{content.get('peft_type')}`"
        problems.insert(0, Problem(problem, str(path), "only LoRA adapters are supported"))
    problems += [
        Problem(f"`{key}` is missing", str(path), "fetch the adapter again")
        for key in ("r", "target_modules")
        if key not in content
    ]
    if problems:
        raise AdapterError.all(problems)
    options = {key: value for key, value in content.items() if key in _ALLOWED and key not in _NOT_OPTIONS}
    if options.get("task_type") == "SEQ_CLS":  # peft names the head itself, each time
        saved = [name for name in options.get("modules_to_save") or () if name not in SCORE_HEADS]
        options["modules_to_save"] = saved or None
    return cast("LoraOptions", options)  # every value was checked above


def read_base_record(folder: Path) -> BaseRecord:
    """Return the record of the base the adapter was trained on; empty for an adapter made by another program."""
    path = folder / BASE_RECORD
    content = read_json_file(path) if path.is_file() else {}
    entries = content.items() if isinstance(content, dict) else ()
    return cast("BaseRecord", {key: value for key, value in entries if isinstance(value, (str, list))})


def shape_of(options: LoraOptions) -> dict[str, Any]:
    """Return what decides the shape of an adapter, by our keys of `adapter`; None for what its file leaves out."""
    targets = options.get("target_modules")
    return {
        "r": options.get("r"),
        "alpha": float(options.get("lora_alpha", 8)),
        "rslora": options.get("use_rslora", False),
        "dora": options.get("use_dora", False),
        "target_modules": tuple(sorted(targets)) if isinstance(targets, list) else targets,
        "modules_to_save": tuple(options.get("modules_to_save") or ()),
    }


def trained_token_ids(options: LoraOptions) -> list[int]:
    """Return the ids of the tokens whose rows the adapter trains, in order."""
    rows = options.get("trainable_token_indices") or []
    return sorted({index for ids in rows.values() for index in ids} if isinstance(rows, dict) else set(rows))


def _objection(key: str, value: object) -> str | None:
    """Return why this entry is refused; None for a harmless one."""
    is_allowed = _ALLOWED.get(key)
    if is_allowed is not None:
        return None if is_allowed(value) else f"cannot be `{value}`"
    if value == _HARMLESS.get(key) or value in (None, False, [], {}):
        return None
    code = " (it names code to import)" if key in _NAMES_CODE else ""
    return f"asks for `{str(value)[:80]}`, which is not supported{code}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65_536


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_names(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_ranks(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_int(rank) for rank in value.values()))


def _is_alphas(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_number(alpha) for alpha in value.values()))


def _is_ids(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(ids, list) and _is_ids(ids) for ids in value.values())
    return value is None or (isinstance(value, list) and all(isinstance(row, int) and row >= 0 for row in value))


def _is_layers(value: object) -> bool:
    return isinstance(value, int) or _is_ids(value)


def _is_plain_init(value: object) -> bool:
    # Other initializations (`pissa`, `loftq`, `corda`, ...) change the base's weights on loading.
    return isinstance(value, bool) or value in ("gaussian", None)


_ALLOWED: dict[str, Callable[[object], bool]] = {
    "peft_type": _is_text,
    "peft_version": _is_text,
    "task_type": lambda value: value in (None, "CAUSAL_LM", "SEQ_CLS"),
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    "inference_mode": _is_bool,
    "r": _is_int,
    "lora_alpha": _is_number,
    "lora_dropout": _is_fraction,
    "target_modules": _is_names,
    "exclude_modules": _is_names,
    "modules_to_save": _is_names,
    "fan_in_fan_out": _is_bool,
    "bias": lambda value: value == "none",
    "use_rslora": _is_bool,
    "use_dora": _is_bool,
    "lora_bias": _is_bool,
    "init_lora_weights": _is_plain_init,
    "layers_to_transform": _is_layers,
    "layers_pattern": _is_names,
    "rank_pattern": _is_ranks,
    "alpha_pattern": _is_alphas,
    "trainable_token_indices": _is_ids,
    "ensure_weight_tying": _is_bool,
}
_HARMLESS: dict[str, object] = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""Defaults that peft writes into every adapter config."""
_NAMES_CODE = ("auto_mapping", "megatron_core", "megatron_config")
_NOT_OPTIONS = ("peft_type", "peft_version", "inference_mode", "init_lora_weights")
_FIX = "if you trust this adapter, load and save it once with peft itself, without that key"
