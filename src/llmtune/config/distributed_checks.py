"""What contradicts the ways in which weights are held: divided among processes, on the host, or in two types.

Many keys need whole weights, gradients or rows in one process, on its device.
"""

from __future__ import annotations

from collections.abc import Callable

from llmtune.config.contradiction import Contradiction
from llmtune.config.schema import Config

__all__ = [
    "DISTRIBUTED_CONTRADICTIONS",
    "SHARDED_OPTIMIZERS",
    "WEIGHT_CONTRADICTIONS",
    "reason_against_masters",
    "reason_against_sharding",
    "takes_deepspeed",
]

DIVIDED_BY = ("distributed.strategy", "distributed.zero_stage", "distributed.deepspeed_config")
"""Keys that each ask for DeepSpeed, where the strategy does not name another."""

SHARDED_OPTIMIZERS = ("adamw", "sgd", "muon")
"""Optimizers that move a weight of which each process holds a part."""

SHARDED_OBJECTIVES = ("sft", "dpo", "simpo", "orpo", "kto")
"""Objectives for which every process runs the same number of forward passes: drawn answers end when they end, and a
new head of scores has been tried whole only.
"""


def _shards(config: Config) -> bool:
    return config.distributed.strategy == "fsdp" or takes_deepspeed(config)


def takes_deepspeed(config: Config) -> bool:
    """Whether several processes would hold the weights by DeepSpeed: named, or by `auto` where its keys are set."""
    distributed = config.distributed
    is_named = distributed.deepspeed_config is not None or distributed.zero_stage is not None
    return distributed.strategy == "deepspeed" or (distributed.strategy == "auto" and is_named)


def reason_against_sharding(config: Config) -> str | None:
    """Give the key because of which the weights of a run cannot be divided by its strategy, or by fsdp, or None."""
    if config.distributed.strategy == "ddp":
        return None
    by_deepspeed = takes_deepspeed(config)
    optimizers = ("adamw",) if by_deepspeed else SHARDED_OPTIMIZERS
    against = {
        "training.optimizer": config.training.optimizer not in optimizers,
        "model.quantization": config.model.quantization == "8bit"
        or (by_deepspeed and config.model.quantization != "none"),
        "model.offload_weights": config.model.offload_weights,
        "training.precision": by_deepspeed and config.training.precision == "fp16",
        "training.compile": by_deepspeed and config.training.compile,
        "adapter.modules_to_save": by_deepspeed and bool(config.adapter.modules_to_save),
        "adapter.train_tokens": by_deepspeed and bool(config.adapter.train_tokens),
        "adapter.dora": by_deepspeed and config.adapter.dora,
        "objective.method": config.objective.method not in (("sft",) if by_deepspeed else SHARDED_OBJECTIVES),
        "distributed.sequence_parallel": by_deepspeed and config.distributed.sequence_parallel > 1,
        "objective.reference": config.objective.reference == "model",
        "training.step_in_backward": config.training.step_in_backward,
        "tracking.watch": bool(config.tracking.watch),
    }
    return next((key for key, is_against in against.items() if is_against), None)


def reason_against_masters(config: Config) -> str | None:
    """Give the key because of which a run cannot have float32 masters beside bf16 weights, or None."""
    return next((key for key, (is_against, _, _) in _AGAINST_MASTERS.items() if is_against(config)), None)


def _shares_rows(config: Config) -> bool:
    return config.distributed.sequence_parallel > 1


