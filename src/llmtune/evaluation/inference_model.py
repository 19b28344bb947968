"""Load a run, an adapter, a merged or published model or a GGUF file for inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from llmtune.adapters.config_file import read_base_record
from llmtune.adapters.find import base_name_of, find_base, find_result_named, run_of
from llmtune.adapters.load import load_adapter
from llmtune.config.layers import load_config
from llmtune.config.schema import Config, ModelConfig
from llmtune.data.rendering.renderer import Renderer
from llmtune.engine.devices import choose_device
from llmtune.errors import ModelError
from llmtune.models.catalog import resolve, resolve_model_argument
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.scan import read_json_file
from llmtune.models.tokenizer import load_tokenizer, load_tokenizer_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["InferenceModel", "find_tokenizer", "load_inference_model"]


@dataclass(frozen=True)
class InferenceModel:
    """A model ready to answer, with the tokenizer and renderer it was trained with."""

    model: PreTrainedModel | PeftModel
    """In evaluation mode; inside peft's wrapper when it is base and adapter."""
    tokenizer: PreTrainedTokenizerFast
    renderer: Renderer
    description: str
    """One line: the kind of model and its folder or name."""
    is_adapted: bool
    answers_text: bool
    """It continues texts: it was trained on plain text, or has no chat template."""
    config: Config | None = None
    """Config of its run."""
    base: ModelSource | None = None
    """The base it was tuned from, where that is known."""

    @contextmanager
    def as_before_tuning(self) -> Iterator[PreTrainedModel | PeftModel]:
        """Yield the model as it was before it was tuned. Raises ModelError where that is not known."""
        if self.is_adapted:
            with cast("PeftModel", self.model).disable_adapter():
                yield self.model
            return
        if self.base is None or self.base.kind == "scratch":
            raise ModelError(
                "there is no model to compare with: this one was not tuned from another",
                where=self.description,
                fix="compare takes runs that tuned a pretrained model",
            )
        device = next(self.model.parameters()).device
        yield _load_model(self.base, ModelConfig(name=self.base.name), self.tokenizer, device).model


def load_inference_model(
    name: str,
    *,
    checkpoint: str | None = None,
    offline: bool = False,
    no_cuda: bool = False,
) -> InferenceModel:
    """Load RUN|MODEL: a run, an adapter's or a model's folder, a catalog name, a hub id, or a .gguf file.

    Of a run the final model is taken, else the best, else the newest checkpoint; or `checkpoint` (see `find_result`).
    Raises ModelError, AdapterError or TokenizerError for a model that cannot be found or loaded, UsageError for a
    checkpoint that is not there, MachineError when it cannot be fetched.
    """
    device = choose_device(no_cuda=no_cuda)[0]
    result = find_result_named(name, "runs", checkpoint)
    run = run_of(result) if result is not None else None
    folder = run or Path(name)
    # Without the environment: a run is used as it was trained, whatever this shell sets.
    config = load_config(str(folder / "config.yaml"), environ={}).config if run is not None else None
    if result is None:
        return _load_published(name, device, offline=offline)
    if (result / "adapter_config.json").is_file():
        return _load_adapted(result, folder, config, device, offline=offline)
    return _load_full(result, folder, config, device, offline=offline)


def _load_published(name: str, device: torch.device, *, offline: bool) -> InferenceModel:
    source = resolve_model_argument(name, offline=offline)
    model_config = ModelConfig(name=name)
    tokenizer = load_tokenizer(source, model_config).tokenizer
    model = _load_model(source, model_config, tokenizer, device).model
    return _with_renderer(model, tokenizer, f"{name}, as published", source, Path(name), None, is_adapted=False)


def _load_adapted(
    adapter: Path, folder: Path, config: Config | None, device: torch.device, *, offline: bool
) -> InferenceModel:
    source, record = find_base(adapter, offline=offline), read_base_record(adapter)
    tokenizer = find_tokenizer(adapter, folder, source, config)
    model_config, seed = ModelConfig(name=source.name), 0
    if source.kind == "scratch" and config is not None:  # the same random weights again
        model_config, seed = replace(model_config, architecture=config.model.architecture), config.run.seed
    if quantization := record.get("quantization"):
        # Quantized from the same numbers as in training, or the adapter would meet another base.
        model_config = replace(model_config, quantization=quantization, dtype=record.get("dtype") or "auto")
    base = _load_model(source, model_config, tokenizer, device, seed=seed)
    model = load_adapter(base.model, adapter, base_digest=base.base_digest)
    description = f"{base_name_of(adapter)} with the adapter {adapter}"
    return _with_renderer(model, tokenizer, description, source, folder, config, is_adapted=True)


def _load_full(
    model_folder: Path, folder: Path, config: Config | None, device: torch.device, *, offline: bool
) -> InferenceModel:
    source = resolve(str(model_folder), offline=offline)
    base = None if config is None else resolve(config.model.name, config.model.revision, offline=offline)
    tokenizer = find_tokenizer(model_folder, folder, base or source, config)
    model = _load_model(source, ModelConfig(name=str(model_folder)), tokenizer, device).model
    return _with_renderer(model, tokenizer, f"the model in {model_folder}", base, folder, config, is_adapted=False)


def _with_renderer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    description: str,
    base: ModelSource | None,
    folder: Path,
    config: Config | None,
    *,
    is_adapted: bool,
) -> InferenceModel:
    renderer, answers_text = _make_renderer(tokenizer, config), _continues_text(folder, config, tokenizer)
    return InferenceModel(model, tokenizer, renderer, description, is_adapted, answers_text, config, base)


def _load_model(
    source: ModelSource,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    *,
    seed: int = 0,
) -> LoadedModel:
    # float32 on a CPU; a GPU multiplies 16 bits fastest, and nothing here is trained.
    precision = "fp32" if device.type == "cpu" else "bf16"
    return load_model(
        source, model_config, tokenizer=tokenizer, device=device, trained="adapter", precision=precision, seed=seed
    )


def find_tokenizer(result: Path, folder: Path, base: ModelSource, config: Config | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved with the result, else the run's, else the base's with the tokens of the config.

    folder: of the run that saved the result; without a run that of the result itself.
    """
    for path in (result, folder / "tokenizer"):
        if (path / "tokenizer_config.json").is_file():
            return load_tokenizer_folder(path).tokenizer
    if config is None:
        return load_tokenizer(base, ModelConfig(name=base.name)).tokenizer
    return load_tokenizer(base, config.model, new_tokens=config.adapter.train_tokens).tokenizer


def _make_renderer(tokenizer: PreTrainedTokenizerFast, config: Config | None) -> Renderer:
    if config is None:
        return Renderer(tokenizer)
    return Renderer.of_config(tokenizer, config.data)


def _continues_text(folder: Path, config: Config | None, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the model was trained on plain text: by the config, the detected format, or no chat template."""
    if config is None:
        return not tokenizer.chat_template
    if config.data.format != "auto":
        return config.data.format == "text"
    decisions = read_json_file(folder / "run.json").get("decisions", ())
    formats = [decision.get("value") for decision in decisions if decision.get("key") == "data.format"]
    return bool(formats) and str(formats[-1]) == "text"
