"""Anything that can be asked a question - a run, an adapter, a merged or published model, a GGUF file - loaded as one
thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmtune.adapters.config_file import read_base_record
from llmtune.adapters.find import base_name_of, find_base, find_result
from llmtune.adapters.load import load_adapter
from llmtune.config.layers import load_config
from llmtune.config.schema import Config, ModelConfig
from llmtune.data.rendering.renderer import Renderer
from llmtune.engine.devices import choose_device
from llmtune.errors import ModelError
from llmtune.models.catalog import resolve, resolve_model_argument
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.load import load_model
from llmtune.models.scan import read_json_file
from llmtune.models.tokenizer import load_tokenizer, load_tokenizer_folder

__all__ = ["InferenceModel", "load_inference_model"]


@dataclass(frozen=True)
class InferenceModel:
    """A model that can be asked, rendered to exactly as it was trained."""

    model: Any
    """A transformers causal LM in evaluation mode, inside peft's wrapper when it is base and adapter."""
    tokenizer: Any
    renderer: Renderer
    description: str
    """One line: what was loaded, and from where."""
    is_adapted: bool
    answers_text: bool
    """It continues texts: it was trained on plain text, or has no chat template."""
    config: Config | None = None
    """Config of its run."""
    base: ModelSource | None = None
    """The base it was tuned from, where that is known."""

    @contextmanager
    def as_before_tuning(self) -> Iterator[Any]:
        """Yield the model as it was before it was tuned. Raises ModelError where that is not known."""
        if self.is_adapted:
            with self.model.disable_adapter():
                yield self.model
            return
        if self.base is None or self.base.kind == "scratch":
            fix = "compare takes runs that tuned a pretrained model"
            raise ModelError(
                "there is no model to compare with: this one was not tuned from another",
                where=self.description,
                fix=fix,
            )
        device = next(self.model.parameters()).device
        yield _load(self.base, ModelConfig(name=self.base.name), self.tokenizer, device)


def load_inference_model(
    name: str, *, output_dir: str = "runs", offline: bool = False, no_cuda: bool = False
) -> InferenceModel:
    """Load RUN|MODEL: the folder or name of a run, an adapter's folder, a model's folder, a name of list-models, a hub
    id, a .gguf file.

    Of a run the final model is taken, else the best, else the newest checkpoint. Raises ModelError (AdapterError,
    TokenizerError).
    """
    device = choose_device(no_cuda=no_cuda)[0]
    folder = next((one for one in (Path(name), Path(output_dir) / name) if (one / "run.json").is_file()), Path(name))
    config = load_config(str(folder / "config.yaml")).config if (folder / "run.json").is_file() else None
    found = find_result(folder) if folder.is_dir() else None
    if found is None:
        return _published(name, device, offline=offline)
    if (found / "adapter_config.json").is_file():
        return _adapted(found, folder, config, device, offline=offline)
    return _whole(found, folder, config, device, offline=offline)


def _published(name: str, device: torch.device, *, offline: bool) -> InferenceModel:
    source = resolve_model_argument(name, offline=offline)
    model_config = ModelConfig(name=name)
    tokenizer = load_tokenizer(source, model_config).tokenizer
    model = _load(source, model_config, tokenizer, device)
    return InferenceModel(
        model=model,
        tokenizer=tokenizer,
        renderer=Renderer(tokenizer),
        description=f"{name}, as published",
        is_adapted=False,
        answers_text=not tokenizer.chat_template,
        base=source,
    )


def _adapted(
    found: Path, folder: Path, config: Config | None, device: torch.device, *, offline: bool
) -> InferenceModel:
    source, record = find_base(found, offline=offline), read_base_record(found)
    tokenizer = _tokenizer_of(found, folder, source, config)
    held = ModelConfig(name=source.name, quantization=record.get("quantization") or "none")
    if held.quantization != "none":
        held = replace(
            held, dtype=record.get("dtype") or "auto"
        )  # it must be quantized from the same numbers as in training
    base = _load(source, held, tokenizer, device)
    return InferenceModel(
        model=load_adapter(base, found),
        tokenizer=tokenizer,
        renderer=_renderer(tokenizer, config),
        description=f"{base_name_of(found)} with the adapter {found}",
        is_adapted=True,
        answers_text=_answers_text(folder, config, tokenizer),
        config=config,
        base=source,
    )


def _whole(found: Path, folder: Path, config: Config | None, device: torch.device, *, offline: bool) -> InferenceModel:
    source = resolve(str(found), offline=offline)
    base = None if config is None else resolve(config.model.name, config.model.revision, offline=offline)
    tokenizer = _tokenizer_of(found, folder, base or source, config)
    return InferenceModel(
        model=_load(source, ModelConfig(name=str(found)), tokenizer, device),
        tokenizer=tokenizer,
        renderer=_renderer(tokenizer, config),
        description=f"the model in {found}",
        is_adapted=False,
        answers_text=_answers_text(folder, config, tokenizer),
        config=config,
        base=base,
    )


def _load(source: ModelSource, model_config: ModelConfig, tokenizer: Any, device: torch.device) -> Any:
    """Load for asking: float32 on a CPU; on a device in 16 bits, as it multiplies fastest."""
    precision = "fp32" if device.type == "cpu" else "bf16"
    loaded = load_model(
        source, model_config, tokenizer=tokenizer, device=device, trained="adapter", precision=precision, seed=0
    )
    return loaded.model


def _tokenizer_of(found: Path, folder: Path, base: ModelSource, config: Config | None) -> Any:
    """Return the tokenizer saved with the result, else the run's own, else the base's with what the config adds."""
    for place in (found, folder / "tokenizer"):
        if (place / "tokenizer_config.json").is_file():
            return load_tokenizer_folder(place).tokenizer
    if config is None:
        return load_tokenizer(base, ModelConfig(name=base.name)).tokenizer
    return load_tokenizer(base, config.model, new_tokens=config.adapter.train_tokens).tokenizer


def _renderer(tokenizer: Any, config: Config | None) -> Renderer:
    if config is None:
        return Renderer(tokenizer)
    return Renderer(tokenizer, train_on=config.data.train_on, parse_control_tokens=config.data.parse_control_tokens)


def _answers_text(folder: Path, config: Config | None, tokenizer: Any) -> bool:
    """Say whether what was trained continues texts: by the config, by the format that was detected, or for lack of a
    template.
    """
    if config is None:
        return not tokenizer.chat_template
    if config.data.format != "auto":
        return config.data.format == "text"
    chosen = [
        one.get("value")
        for one in read_json_file(folder / "run.json").get("decisions", ())
        if one.get("key") == "data.format"
    ]
    return str(chosen[-1]) == "text" if chosen else False
