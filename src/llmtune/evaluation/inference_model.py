"""Load a run, an adapter, a merged or published model or a GGUF file for inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from llmtune.adapters.config_file import read_adapter_config, read_base_record
from llmtune.adapters.find import base_name_of, find_base, find_result_named, run_of
from llmtune.adapters.load import load_adapter, read_adapter_tensors
from llmtune.config.layers import load_config
from llmtune.config.schema import Config, DataConfig, ModelConfig
from llmtune.data.rendering.renderer import Renderer
from llmtune.engine.choose_device import choose_device
from llmtune.engine.precision import choose_precision
from llmtune.errors import ModelError, UsageError
from llmtune.models.catalog import resolve, resolve_model_argument
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.parameters import SCORE_HEADS
from llmtune.models.quantization import widen_to_float32
from llmtune.models.save import PromptDefaults, prompt_defaults_of, read_prompt_defaults
from llmtune.models.scan import read_json_file
from llmtune.models.score_head import REWARD, labels_of
from llmtune.models.tokenizer import load_tokenizer, load_tokenizer_folder
from llmtune.models.weights import load_trained_part

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["InferenceModel", "find_prompt_defaults", "find_tokenizer", "labels_in", "load_inference_model"]


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
    defaults: PromptDefaults = field(default_factory=PromptDefaults)
    """What stands around each prompt."""
    labels: tuple[str, ...] = ()
    """Labels of the units of its head, where it gives scores and no text."""

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
                fix="name the second run or model with --with, or a run that tuned a pretrained model",
            )
        device = next(self.model.parameters()).device
        model_config = ModelConfig(name=self.base.name)
        yield _load_model(self.base, model_config, self.tokenizer, device, labels=self.labels).model


def load_inference_model(
    name: str,
    *,
    checkpoint: str | None = None,
    offline: bool = False,
    no_cuda: bool = False,
    template_args: Mapping[str, object] | None = None,
    may_score: bool = False,
) -> InferenceModel:
    """Load RUN|MODEL: a run, an adapter's or a model's folder, a catalog name, a hub id, or a .gguf file.

    Of a run the final model is taken, else the best, else the newest checkpoint; or `checkpoint` (see `find_result`).
    template_args: arguments of the chat template, before those of its training. may_score: whether a model that gives
    scores is loaded, and not refused (UsageError).
    Raises ModelError, AdapterError or TokenizerError for a model that cannot be found or loaded, UsageError for a
    checkpoint that is not there, MachineError when it cannot be fetched.
    """
    device = choose_device(no_cuda=no_cuda)[0]
    result = find_result_named(name, "runs", checkpoint)
    run = run_of(result) if result is not None else None
    folder = run or Path(name)
    # Without the environment: a run is used as it was trained, whatever this shell sets.
    config = load_config(str(folder / "config.yaml"), environ={}).config if run is not None else None
    labels = () if result is None else labels_in(result)
    if labels and not may_score:
        raise UsageError("this model gives scores and no text", name, f"llmtune predict {name} --data FILE prints them")
    if result is None:
        loaded = _load_published(name, device, offline=offline)
    elif (result / "adapter_config.json").is_file():
        loaded = _load_adapted(result, folder, config, device, offline=offline, labels=labels)
    else:
        loaded = _load_full(result, folder, config, device, offline=offline, labels=labels)
    loaded = replace(loaded, labels=labels)
    if not template_args:
        return loaded
    defaults = replace(loaded.defaults, template_args={**loaded.defaults.template_args, **template_args})
    return replace(loaded, defaults=defaults, renderer=_make_renderer(loaded.tokenizer, config, defaults))


def labels_in(result: Path) -> tuple[str, ...]:
    """Labels of the adapter or model in a folder; none of one that gives text. Raises AdapterError or ModelError."""
    if not (result / "adapter_config.json").is_file():
        return labels_of(read_json_file(result / "config.json"))
    if read_adapter_config(result).get("task_type") != "SEQ_CLS":
        return ()
    named = read_base_record(result).get("labels")
    if named:
        return tuple(named)
    # Of another program: only the shape of the head says how many units it has.
    tensors = read_adapter_tensors(result)
    units = next((len(value) for name, value in tensors.items() if name.split(".")[-2] in SCORE_HEADS), 1)
    return REWARD if units == 1 else tuple(f"LABEL_{index}" for index in range(units))


def _load_published(name: str, device: torch.device, *, offline: bool) -> InferenceModel:
    source = resolve_model_argument(name, offline=offline)
    model_config = ModelConfig(name=name)
    tokenizer = load_tokenizer(source, model_config).tokenizer
    model = _load_model(source, model_config, tokenizer, device).model
    return _with_renderer(model, tokenizer, f"{name}, as published", source, Path(name), None, result=Path(name))


def _load_adapted(
    adapter: Path, folder: Path, config: Config | None, device: torch.device, *, offline: bool, labels: tuple[str, ...]
) -> InferenceModel:
    source, record = find_base(adapter, offline=offline), read_base_record(adapter)
    tokenizer = find_tokenizer(adapter, folder, source, config)
    model_config, seed = ModelConfig(name=source.name), 0
    if source.kind == "scratch" and config is not None:  # the same random weights again
        model_config, seed = replace(model_config, architecture=config.model.architecture), config.run.seed
    if quantization := record.get("quantization"):
        # Quantized from the same numbers as in training, or the adapter would meet another base.
        model_config = replace(model_config, quantization=quantization, dtype=record.get("dtype") or "auto")
    base = _load_model(source, model_config, tokenizer, device, seed=seed, labels=labels)
    model = load_adapter(base.model, adapter, base_digest=base.base_digest)
    description = f"{base_name_of(adapter)} with the adapter {adapter}"
    return _with_renderer(model, tokenizer, description, source, folder, config, result=adapter)


def _load_full(
    model_folder: Path,
    folder: Path,
    config: Config | None,
    device: torch.device,
    *,
    offline: bool,
    labels: tuple[str, ...],
) -> InferenceModel:
    source = resolve(str(model_folder), offline=offline)
    base = None if config is None else resolve(config.model.name, config.model.revision, offline=offline)
    tokenizer = find_tokenizer(model_folder, folder, base or source, config)
    is_part = config is not None and bool(config.model.train_only) and model_folder.name.startswith("step-")
    if config is not None and base is not None and is_part:
        # A checkpoint holds what is trained; the rest is the base's.
        model = _load_model(base, config.model, tokenizer, device, seed=config.run.seed, labels=labels).model
        load_trained_part(model, model_folder)
    else:
        model = _load_model(source, ModelConfig(name=str(model_folder)), tokenizer, device, labels=labels).model
    return _with_renderer(model, tokenizer, f"the model in {model_folder}", base, folder, config, result=model_folder)


def _with_renderer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    description: str,
    base: ModelSource | None,
    folder: Path,
    config: Config | None,
    *,
    result: Path,
) -> InferenceModel:
    defaults = find_prompt_defaults(result, folder, config)
    renderer = _make_renderer(tokenizer, config, defaults)
    is_adapted = (result / "adapter_config.json").is_file()
    answers_text = defaults.continues_text or (config is None and not tokenizer.chat_template)
    return InferenceModel(model, tokenizer, renderer, description, is_adapted, answers_text, config, base, defaults)


def _load_model(
    source: ModelSource,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    *,
    seed: int = 0,
    labels: tuple[str, ...] = (),
) -> LoadedModel:
    # float32 on a CPU; a GPU multiplies 16 bits fastest, and nothing here is trained.
    precision = "fp32"
    if device.type != "cpu":
        precision = str(choose_precision(device, has_adapter=True).value)
    loaded = load_model(
        source,
        model_config,
        tokenizer=tokenizer,
        device=device,
        trained="adapter",
        precision=precision,
        seed=seed,
        labels=labels,
    )
    if precision == "fp32":
        widen_to_float32(loaded.model)  # a quantized base was loaded in the type of its training
    return loaded


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


def find_prompt_defaults(result: Path, folder: Path, config: Config | None) -> PromptDefaults:
    """Return what training put around each prompt: by the config of the run in `folder`, else by the file in `result`.

    Raises ModelError for a file that cannot be read.
    """
    if config is None:
        return read_prompt_defaults(result)
    decisions = read_json_file(folder / "run.json").get("decisions", ())
    formats = [str(decision.get("value")) for decision in decisions if decision.get("key") == "data.format"]
    return prompt_defaults_of(config.data, formats)


def _make_renderer(tokenizer: PreTrainedTokenizerFast, config: Config | None, defaults: PromptDefaults) -> Renderer:
    data = DataConfig() if config is None else config.data
    template_args = dict(defaults.template_args)
    return Renderer.of_config(
        tokenizer,
        replace(
            data,
            system=defaults.system,
            template_args=template_args,  # type: ignore[arg-type]  # any JSON values, which templates take
            parse_control_tokens=defaults.parse_control_tokens,
        ),
    )
