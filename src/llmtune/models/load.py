"""Load a causal language model safely: what is on disk is checked first, and what comes back is exactly what was there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtune.common.decisions import Decision
from llmtune.common.dtypes import torch_dtype
from llmtune.config.schema import ModelConfig
from llmtune.errors import ConfigError, ModelError, Problem, in_one_line
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.quiet_libraries import quiet_libraries
from llmtune.models.read_config import read_config
from llmtune.models.scan import read_json_file, refuse_unsafe_folder, weight_files

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedModel", "context_length", "load_model", "resize_for_tokenizer"]

_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class LoadedModel:
    """A Hugging Face causal LM in evaluation mode.

    `base_digest` is sha256 over its weights as published (see `WeightsReport`).
    """

    model: Any
    base_digest: str
    decisions: tuple[Decision, ...] = ()


def load_model(
    source: ModelSource,
    model_config: ModelConfig,
    *,
    tokenizer: Any,
    device: torch.device,
    trained: Literal["full", "adapter"],
    precision: str,
    seed: int,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load or build the model on `device`.

    The global random state is left as it was, gradients are not switched on or off.

    precision: `fp32`, `bf16` or `fp16`, the arithmetic of training. seed: of a from-scratch model's weights. Raises
    ModelError for whatever is unsafe, missing, unexpected, of another shape or not finite; ConfigError for a
    contradiction.
    """
    import torch

    if model_config.quantization != "none" and trained == "full":
        raise ConfigError(
            f"model.quantization={model_config.quantization} freezes the weights, and adapter.method=none trains them",
            where="model.quantization",
            fix="adapter.method=lora (QLoRA), or model.quantization=none",
        )
    if source.kind == "scratch":
        return _from_scratch(source, model_config, tokenizer=tokenizer, device=device, seed=seed)
    folder = local_folder(source, code=trust_remote_code)
    refuse_unsafe_folder(folder, trust_remote_code=trust_remote_code, ignore_auto_map=may_ignore_auto_map(source))
    refuse_foreign_quantization(folder, trained)
    digest, largest = _checked_weights(folder)
    dtype, decisions = _choose_dtype(model_config, trained, precision, largest)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if model_config.quantization != "none":
        from llmtune.models.quantization import quantization_config

        options["quantization_config"] = quantization_config(model_config.quantization, dtype)
    with torch.random.fork_rng(devices=[]):
        model, more = _read(folder, device, model_config.attention, options)
        decisions += more
        decisions += resize_for_tokenizer(model, tokenizer)
    _keep_quantized_exact(model)
    _train_every_row(model)
    model.name_or_path = (
        source.location if source.kind == "hub" else str(folder)
    )  # what an adapter's config will name as its base
    model.eval()
    return LoadedModel(model, digest, tuple(decisions))


