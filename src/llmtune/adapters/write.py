"""Write a LoRA adapter in the format of peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtune import durable
from llmtune.adapters.attach import adapter_state_and_config
from llmtune.adapters.config_file import BASE_RECORD
from llmtune.models.save import write_generation_config, write_tokenizer

__all__ = ["write_adapter"]


def write_adapter(
    model: Any,
    folder: Path,
    *,
    tokenizer: Any = None,
    stop_token_ids: Sequence[int] = (),
    base_digest: str | None = None,
    base_name: str | None = None,
    base_revision: str | None = None,
) -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it, with a record of its base beside it, and the
    tokenizer when given.

    The config names the base as transformers can load it (a hub id or a folder); base_name, base_digest and
    base_revision go to the record.
    """
    tensors, config = adapter_state_and_config(model)
    if base_revision is not None:
        config["revision"] = base_revision
    durable.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    durable.write_json(folder / "adapter_config.json", config)
    record = {"base_digest": base_digest, "base_name": base_name, "base_path": config["base_model_name_or_path"]}
    record |= {"base_revision": base_revision, **_how_the_base_is_held(model.get_base_model().config)}
    durable.write_json(folder / BASE_RECORD, record)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
        write_generation_config(model.get_base_model(), tokenizer, stop_token_ids, folder)


def _how_the_base_is_held(config: Any) -> dict[str, str | None]:
    """The quantization and the type of the base the adapter was trained beside: a merge needs the very same numbers."""
    stored = getattr(config, "quantization_config", None)
    kind = None if stored is None else "4bit" if getattr(stored, "load_in_4bit", False) else "8bit"
    return {"quantization": kind, "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch.")}