DISTRIBUTED_CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction(
        ("distributed.deepspeed_config", "distributed.strategy"),
        lambda c, _: c.distributed.deepspeed_config is not None and c.distributed.strategy in ("ddp", "fsdp"),
        "a DeepSpeed file is given, but the strategy is another",
        "set `distributed.strategy: deepspeed`, or remove the file",
    ),
    Contradiction(
        ("distributed.zero_stage", "distributed.strategy"),
        lambda c, _: c.distributed.zero_stage is not None and not takes_deepspeed(c),
        "stages are those of DeepSpeed's ZeRO, and the strategy is another",
        "set `distributed.strategy: deepspeed`, or remove `distributed.zero_stage`",
    ),
    Contradiction(
        ("distributed.offload", "distributed.strategy"),
        lambda c, _: c.distributed.offload in ("optimizer", "all") and not _shards(c),
        "every process holds the whole model on its device, and nothing waits on the host",
        "set `distributed.strategy: fsdp` or `deepspeed`, or `distributed.offload: none`",
    ),
    Contradiction(
        ("distributed.offload", "distributed.strategy"),
        lambda c, _: c.distributed.offload == "optimizer" and c.distributed.strategy == "fsdp",
        "fsdp keeps the optimizer's state where the weights are",
        "set `distributed.offload: all`, or `distributed.strategy: deepspeed`",
    ),
    Contradiction(
        ("distributed.offload", "distributed.zero_stage"),
        lambda c, _: c.distributed.offload == "all" and c.distributed.zero_stage in (1, 2),
        "weights wait on the host only where they are divided",
        "set `distributed.zero_stage: 3`, or `distributed.offload: optimizer`",
    ),
    Contradiction(
        ("training.optimizer", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and c.training.optimizer != "adamw",
        "DeepSpeed moves flat parts of many weights at once, which only AdamW is the same on",
        "set `training.optimizer: adamw`, or `distributed.strategy: fsdp`",
    ),
    Contradiction(
        ("model.quantization", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and c.model.quantization != "none",
        "quantized weights lose their scales in DeepSpeed's parts",
        "set `distributed.strategy: fsdp` with `model.quantization: 4bit`, or `model.quantization: none`",
    ),
    Contradiction(
        ("training.precision", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and c.training.precision == "fp16",
        "the loss scale of fp16 and DeepSpeed's clipping do not know of each other",
        "set `training.precision: bf16`, or `distributed.strategy: fsdp`",
    ),
    Contradiction(
        ("training.compile", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and c.training.compile,
        "compiled blocks do not gather their weights",
        "set `training.compile: false`, or `distributed.strategy: fsdp`",
    ),
    Contradiction(
        ("adapter.modules_to_save", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and bool(c.adapter.modules_to_save),
        "processes wait for each other where DeepSpeed gathers a layer that lies beside its frozen copy",
        "leave `adapter.modules_to_save` out, or set `distributed.strategy: fsdp`",
    ),
    Contradiction(
        ("adapter.train_tokens", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and bool(c.adapter.train_tokens),
        "single rows of a table are not trained in DeepSpeed's parts",
        "leave `adapter.train_tokens` out, or set `distributed.strategy: fsdp`",
    ),
    Contradiction(
        ("adapter.dora", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and c.adapter.dora,
        "DoRA reads whole weights outside of their layers, which is not tried where DeepSpeed holds them",
        "set `adapter.dora: false`, or `distributed.strategy: fsdp`",
    ),
    Contradiction(
        ("training.optimizer", "distributed.strategy"),
        lambda c, _: c.distributed.strategy == "fsdp" and c.training.optimizer not in SHARDED_OPTIMIZERS,
        "this optimizer cannot move weights of which each process holds a part",
        "set `training.optimizer` to adamw, muon or sgd, or `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("model.quantization", "distributed.strategy"),
        lambda c, _: c.distributed.strategy == "fsdp" and c.model.quantization == "8bit",
        "weights in 8 bits lose their scales when they are sharded",
        "set `model.quantization: 4bit`, or `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("model.offload_weights", *DIVIDED_BY),
        lambda c, _: _shards(c) and c.model.offload_weights,
        "weights wait on the host in one of two ways: whole, or in parts of each process",
        "set `model.offload_weights: false` (fsdp has an offload of its own), or `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("objective.method", *DIVIDED_BY),
        lambda c, _: takes_deepspeed(c) and c.objective.method != "sft",
        "the reference of answers that are compared or drawn, and a head of scores, are not held in DeepSpeed's parts",
        "set `distributed.strategy: fsdp`, or `ddp` for drawn answers, or `objective.method: sft`",
    ),
    Contradiction(
        ("objective.method", "distributed.strategy"),
        lambda c, _: c.distributed.strategy == "fsdp" and c.objective.method not in SHARDED_OBJECTIVES,
        "answers are drawn, and rows scored, only where every process holds the whole model",
        "set `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("objective.reference", "distributed.strategy"),
        lambda c, _: _shards(c) and c.objective.reference == "model",
        "a second model would lie whole in every process",
        "set `distributed.strategy: ddp`, or leave `objective.reference` and `objective.reference_model` out",
    ),
    Contradiction(
        ("training.step_in_backward", "distributed.strategy"),
        lambda c, _: _shards(c) and c.training.step_in_backward,
        "a weight that moves in the backward pass cannot wait for the parts of the other processes",
        "set `training.step_in_backward: false`, or train in one process",
    ),
    Contradiction(
        ("tracking.watch", "distributed.strategy"),
        lambda c, _: _shards(c) and bool(c.tracking.watch),
        "histograms are made by one process, which does not have the whole gradient",
        "set `tracking.watch: false`, or `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("distributed.sequence_parallel", *DIVIDED_BY),
        lambda c, _: _shares_rows(c) and takes_deepspeed(c),
        "processes share rows only where they hold the weights in ways of llmtune's own",
        "set `distributed.strategy: fsdp`, or `distributed.sequence_parallel: 1`",
    ),
    Contradiction(
        ("distributed.sequence_parallel", "objective.method"),
        lambda c, _: _shares_rows(c) and c.objective.method != "sft",
        "answers are drawn and compared only where a process computes the whole row",
        "set `distributed.sequence_parallel: 1`; `distributed.strategy: fsdp` saves memory too",
    ),
    Contradiction(
        ("distributed.sequence_parallel", "training.engine"),
        lambda c, _: _shares_rows(c) and c.training.engine == "plain",
        "the plain engine computes whole rows",
        "set `training.engine: auto`, or `distributed.sequence_parallel: 1`",
    ),
    Contradiction(
        ("distributed.sequence_parallel", "training.neftune_alpha"),
        lambda c, _: _shares_rows(c) and c.training.neftune_alpha is not None,
        "noise is drawn for whole rows",
        "remove `training.neftune_alpha`, or set `distributed.sequence_parallel: 1`",
    ),
)

_AGAINST_MASTERS: dict[str, tuple[Callable[[Config], bool], str, str]] = {
    "adapter.method": (
        lambda c: c.adapter.method != "none",
        "what an adapter trains is in float32 already",
        "set `training.master_weights: auto`, or `adapter.method: none`",
    ),
    "model.dtype": (
        lambda c: c.model.dtype not in ("auto", "float32"),
        "masters begin with the weights as they are published, and these would be rounded",
        "set `model.dtype: auto`",
    ),
    "training.precision": (
        lambda c: c.training.precision not in ("auto", "bf16"),
        "the model beside its masters is in bf16, and so is its arithmetic",
        "set `training.precision: bf16`",
    ),
    "training.step_in_backward": (
        lambda c: c.training.step_in_backward,
        "a master moves with all others, after the backward pass",
        "set `training.step_in_backward: false`, or `training.master_weights: false`",
    ),
    "objective.method": (
        lambda c: c.objective.method != "sft",
        "masters are kept in supervised fine-tuning alone so far",
        "set `training.master_weights: false`",
    ),
    "distributed.strategy": (
        _shards,
        "weights that are divided among processes have no masters yet",
        "set `distributed.strategy: ddp`, or `training.master_weights: false`",
    ),
}
"""Why a run has no masters: (when, problem, fix) by the other key."""

WEIGHT_CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction(
        ("model.offload_weights", "adapter.method"),
        lambda c, _: c.model.offload_weights and c.adapter.method == "none",
        "weights that are trained move in every step, and only frozen ones can wait on the host",
        "set `adapter.method: lora`, or `model.offload_weights: false`",
    ),
    Contradiction(
        ("model.offload_weights", "model.gradient_checkpointing"),
        lambda c, _: c.model.offload_weights and c.model.gradient_checkpointing is False,
        "a block's weights are gone when its backward pass begins, so it is computed again when they have come back",
        "set `model.gradient_checkpointing: true` (or `offload`, `auto`), or `model.offload_weights: false`",
    ),
    Contradiction(
        ("model.offload_weights", "model.quantization"),
        lambda c, _: c.model.offload_weights and c.model.quantization == "8bit",
        "layers in 8 bits take their weights into a state of their own, where nothing can replace them",
        "set `model.quantization: 4bit`, which is smaller too, or `model.offload_weights: false`",
    ),
    Contradiction(
        ("model.offload_weights", "training.compile"),
        lambda c, _: c.model.offload_weights and c.training.compile,
        "compiled blocks read their weights where they were compiled",
        "set `training.compile: false`, or `model.offload_weights: false`",
    ),
    *(
        Contradiction(
            ("training.master_weights", *(DIVIDED_BY if key in DIVIDED_BY else (key,))),
            lambda c, _, is_against=is_against: c.training.master_weights is True and is_against(c),  # type: ignore[misc]
            problem,
            fix,
        )
        for key, (is_against, problem, fix) in _AGAINST_MASTERS.items()
    ),
)