def context_length(config: Any) -> int | None:
    """The longest sequence this model was made for, in tokens; None when its config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(value) if value else None


def resize_for_tokenizer(model: Any, tokenizer: Any) -> list[Decision]:
    """Give the embedding a row for every token id.

    New rows are the mean of the old ones, so that no new token starts out loud.

    Spare rows that a model already has are used first, and never taken away.
    """
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        return []
    with quiet_libraries(), torch.no_grad():
        model.resize_token_embeddings(needed, mean_resizing=False)
        for layer in {
            id(one): one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None
        }.values():
            layer.weight[rows:] = layer.weight[:rows].to(torch.float32).mean(dim=0).to(layer.weight.dtype)
    return [
        Decision(
            "embedding rows", needed, f"the tokenizer has {needed - rows} more tokens than the model's {rows} rows"
        )
    ]


def refuse_foreign_quantization(folder: Path, trained: Literal["full", "adapter"]) -> None:
    """Raise ModelError for weights published in a quantized form that cannot be trained here."""
    config = read_json_file(folder / "config.json")
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    if not stored:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if method == "bitsandbytes" and trained == "adapter":
        return
    fix = (
        "adapter.method=lora" if method == "bitsandbytes" else "use the unquantized model with model.quantization=4bit"
    )
    problem = f"the weights are published quantized with `{method}`, and cannot be trained so"
    raise ModelError(problem, where=f"{folder}/config.json", fix=fix)


def _from_scratch(
    source: ModelSource, model_config: ModelConfig, *, tokenizer: Any, device: torch.device, seed: int
) -> LoadedModel:
    from llmtune.models.scratch import build_config, build_model
    from llmtune.models.weights import digest_tensors

    if model_config.quantization != "none":
        raise ConfigError(
            "a model built from scratch cannot be quantized", where="model.quantization", fix="model.quantization=none"
        )
    model = build_model(build_config(source.entry or source.name, model_config.architecture, tokenizer), seed=seed)
    digest = digest_tensors(sorted(model.named_parameters()))
    set_attention(model, model_config.attention)
    _train_every_row(model)
    model.to(device=device, dtype=torch_dtype(model_config.dtype) if model_config.dtype != "auto" else None)
    model.eval()
    count = sum(one.numel() for one in model.parameters())
    shape = f"{model.config.num_hidden_layers} layers x {model.config.hidden_size}, {model.config.num_attention_heads} heads"
    why = f"built from scratch with {count:,} parameters: {shape}; seed {seed}"
    return LoadedModel(model, digest, (Decision("model", source.name, why),))


def _checked_weights(folder: Path) -> tuple[str, float]:
    """(digest, largest absolute value) of the weights on disk, every value checked."""
    from llmtune.models.weights import inspect_weights, refuse_changed_weights

    refuse_changed_weights(folder)
    report = inspect_weights(weight_files(folder))
    return report.digest, report.largest


def _choose_dtype(
    model_config: ModelConfig, trained: str, precision: str, largest: float
) -> tuple[Any, list[Decision]]:
    if model_config.dtype != "auto":
        if model_config.dtype == "float16" and largest > _LARGEST_HALF:
            raise ModelError(
                f"a weight of {largest:g} does not fit float16",
                where="model.dtype",
                fix="model.dtype=bfloat16 or float32",
            )
        return torch_dtype(model_config.dtype), []
    if trained == "full" or precision == "fp32":
        reason = "trained weights are kept in float32" if trained == "full" else "the arithmetic is fp32"
        return torch_dtype("float32"), [Decision("model.dtype", "float32", reason)]
    if precision == "fp16" and largest > _LARGEST_HALF:
        return torch_dtype("float32"), [
            Decision("model.dtype", "float32", f"a weight of {largest:g} does not fit float16")
        ]
    name = "bfloat16" if precision == "bf16" else "float16"
    return torch_dtype(name), [Decision("model.dtype", name, f"the base is frozen and the arithmetic is {precision}")]


def _read(folder: Path, device: torch.device, attention: str, options: dict[str, Any]) -> tuple[Any, list[Decision]]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from llmtune.models.memory_errors import is_out_of_memory

    where = str(folder)
    if "quantization_config" in options or device.type != "cpu":
        options["device_map"] = {"": device}
    config = read_config(folder, trust_remote_code=options["trust_remote_code"])
    try:
        with quiet_libraries():
            read: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
            model, info = read(
                where, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True,
                attn_implementation=_ATTENTION.get(attention), ignore_mismatched_sizes=True, **options,  # refused below, by name
            )  # fmt: skip
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OSError,
        ImportError,
        SafetensorError,
    ) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"the model cannot be loaded: {in_one_line(error)}", where=where, fix=_LOAD_FIX) from error
    problems = [
        *_listed("is missing in the files", info["missing_keys"], where),
        *_listed("is in the files, and the model has no place for it", info["unexpected_keys"], where),
        *_listed("has another shape in the files than in the model", info["mismatched_keys"], where),
    ]
    if problems:
        raise ModelError.all(problems)
    return model, []


def set_attention(model: Any, attention: str) -> None:
    """Choose the attention implementation of a built model.

    `auto` keeps the library's choice, which is sdpa where a model has it.
    """
    if attention in _ATTENTION:
        with quiet_libraries():
            model.set_attn_implementation(_ATTENTION[attention])


def _train_every_row(model: Any) -> None:
    """Let the embedding of the padding token be trained: where it is also the end-of-turn token its row would silently
    stay as it was.

    Padding itself gets no gradient either way: it is masked by position.
    """
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None


def _keep_quantized_exact(model: Any) -> None:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        from llmtune.models.quantization import disable_cpu_repacking

        disable_cpu_repacking(model)


def _listed(what: str, names: Any, where: str) -> list[Problem]:
    shown = sorted(str(one[0] if isinstance(one, tuple) else one) for one in names)
    if not shown:
        return []
    more = f" (and {len(shown) - 1} more)" if len(shown) > 1 else ""
    return [
        Problem(
            f"the weight `{shown[0]}`{more} {what}",
            where,
            "fetch the model again; nothing is filled in with random numbers",
        )
    ]


_ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2", "flex": "flex_attention"}
_LOAD_FIX = (
    "check that it is a causal language model this version of transformers knows, and that its files are complete"
)
