"""A model without its weights: built on torch's meta device, counted exactly, and given fake tensors to be traced with.

Meta and fake tensors have a shape and a type and no values, so the model of 8B parameters costs a few megabytes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtune.adapters import attach
from llmtune.adapters.start import start_options
from llmtune.adapters.target_modules import adapted_layers, block_of, chosen_layers, ends_with
from llmtune.config.process_options import Options
from llmtune.config.schema import AdapterConfig, Config
from llmtune.engine.masters import make_masters
from llmtune.errors import LlmtuneError, ModelError, in_one_line
from llmtune.kernels.weight_offload import is_offloaded, piece_bytes
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.load import refuse_foreign_quantization
from llmtune.models.parameters import (
    base_model_of,
    checkpointable_blocks,
    find_score_head,
    freeze_all_but,
    trained_parameters,
)
from llmtune.models.read_config import auto_class, quiet_libraries, read_config
from llmtune.models.scan import refuse_unsafe_folder, weight_files
from llmtune.models.score_head import as_scoring
from llmtune.models.scratch import build_config
from llmtune.prepare import Prepared

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelShape",
    "ModelSizes",
    "adapted_layers_of",
    "build_meta_model",
    "count_sizes",
    "decoder_blocks",
    "quantized_weights",
    "read_shape",
    "to_fake_tensors",
]


@dataclass(frozen=True)
class ModelShape:
    """The architecture of a run's model, and the bytes of its published weights."""

    config: PretrainedConfig
    """With an embedding row for each token of the run's tokenizer."""
    file_bytes: int
    """Size of the weight files that loading reads; 0 for a scratch model and before a hub model is fetched."""
    trust_remote_code: bool = False
    labels: tuple[str, ...] = ()
    """Of a model that gives scores."""

    @property
    def blocks(self) -> int:
        """Decoder blocks."""
        return int(self.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class ModelSizes:
    """Exact sizes of a model with its adapter."""

    parameters: int
    """All entries, tied ones once; a 4-bit weight counts its entries."""
    trained: int
    """Entries that training changes."""
    base_bytes: int
    """Bytes of the model's own weights (frozen, or trained in full) and buffers as held in memory."""
    adapter_bytes: int
    """Bytes of what an adapter adds."""
    gradient_bytes: int
    """Bytes of all gradients: one for each trained weight, in its type, or its master's."""
    largest_gradient_bytes: int
    """Bytes of the largest gradient, usually the embedding's."""
    unit_bytes: int
    """Bytes of the weights that are whole at once where weights are sharded: those outside of the blocks, and the two
    largest blocks (the next one is gathered while one is computed).
    """
    block_bytes: int
    """Bytes of the weights in blocks; quantized ones as they are stored."""
    outside_bytes: int
    """Bytes of the weights outside of the blocks."""
    offloaded_bytes: int
    """Bytes of the frozen matrices of blocks, which wait on the host with `model.offload_weights`; 0 without."""
    two_offloaded_bytes: int
    """Of these the two largest blocks', which are on the device together."""


def read_shape(prepared: Prepared, options: Options) -> ModelShape:
    """Read the architecture of the run's model; of a hub model only the small files are fetched.

    Raises ModelError for files that are missing, unsafe, or no model's, MachineError where the hub cannot be reached.
    """
    config, source, tokenizer = prepared.config, prepared.source, prepared.tokenizer.tokenizer
    if source.kind == "scratch":
        model_config = build_config(source.entry or source.name, config.model.architecture, tokenizer)
        if prepared.labels:
            as_scoring(model_config, prepared.labels, tokenizer, source.name)
        return ModelShape(model_config, 0, labels=prepared.labels)
    trust = options.trust_remote_code
    folder = local_folder(source, weights=False, code=trust)
    refuse_unsafe_folder(folder, trust_remote_code=trust, ignore_auto_map=may_ignore_auto_map(source))
    refuse_foreign_quantization(folder, "adapter" if config.adapter.method != "none" else "full")
    model_config = read_config(folder, trust_remote_code=trust)
    if prepared.labels:
        as_scoring(model_config, prepared.labels, tokenizer, str(folder))
    text = model_config.get_text_config()
    text.vocab_size = max(text.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    try:
        file_bytes = sum(file.stat().st_size for file in weight_files(folder))
    except LlmtuneError:
        file_bytes = 0  # a hub model that is not fetched yet
    return ModelShape(model_config, file_bytes, trust, prepared.labels)


def build_meta_model(
    shape: ModelShape,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    blocks: int | None = None,
    layers: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Build the model on the meta device, with the adapter of `config`; only its first `blocks` blocks when given.

    layers: full names of the layers that get an adapter (with `model.train_only`: of the parameters that are trained),
    in place of those of `config`: what that says of a block may be of one that a model of few blocks lacks. None is
    adapted where the list is empty.

    Raises ModelError for an architecture that no model can have, AdapterError for an adapter that does not fit it.
    """
    model_config = copy.deepcopy(shape.config)
    if blocks is not None:
        _keep_first_blocks(model_config, blocks)
    with quiet_libraries(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        try:
            model = auto_class(shape.labels).from_config(
                model_config, dtype=dtype, trust_remote_code=shape.trust_remote_code
            )
        except BUILD_ERRORS as error:
            problem = f"the model that its config.json describes cannot be built: {in_one_line(error)}"
            fix = "fetch the file again, or name another model"
            raise ModelError(problem, where=config.model.name, fix=fix) from error
        if layers is not None:
            adapter, start = _adapter_on(model, config.adapter, layers), None
        else:
            adapter = config.adapter
            start = start_options(config) if adapter.start_from is not None else None
        if adapter.method != "none":
            model, _ = attach.attach_adapter(model, adapter, seed=0, tokenizer=tokenizer, start=start)
        elif config.model.train_only:
            _freeze(model, config.model.train_only, layers)
    return model


def adapted_layers_of(shape: ModelShape, config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the full names of the layers of the whole model that get an adapter, in the model's order.

    With `model.train_only`: of the parameters that are trained. None where every weight is. Raises AdapterError or
    ConfigError for names that match nothing in any block.
    """
    if config.model.train_only:
        return list(trained_parameters(build_meta_model(shape, config, tokenizer, dtype=torch.float32)))
    if config.adapter.method == "none":
        return []
    model = build_meta_model(shape, config, tokenizer, dtype=torch.float32, layers=())
    start = start_options(config) if config.adapter.start_from is not None else None
    return adapted_layers(model, start or chosen_layers(model, config.adapter))


def _freeze(model: PreTrainedModel, patterns: Sequence[str], names: Sequence[str] | None) -> None:
    """Freeze what `patterns` leave out; on a model of few blocks, what no block of the whole model trains.

    names: parameters that the whole model trains; None for the whole model itself.
    """
    if names is None:
        freeze_all_but(model, patterns)
        return
    parts = [block_of(name) for name in names]
    inside, outside = {part[1] for part in parts if part}, {name for name in names if block_of(name) is None}
    for name, parameter in model.named_parameters():
        part = block_of(name)
        parameter.requires_grad_(name in outside if part is None else part[1] in inside)


def _adapter_on(model: PreTrainedModel, adapter: AdapterConfig, layers: Sequence[str]) -> AdapterConfig:
    """Return an adapter on a model of few blocks: every block gets what any block of the whole model gets."""
    parts = [block_of(name) for name in layers]
    inside, outside = {part[1] for part in parts if part}, {name for name in layers if block_of(name) is None}
    names = [name for name, _ in model.named_modules() if name]
    targets = [name for name in names if name in outside or ((part := block_of(name)) and part[1] in inside)]
    if not targets:
        return replace(adapter, method="none")
    saved = tuple(end for end in adapter.modules_to_save if any(ends_with(name, end) for name in names))
    return replace(
        adapter, target_modules=tuple(targets), exclude_modules=(), layers=None, rank_pattern={}, alpha_pattern={},
        modules_to_save=saved, start_from=None,
    )  # fmt: skip


BUILD_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError)
"""Errors of transformers for a config whose values contradict each other."""


def _keep_first_blocks(model_config: PretrainedConfig, blocks: int) -> None:
    text = model_config.get_text_config()
    # Fewer blocks, each of its full size, because blocks are alike.
    text.num_hidden_layers = blocks
    for key in ("layer_types", "mlp_layer_types"):  # one entry a block, where a model's blocks differ
        if getattr(text, key, None):
            setattr(text, key, getattr(text, key)[:blocks])


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks in order; the decoder itself where a model's own code has no such blocks."""
    decoder = base_model_of(model).get_decoder()
    return [*checkpointable_blocks(decoder)] or [decoder]


def count_sizes(model: PreTrainedModel, config: Config) -> ModelSizes:
    """Count a meta model of all blocks exactly; 4-bit and 8-bit weights by `quantized_bytes`."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if config.training.master_weights is True:
        trained = list(make_masters(model).values())
    quantized = quantized_weights(model) if config.model.quantization != "none" else {}
    part_bytes: Counter[str] = Counter()
    for weight in model.parameters():
        part = "adapter" if weight.requires_grad and config.adapter.method != "none" else "base"
        is_quantized = id(weight) in quantized
        part_bytes[part] += quantized_bytes(weight.shape, config.model.quantization) if is_quantized else weight.nbytes
    outside, two_blocks = _unit_bytes(model)
    pieces = _offloaded(model, quantized) if config.model.offload_weights else []
    in_blocks = part_bytes.total() - outside
    part_bytes["base"] += sum(buffer.nbytes for buffer in model.buffers())
    return ModelSizes(
        parameters=sum(weight.numel() for weight in model.parameters()),
        trained=sum(weight.numel() for weight in trained),
        base_bytes=part_bytes["base"],
        adapter_bytes=part_bytes["adapter"],
        gradient_bytes=sum(weight.nbytes for weight in trained),
        largest_gradient_bytes=max((weight.nbytes for weight in trained), default=0),
        unit_bytes=outside + two_blocks,
        block_bytes=in_blocks,
        outside_bytes=outside,
        offloaded_bytes=sum(pieces),
        two_offloaded_bytes=sum(pieces[-2:]),
    )


def _offloaded(model: PreTrainedModel, quantized: Collection[int]) -> list[int]:
    """Bytes of each block's frozen matrices, ascending; of a 4-bit one its entries and the scales of its blocks."""

    def sizes(weight: torch.Tensor) -> tuple[int, ...]:
        return (-(-weight.numel() // 2), -(-weight.numel() // 64)) if id(weight) in quantized else (weight.nbytes,)

    blocks = checkpointable_blocks(model)
    offloaded = ([weight for weight in block.parameters() if is_offloaded(weight)] for block in blocks)
    return sorted(piece_bytes([size for weight in weights for size in sizes(weight)]) for weights in offloaded)


def _unit_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the weights outside of the blocks, and of the two largest blocks."""
    blocks = [{id(weight): weight.nbytes for weight in block.parameters()} for block in checkpointable_blocks(model)]
    inside = {name for block in blocks for name in block}
    outside = sum(weight.nbytes for weight in model.parameters() if id(weight) not in inside)
    return outside, sum(sorted((sum(block.values()) for block in blocks), reverse=True)[:2])


def quantized_bytes(shape: torch.Size, kind: str) -> int:
    """Bytes of one frozen weight of that shape, [outputs, inputs], in `4bit` or `8bit`, with its scales.

    4bit: NF4 with double quantization (arXiv:2305.14314): half a byte an entry, a byte of scale for each 64 entries,
    four bytes for each 256 of those scales, two code tables of 16 and 256 float32 numbers and a float32 offset.
    8bit: a byte an entry, a float32 scale a row (arXiv:2208.07339).

    >>> quantized_bytes(torch.Size([64, 64]), "4bit"), quantized_bytes(torch.Size([64, 64]), "8bit")
    (3208, 4352)
    """
    entries = shape.numel()
    if kind == "8bit":
        return entries + 4 * shape[0]
    scales = -(-entries // 64)
    return -(-entries // 2) + scales + 4 * -(-scales // 256) + 4 * (256 + 16) + 4


def quantized_weights(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    """Return the weights [outputs, inputs] that loading quantizes, by id: of every frozen linear layer but the head."""
    base = base_model_of(model)
    head = base.get_output_embeddings() or getattr(find_score_head(base), "original_module", None)
    layers = [
        module.get_base_layer() if hasattr(module, "get_base_layer") else module
        for name, module in model.named_modules()
        if "lora_" not in name and "modules_to_save" not in name
    ]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"]
    return {
        id(layer.weight): layer.weight
        for layer in linear
        if layer is not head and layer.weight.dim() == 2 and not layer.weight.requires_grad
    }  # type: ignore[misc]


def to_fake_tensors(model: PreTrainedModel, mode: FakeTensorMode) -> None:
    """Replace every meta tensor of `model` by a fake CPU tensor of `mode`; tied ones stay tied."""
    fakes: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in fakes:
                            fakes[id(tensor)] = _fake(tensor)
                        tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
