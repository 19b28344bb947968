"""Load a causal language model: the files are checked before any library reads them, and every weight must match."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmtune.common.decisions import Decision
from llmtune.common.dtypes import torch_dtype
from llmtune.common.memory import is_out_of_memory
from llmtune.config.schema import ModelConfig
from llmtune.errors import ConfigError, ModelError, Problem, in_one_line
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.parameters import SCORE_HEADS, checkpointable_blocks
from llmtune.models.quantization import disable_cpu_repacking, quantization_config
from llmtune.models.read_config import auto_class, quiet_libraries, read_config
from llmtune.models.scan import read_json_file, refuse_unsafe_folder, weight_files
from llmtune.models.score_head import as_scoring, zero_new_head
from llmtune.models.scratch import build_config, build_model
from llmtune.models.weights import digest_tensors, inspect_weights, refuse_changed_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "ADDED_ROWS",
    "ATTENTION_IMPLEMENTATIONS",
    "LoadedModel",
    "choose_weight_dtype",
    "load_model",
    "refuse_foreign_quantization",
    "resize_for_tokenizer",
]

ATTENTION_IMPLEMENTATIONS = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash": "flash_attention_2",
    "flex": "flex_attention",
}
"""Value of `model.attention` -> transformers' name; `auto` keeps the library's choice, sdpa where a model has it."""


def _attention_to_load(attention: str) -> str | None:
    """Return transformers' name for a value of `model.attention`, None for the library's choice.

    `flash` trains with torch's own kernel and is read on CPUs too, where transformers refuses it without a package.
    """
    from transformers.utils.import_utils import is_flash_attn_2_available

    name = ATTENTION_IMPLEMENTATIONS.get(attention)
    return None if name == "flash_attention_2" and not is_flash_attn_2_available() else name


ADDED_ROWS = "embedding rows"
"""Key of the choice to add rows; its value is the number of all rows."""

LARGEST_FLOAT16 = 65504.0

TOKEN_HEADS = ("lm_head", "embed_out")
"""Names of the layer that predicts tokens, for which a model that gives scores has no place."""


@dataclass(frozen=True)
class LoadedModel:
    """A Hugging Face causal LM in evaluation mode, before any adapter is attached."""

    model: PreTrainedModel
    base_digest: str
    """sha256 over its weights as published (see `WeightsReport`)."""
    decisions: tuple[Decision, ...] = ()
    blocks_dtype: torch.dtype | None = None
    """The type that the base's weights in decoder blocks are still to be given, where they have that of their files."""
    trains_base: bool = False
    """Whether the base's own weights are trained, not an adapter's beside them."""

    def convert_block(self, block: nn.Module) -> None:
        """Give the base's weights of a block their type, where they do not have it yet."""
        for weight in block.parameters():
            if self.blocks_dtype is not None and (self.trains_base or not weight.requires_grad):
                weight.data = weight.data.to(self.blocks_dtype)


def load_model(
    source: ModelSource,
    model_config: ModelConfig,
    *,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    trained: Literal["full", "adapter"],
    precision: str,
    seed: int,
    trust_remote_code: bool = False,
    blocks_as_stored: bool = False,
    labels: Sequence[str] = (),
) -> LoadedModel:
    """Load or build the model on `device`; the global random state stays as it was.

    precision: `fp32`, `bf16` or `fp16`, the arithmetic of training. seed: of a from-scratch model's weights.
    blocks_as_stored: leave weights of blocks in the files' type where that can be, so that on a CPU they stay in the
    mapped files until a block is converted (`LoadedModel.blocks_dtype`). labels: of a model that gives scores.

    Raises ModelError for files that are unsafe, missing or unreadable, and for weights that are missing, unexpected, of
    another shape or not finite; ConfigError for a contradiction in the config; MachineError when fetching fails.
    """
    if model_config.quantization != "none" and trained == "full":
        raise ConfigError(
            f"model.quantization={model_config.quantization} freezes the weights, and adapter.method=none trains them",
            where="model.quantization",
            fix="adapter.method=lora (QLoRA), or model.quantization=none",
        )
    if source.kind == "scratch":
        return _from_scratch(source, model_config, tokenizer=tokenizer, device=device, seed=seed, labels=labels)
    folder = local_folder(source, code=trust_remote_code)
    refuse_unsafe_folder(folder, trust_remote_code=trust_remote_code, ignore_auto_map=may_ignore_auto_map(source))
    refuse_foreign_quantization(folder, trained)
    # Before a library maps the files: a changed byte is found by digest, whatever it would do.
    refuse_changed_weights(folder)
    weights = inspect_weights(weight_files(folder))
    dtype, decisions = choose_weight_dtype(
        model_config.dtype, trained=trained == "full", precision=precision, largest=weights.largest
    )
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if model_config.quantization != "none":
        kept = SCORE_HEADS if labels else ()
        options["quantization_config"] = quantization_config(model_config.quantization, dtype, kept)
    config = _config_of(folder, labels, tokenizer, trust_remote_code=trust_remote_code)
    # Libraries draw numbers for weights that loading then overwrites.
    with torch.random.fork_rng(devices=[]):
        model = None
        if blocks_as_stored and "quantization_config" not in options:
            model = _load_as_stored(folder, device, model_config.attention, options, config, labels, weights.dtypes)
        blocks_dtype = None if model is None else dtype
        if model is None:
            model = _load_pretrained(folder, device, model_config.attention, options, config, labels)
        decisions += resize_for_tokenizer(model, tokenizer)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        disable_cpu_repacking(model)
    _train_padding_row(model)
    # An adapter's config will name this as its base.
    model.name_or_path = source.location if source.kind == "hub" else str(folder)
    model.eval()
    return LoadedModel(model, weights.digest, tuple(decisions), blocks_dtype, trained == "full")


