"""Attach a LoRA adapter to a model through peft.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024,
arXiv:2402.09353. With a quantized base: QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llmtune.adapters.config_file import LoraOptions, shape_of, trained_token_ids
from llmtune.adapters.target_modules import (
    adapted_layers,
    check_modules_to_save,
    check_pattern,
    chosen_layers,
    ends_with,
    targets_are_transposed,
)
from llmtune.common.decisions import Decision
from llmtune.config.dump import value_text
from llmtune.config.schema import AdapterConfig
from llmtune.errors import AdapterError, Problem
from llmtune.models.parameters import count_parameters, find_score_head, trained_parameters
from llmtune.models.quantization import import_bitsandbytes_before_peft
from llmtune.models.read_config import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["attach_adapter", "reads_base", "wrap_with_peft"]


def attach_adapter(
    model: PreTrainedModel,
    adapter_config: AdapterConfig,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    used_ids: Sequence[int] = (),
    start: LoraOptions | None = None,
) -> tuple[PeftModel, list[Decision]]:
    """Freeze the model and put LoRA beside its layers; returns the peft model and the choices made.

    Each targeted layer computes W x + alpha / r * B A x, with alpha / sqrt(r) when `rslora`; A [r, in] is drawn by
    `adapter.init` as a function of (seed, names of the layers) alone, and B A = 0, so outputs are unchanged before the
    first step. Trained weights are float32 whatever the type of the base.

    tokenizer: gives the ids of `train_tokens`. Their rows are trained in the embedding, and in the output head where it
    is a weight of its own; a module that is trained anyway has them already. used_ids: control tokens of the training
    rows; those whose row no training has ever moved are named where it stays frozen. start: options of the adapter to
    start from (see `start_options`), whose shape this one gets.

    Raises AdapterError for names that match no layer, with the nearest, and for unknown tokens.
    """
    check_modules_to_save(model, adapter_config.modules_to_save)
    chosen = chosen_layers(model, adapter_config)
    targets, layers = cast("list[str] | str", chosen["target_modules"]), adapted_layers(model, start or chosen)
    for key in ("rank_pattern", "alpha_pattern"):
        check_pattern(f"adapter.{key}", getattr(adapter_config, key), layers)
    ids = sorted(set(_token_ids(adapter_config.train_tokens, tokenizer)))
    trained_rows = _trained_rows(model, layers, adapter_config.modules_to_save, ids)
    embedding = next(name for name, layer in model.named_modules() if layer is model.get_input_embeddings())
    is_frozen = not _is_trained(embedding, layers, adapter_config.modules_to_save)
    decisions = _untrained_tokens(model, tokenizer, sorted(set(used_ids) - set(ids))) if is_frozen else []
    if start is not None:
        _refuse_other_shape(adapter_config, start, chosen, ids)
    options = start or LoraOptions(
        task_type="SEQ_CLS" if find_score_head(model) is not None else "CAUSAL_LM",
        r=adapter_config.r,
        lora_alpha=adapter_config.alpha,
        lora_dropout=adapter_config.dropout,
        rank_pattern=dict(adapter_config.rank_pattern),
        alpha_pattern=dict(adapter_config.alpha_pattern),
        use_rslora=adapter_config.rslora,
        use_dora=adapter_config.dora,
        trainable_token_indices=trained_rows,
        fan_in_fan_out=targets_are_transposed(model, targets),
        **chosen,
    )
    adapted = wrap_with_peft(model, options)
    # Again, because peft draws from the global generator in the order in which it finds the layers.
    _seed_weights(adapted, seed, adapter_config.init)
    adapted.eval()
    trained = sum(parameter.numel() for parameter in trained_parameters(adapted).values())
    total = count_parameters(adapted)
    share = f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
    varied = " (others by adapter.rank_pattern)" if adapter_config.rank_pattern else ""
    shown = targets if isinstance(targets, str) else ", ".join(targets[:12]) + (" ..." if len(targets) > 12 else "")
    decision = Decision(
        "adapter.target_modules", shown, f"{len(layers)} layers get rank {adapter_config.r}{varied}; {share}"
    )
    return adapted, [decision, *decisions]


def reads_base(adapter: AdapterConfig) -> bool:
    """Whether the adapter begins with numbers of the base, which must have their type by then."""
    begins_with_parts = adapter.init not in ("kaiming", "gaussian", "orthogonal")
    return bool(adapter.dora or adapter.modules_to_save or adapter.start_from or begins_with_parts)


def _refuse_other_shape(adapter: AdapterConfig, options: LoraOptions, chosen: LoraOptions, ids: list[int]) -> None:
    """Raise AdapterError for every given value that is not that of the adapter to start from.

    options: of that adapter. chosen: the layers by the config, resolved for this model. ids: tokens to train by it.
    """
    given = {**vars(adapter), "target_modules": chosen.get("target_modules")}
    found = shape_of(options)
    for key, name in (("exclude_modules", "exclude_modules"), ("layers", "layers_to_transform")):
        if getattr(adapter, key):  # left out, they are the adapter's own
            given[key], found[key] = chosen.get(name), options.get(name)
    for key in ("rank_pattern", "alpha_pattern"):
        if getattr(adapter, key):
            found[key] = options.get(key) or {}
    problems = []
    for key, value in found.items():
        if value is not None and _as_set(given[key]) != _as_set(value):
            problem = (
                f"the adapter to start from has `{key}: {value_text(value)}`, here it is `{value_text(given[key])}`"
            )
            fix = f"leave adapter.{key} out: it is taken over"
            problems.append(Problem(problem, f"adapter.{key}", fix))
    untrained = sorted(set(ids) - set(trained_token_ids(options)))
    if untrained:
        problem = f"the adapter to start from trains no rows of the tokens with ids {untrained[:8]}"
        problems.append(Problem(problem, "adapter.train_tokens", "leave adapter.train_tokens out"))
    if problems:
        raise AdapterError.all(problems)


def _as_set(value: object) -> object:
    return frozenset(value) if isinstance(value, (list, tuple)) else value


def wrap_with_peft(
    model: PreTrainedModel,
    options: LoraOptions,
    *,
    model_word: str = "model",
    where: str = "adapter",
    fix: str = "check adapter.target_modules",
) -> PeftModel:
    """Return peft's wrapper around the model, with trained weights in float32.

    With the task type `SEQ_CLS` peft saves the head whole. The global random state, the network and the screen are left
    alone. model_word, where, fix: words of the error.
    Raises AdapterError when the options do not fit the model.
    """
    import_bitsandbytes_before_peft()
    from peft import LoraConfig, get_peft_model

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=devices):
            # peft declares lora_alpha as a whole number and takes any.
            adapted = cast("PeftModel", get_peft_model(model, LoraConfig(**options)))  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise AdapterError(f"the adapter does not fit this {model_word}: {error}", where=where, fix=fix) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            # Updates are smaller than a 16-bit weight can add (arXiv:1710.03740).
            parameter.data = parameter.data.to(torch.float32)
    return adapted


def _token_ids(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if not tokens:
        return []
    if tokenizer is None:
        raise AdapterError(
            "the ids of the tokens to train are not known", where="adapter.train_tokens", fix="give the tokenizer"
        )
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise AdapterError(
            f"the tokenizer has no token `{missing[0]}`",
            where="adapter.train_tokens",
            fix="add it to the tokenizer first",
        )
    return [vocabulary[token] for token in tokens]


def _trained_rows(
    model: PreTrainedModel, layers: Sequence[str], modules_to_save: Sequence[str], ids: list[int]
) -> list[int] | dict[str, list[int]] | None:
    """Return the rows to train as peft takes them: ids alone for the embedding (and a head tied to it), else by module.

    Raises AdapterError for a tied head that is trained apart from its embedding, which peft then computes wrongly.
    """
    if not ids:
        return None
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {kind: name for name, module in model.named_modules() for kind, layer in ends.items() if module is layer}
    trained = {kind: _is_trained(name, layers, modules_to_save) for kind, name in names.items()}
    is_tied = "head" in names and ends["head"].weight is ends["embedding"].weight  # type: ignore[union-attr]
    if is_tied and trained["head"] and not trained["embedding"]:
        both = ",".join(name.rsplit(".", 1)[-1] for name in names.values())
        raise AdapterError(
            f"`{names['head']}` is tied to `{names['embedding']}`, of which adapter.train_tokens trains single rows",
            where="adapter.train_tokens",
            fix=f"train both as a whole: adapter.modules_to_save=[{both}]; or neither",
        )
    if is_tied:
        return None if trained["embedding"] else ids
    rows = {name: ids for kind, name in names.items() if not trained[kind]}
    return ids if [*rows] == [names["embedding"]] else rows or None


def _is_trained(name: str, layers: Sequence[str], modules_to_save: Sequence[str]) -> bool:
    return name in layers or any(ends_with(name, ending) for ending in modules_to_save)


def _untrained_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]
) -> list[Decision]:
    """Return a line that names the tokens whose embedding rows are zero, or one of several equal rows.

    Published models have such rows for tokens they were never trained on (`<|eot_id|>` of a base model).
    """
    embedding_VE = cast("torch.Tensor", model.get_input_embeddings().weight)
    if tokenizer is None or not ids or embedding_VE.is_meta:
        return []
    untrained = []
    for index in ids:
        row_E = embedding_VE[index]
        # By the first column before whole rows: an embedding may be a gigabyte.
        near = (embedding_VE[:, 0] == row_E[0]).nonzero().squeeze(1)
        # A row that equals another one was filled in (zeros, a mean) and never trained.
        equal = int((embedding_VE[near] == row_E).all(dim=1).sum())
        if equal > 1 or not bool(row_E.any()):
            untrained.append(str(tokenizer.convert_ids_to_tokens(index)))
    if not untrained:
        return []
    names = ",".join(untrained)
    reason = f"no training has moved their embedding rows, and here they stay frozen: adapter.train_tokens=[{names}]"
    return [Decision("untrained tokens", ", ".join(untrained), f"{reason} trains them")]


def _seed_weights(adapted: PeftModel, seed: int, init: str) -> None:
    """Draw the first weights anew, layer by layer in the order of names, as peft draws them (`INITS`).

    On the CPU and from a generator of its own, so that it is the same on every device, library version and rank.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name in sorted(parameters):
            weight = parameters[name]
            if name.endswith("lora_A.default.weight"):
                other = parameters[name.replace("lora_A.default", "lora_B.default")]
                # Those that are computed from the base come later: here it may have no numbers.
                first, second = INITS.get(init, _kaiming)(weight.shape, other.shape, generator)
                weight.copy_(first)
                if second is not None:
                    other.copy_(second)
            elif name.endswith("lora_embedding_B.default"):
                weight.copy_(torch.empty(weight.shape).normal_(generator=generator))


