"""Start from an adapter that was trained before: `adapter.start_from`, a run of ours or a folder that peft wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.adapters.config_file import (
    LoraOptions,
    read_adapter_config,
    read_base_record,
    shape_of,
    trained_token_ids,
)
from llmtune.adapters.find import base_name_of, find_result, named_folder
from llmtune.adapters.load import copy_tensors, read_adapter_tensors, refuse_other_base
from llmtune.common.decisions import Decision
from llmtune.common.environment import home_expanded
from llmtune.config.document import DEFAULT, Origin
from llmtune.config.dump import value_text
from llmtune.config.keys import value_of
from llmtune.config.schema import Config
from llmtune.errors import AdapterError
from llmtune.models.tokenizer import load_tokenizer_folder
from llmtune.models.weights import digest_tensors

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["find_start", "fit_start", "load_start", "start_options"]


def find_start(config: Config) -> Path:
    """Return the folder of the adapter that `adapter.start_from` names: of a run its final one, else the best.

    Raises AdapterError where there is none, ModelError for a run that has saved nothing yet.
    """
    name = config.adapter.start_from
    assert name is not None
    where = "adapter.start_from"
    folder = named_folder(home_expanded(name), config.run.output_dir)
    if folder is None:
        fix = f"name a run in {config.run.output_dir}, or the folder of a run or an adapter"
        raise AdapterError(f"there is no run or folder `{name}`", where=where, fix=fix)
    result = find_result(folder)
    if result is None:
        raise AdapterError(f"`{folder}` holds no adapter", where=where, fix="name the folder with adapter_config.json")
    if not (result / "adapter_config.json").is_file():
        fix = f"train it further with model.name={result}, and leave adapter.start_from out"
        raise AdapterError(f"`{result}` is a whole model and no adapter", where=where, fix=fix)
    return result


def start_options(config: Config) -> LoraOptions:
    """Return the options of the adapter that training starts from (`adapter.start_from`), as peft takes them.

    Raises AdapterError where there is no such adapter, or one with a head of scores where answers are trained.
    """
    options = read_adapter_config(find_start(config))
    options.pop("base_model_name_or_path", None)  # peft writes that of the model it is put on
    options.pop("revision", None)
    task = "SEQ_CLS" if config.objective.trains_head else "CAUSAL_LM"
    if options.get("task_type") == "SEQ_CLS" != task:
        fix = "set objective.method=reward or classification, or name an adapter that was trained to answer"
        raise AdapterError("the adapter to start from gives scores", where="adapter.start_from", fix=fix)
    return {**options, "task_type": task, "lora_dropout": config.adapter.dropout, "inference_mode": False}


def fit_start(config: Config, origins: Mapping[str, Origin]) -> tuple[Config, list[Decision]]:
    """Return the config with the shape of the adapter it starts from in every key that was not given, if it has one.

    These are r, alpha, targets and their like, the base, its quantization, and the tokenizer saved with the adapter.
    Raises AdapterError where there is no such adapter.
    """
    if config.adapter.start_from is None:
        return config, []
    folder = find_start(config)
    options, record = read_adapter_config(folder), read_base_record(folder)
    found: dict[str, Any] = {f"adapter.{key}": value for key, value in shape_of(options).items()}
    if (folder / "tokenizer_config.json").is_file():
        found["model.tokenizer"] = str(folder)
        tokens = load_tokenizer_folder(folder).tokenizer.convert_ids_to_tokens(trained_token_ids(options))
        found["adapter.train_tokens"] = tuple(tokens)
    found |= {"model.name": base_name_of(folder), "model.revision": record.get("base_revision")}
    found["model.quantization"] = record.get("quantization") or "none"
    is_open = {key: origins.get(key, DEFAULT).kind == "default" for key in found}
    if not is_open["model.name"]:
        is_open["model.revision"] = False
    taken = {key: value for key, value in found.items() if is_open[key] and value is not None}
    changed = {key: value for key, value in taken.items() if value_of(config, key) != value}
    adapter, model = (
        {key.partition(".")[2]: value for key, value in changed.items() if key.startswith(section)}
        for section in ("adapter.", "model.")
    )
    config = replace(config, adapter=replace(config.adapter, **adapter), model=replace(config.model, **model))
    shown = "; ".join(f"{key}={value_text(value)}" for key, value in changed.items())
    reason = f"its weights are loaded; taken over from it: {shown or 'nothing, all of it was given'}"
    return config, [Decision("adapter.start_from", folder, reason)]


def load_start(adapted: PeftModel, config: Config, *, base_digest: str) -> str:
    """Copy the weights of the adapter to start from into the attached one, and return the sha256 over them.

    Raises AdapterError for one that was trained on another base, and for tensors that are missing, left over, of
    another shape or not finite.
    """
    folder = find_start(config)
    refuse_other_base(folder, base_digest)
    tensors = read_adapter_tensors(folder)
    copy_tensors(adapted, tensors, str(folder), new_head=config.objective.trains_head)
    return digest_tensors(sorted(tensors.items()))