def choose_weight_dtype(
    requested: str, *, trained: bool, precision: str, largest: float = 0.0
) -> tuple[torch.dtype, list[Decision]]:
    """Return the type that weights are held in, with the reason where `model.dtype` is `auto`.

    requested: `model.dtype`. trained: the weights themselves are trained; they are kept in float32, because updates are
    smaller than a 16-bit type can add (Micikevicius et al. 2018, arXiv:1710.03740). precision: `fp32`, `bf16` or
    `fp16`. largest: greatest absolute weight; one above 65504 does not fit float16.

    Raises ModelError when float16 is requested and a weight does not fit it.
    """
    if requested != "auto":
        if requested == "float16" and largest > LARGEST_FLOAT16:
            raise ModelError(
                f"a weight of {largest:g} does not fit float16",
                where="model.dtype",
                fix="model.dtype=bfloat16 or float32",
            )
        return torch_dtype(requested), []
    if trained:
        name, reason = "float32", "trained weights are kept in float32"
    elif precision == "fp32":
        name, reason = "float32", "the arithmetic is fp32"
    elif precision == "fp16" and largest > LARGEST_FLOAT16:
        name, reason = "float32", f"a weight of {largest:g} does not fit float16"
    else:
        name = "bfloat16" if precision == "bf16" else "float16"
        reason = f"the base is frozen and the arithmetic is {precision}"
    return torch_dtype(name), [Decision("model.dtype", name, reason)]


def resize_for_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[Decision]:
    """Give embedding and head a row for every token id, and return that choice when rows were added.

    New rows are the mean of the old ones, so that no new token starts with a high probability (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Spare rows of the model are used first and never removed.
    """
    rows = cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    # Many models have spare rows, rounded up for their kernels.
    if needed <= rows:
        return []
    with quiet_libraries(), torch.no_grad():
        model.resize_token_embeddings(needed, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:  # a tied head holds the same weight, which gets the same values again
                weight = cast("Tensor", layer.weight)
                # In float32, so that the mean is rounded once.
                weight[rows:] = weight[:rows].to(torch.float32).mean(dim=0).to(weight.dtype)
    reason = f"the tokenizer has {needed - rows} more tokens than the model's {rows} rows"
    return [Decision(ADDED_ROWS, needed, reason)]


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
    source: ModelSource,
    model_config: ModelConfig,
    *,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    seed: int,
    labels: Sequence[str],
) -> LoadedModel:
    if model_config.quantization != "none":
        raise ConfigError(
            "a model built from scratch cannot be quantized", where="model.quantization", fix="model.quantization=none"
        )
    config = build_config(source.entry or source.name, model_config.architecture, tokenizer)
    if labels:
        as_scoring(config, labels, tokenizer, source.name)
    model = build_model(config, seed=seed, labels=labels)
    digest = digest_tensors(sorted(model.named_parameters()))
    if (implementation := _attention_to_load(model_config.attention)) is not None:
        with quiet_libraries():
            model.set_attn_implementation(implementation)
    _train_padding_row(model)
    dtype = torch_dtype(model_config.dtype) if model_config.dtype != "auto" else None
    nn.Module.to(model, device=device, dtype=dtype)
    model.eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    shape = f"{config.num_hidden_layers} layers x {config.hidden_size}, {config.num_attention_heads} heads"
    reason = f"built from scratch with {count:,} parameters: {shape}; seed {seed}"
    return LoadedModel(model, digest, (Decision("model", source.name, reason),))