def _kaiming(shape_A: torch.Size, _: torch.Size, generator: torch.Generator) -> tuple[Tensor, None]:
    """A ~ U(+-1 / sqrt(in)), as in He et al. 2015 (arXiv:1502.01852) with a = sqrt(5); B stays 0."""
    bound = 1 / math.sqrt(math.prod(shape_A[1:]))
    return torch.empty(shape_A).uniform_(-bound, bound, generator=generator), None


def _gaussian(shape_A: torch.Size, _: torch.Size, generator: torch.Generator) -> tuple[Tensor, None]:
    """A ~ N(0, 1 / r^2); B stays 0."""
    return torch.empty(shape_A).normal_(std=1 / shape_A[0], generator=generator), None


def _orthogonal(shape_A: torch.Size, shape_B: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A = Q_odd^T R / 10 and B = R' Q_even / 10, whose rows of one orthogonal Q [r, r] make B A = 0 with neither 0.

    https://datta0.github.io/posts/rethink-lora-init/. Raises AdapterError for an odd rank or a layer without a matrix.
    """
    rank = shape_A[0]
    if rank % 2 or len(shape_A) != 2:
        problem = f"an orthogonal pair needs an even rank and a matrix, and this layer's A is {tuple(shape_A)}"
        raise AdapterError(problem, where="adapter.init", fix="make adapter.r even, or adapter.init=gaussian")

    def normal(*size: int) -> Tensor:
        return torch.empty(size).normal_(generator=generator)

    q_RR, _ = torch.linalg.qr(normal(rank, rank))
    first = (normal(shape_A[1], rank // 2) @ q_RR[0::2]).T / 10
    return first, normal(shape_B[0], rank // 2) @ q_RR[1::2] / 10


INITS: dict[str, Callable[[torch.Size, torch.Size, torch.Generator], tuple[Tensor, Tensor | None]]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}
"""Shapes of A [r, in] and B [out, r] to their first values; None where B stays 0."""
