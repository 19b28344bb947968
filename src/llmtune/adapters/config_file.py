"""Read an adapter's config as a stranger's letter: known keys with harmless values, and nothing else, reach peft.

peft would import the module that `auto_mapping.parent_library` or `megatron_core` names; here such a file is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtune.errors import AdapterError, ModelError, Problem
from llmtune.models.scan import read_json_file

__all__ = ["BASE_RECORD", "read_adapter_config", "read_base_record"]

BASE_RECORD = "adapter_base.json"
"""What we write beside an adapter: the digest and name of the base it was trained on."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The LoRA options in `adapter_config.json`, as keyword arguments of `peft.LoraConfig`.

    Raises AdapterError with every key that is unknown and set, names code, or has a value of the wrong kind.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no adapter_config.json", where=str(folder), fix="name the folder of a LoRA adapter"
        )
    try:
        raw = read_json_file(path)
    except ModelError as error:
        raise AdapterError.all(error.problems) from error
    if not isinstance(raw, dict):
        raise AdapterError("adapter_config.json holds no mapping", where=str(path), fix="fetch the adapter again")
    problems = [
        Problem(f"`{key}` {why}", str(path), _FIX) for key, value in raw.items() for why in _objection(key, value)
    ]
    if raw.get("peft_type") != "LORA":
        problems.insert(
            0,
            Problem(f"the adapter is of type `{raw.get('peft_type')}`", str(path), "only LoRA adapters are supported"),
        )
    problems += [
        Problem(f"`{key}` is missing", str(path), "fetch the adapter again")
        for key in ("r", "target_modules")
        if key not in raw
    ]
    if problems:
        raise AdapterError.all(problems)
    return {key: value for key, value in raw.items() if key in _ALLOWED and key not in _NOT_OPTIONS}


def read_base_record(folder: Path) -> Mapping[str, Any]:
    """What is recorded of the base the adapter was trained on; empty for an adapter made elsewhere."""
    path = folder / BASE_RECORD
    record = read_json_file(path) if path.is_file() else {}
    return record if isinstance(record, dict) else {}


def _objection(key: str, value: Any) -> list[str]:
    """Why this entry is refused; empty when it is fine."""
    allowed = _ALLOWED.get(key)
    if allowed is not None:
        return [] if allowed(value) else [f"cannot be `{value}`"]
    if value == _HARMLESS.get(key) or value in (None, False, [], {}):
        return []
    return [
        f"asks for `{str(value)[:80]}`, which is not supported"
        + (" (it names code to import)" if key in _NAMES_CODE else "")
    ]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65_536


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(one, str) for one in value))
    )


def _is_pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(check(one) for one in value.values()))


def _is_ids(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(one, list) and _is_ids(one) for one in value.values())
    return value is None or (isinstance(value, list) and all(isinstance(one, int) and one >= 0 for one in value))


def _is_layers(value: Any) -> bool:
    return isinstance(value, int) or _is_ids(value)


def _is_plain_init(value: Any) -> bool:
    """Other initialisations (`pissa`, `loftq`, `corda`, ...) would change the base's weights on loading."""
    return isinstance(value, bool) or value in ("gaussian", None)


_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "peft_type": _is_text,
    "peft_version": _is_text,
    "task_type": lambda value: value in (None, "CAUSAL_LM"),
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    "inference_mode": _is_bool,
    "r": _is_int,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
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
    "rank_pattern": _is_pattern(_is_int),
    "alpha_pattern": _is_pattern(_is_number),
    "trainable_token_indices": _is_ids,
    "ensure_weight_tying": _is_bool,
}
_HARMLESS: dict[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""Values that every adapter config carries without asking for anything."""
_NAMES_CODE = ("auto_mapping", "megatron_core", "megatron_config")
_NOT_OPTIONS = ("peft_type", "peft_version", "inference_mode", "init_lora_weights")
_FIX = "if you trust this adapter, load and save it once with peft itself, without that key"