def _config_of(
    folder: Path, labels: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, trust_remote_code: bool
) -> PreTrainedConfig:
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if labels:
        as_scoring(config, labels, tokenizer, str(folder))
    return config


def _load_as_stored(
    folder: Path,
    device: torch.device,
    attention: str,
    options: dict[str, Any],
    config: PreTrainedConfig,
    labels: Sequence[str],
    stored: frozenset[str],
) -> PreTrainedModel | None:
    """Load the model with what is outside of its blocks in the type of `options`, and blocks in that of the files.

    None where that could give other numbers than loading all of it in one type.
    """
    if len(stored) != 1 or not stored <= {"float32", "bfloat16", "float16"}:
        return None
    model = _load_pretrained(
        folder, device, attention, options | {"dtype": torch_dtype(*stored)}, copy.deepcopy(config), labels
    )
    # Other buffers than those of rotary positions, always float32, are computed in the model's type.
    if any(buffer.is_floating_point() and not name.endswith("inv_freq") for name, buffer in model.named_buffers()):
        return None
    in_blocks = {id(weight) for block in checkpointable_blocks(model) for weight in block.parameters()}
    if not in_blocks or model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return None
    for weight in model.parameters():
        if id(weight) not in in_blocks:
            weight.data = weight.data.to(options["dtype"])
    model.config.dtype = options["dtype"]
    return model


def _load_pretrained(
    folder: Path,
    device: torch.device,
    attention: str,
    options: dict[str, Any],
    config: PreTrainedConfig,
    labels: Sequence[str],
) -> PreTrainedModel:
    where = str(folder)
    # Straight to the device: a copy on the CPU first would take the memory of the model twice.
    if "quantization_config" in options or device.type != "cpu":
        options["device_map"] = {"": device}
    from_pretrained: Callable[..., Any] = auto_class(labels).from_pretrained
    try:
        with quiet_libraries():
            model, info = from_pretrained(
                where,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=_attention_to_load(attention),
                ignore_mismatched_sizes=True,  # all of them are refused by name below, not the first one by a traceback
                **options,
            )
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
        # A model that is too large is not a damaged one; the caller has its own message for it.
        if is_out_of_memory(error):
            raise
        fix = (
            "check that it is a causal language model this version of transformers knows, "
            "and that its files are complete"
        )
        raise ModelError(f"the model cannot be loaded: {in_one_line(error)}", where=where, fix=fix) from error
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if labels:
        is_new = any(name.split(".")[0] in SCORE_HEADS for name in missing)
        missing = {name for name in missing if name.split(".")[0] not in SCORE_HEADS}
        unexpected = {name for name in unexpected if name.split(".")[0] not in TOKEN_HEADS}
        if is_new:
            zero_new_head(model)
    problems = [
        *_weight_problems("is missing in the files", missing, where),
        *_weight_problems("is in the files, and the model has no place for it", unexpected, where),
        *_weight_problems("has another shape in the files than in the model", info["mismatched_keys"], where),
    ]
    if problems:
        raise ModelError.all(problems)
    return model


def _train_padding_row(model: PreTrainedModel) -> None:
    """Let the embedding row of the padding token get gradients.

    Where that token also ends a turn, `padding_idx` would silently keep its row from being trained. Padding itself gets
    no gradient either way, because it is masked by position.
    """
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None  # type: ignore[assignment]


def _weight_problems(problem: str, names: Iterable[str | tuple[str, ...]], where: str) -> list[Problem]:
    """Return one problem for all `names`, the first by name."""
    # A weight of another shape is listed together with both shapes.
    shown = sorted(name[0] if isinstance(name, tuple) else name for name in names)
    if not shown:
        return []
    others = f" (and {len(shown) - 1} more)" if len(shown) > 1 else ""
    fix = "fetch the model again; nothing is filled in with random numbers"
    return [Problem(f"the weight `{shown[0]}`{others} {problem}", where, fix)]
