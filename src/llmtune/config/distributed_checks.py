"""What the section `distributed` contradicts: keys that need whole weights, gradients or rows in one process."""

from __future__ import annotations

from llmtune.config.contradiction import Contradiction
from llmtune.config.schema import Config

__all__ = ["DISTRIBUTED_CONTRADICTIONS", "SHARDED_OPTIMIZERS", "reason_against_sharding"]

SHARDED_OPTIMIZERS = ("adamw", "sgd", "muon")
"""Optimizers that move a weight of which each process holds a part."""

SHARDED_OBJECTIVES = ("sft", "dpo", "simpo", "orpo", "kto")
"""Objectives for which every process runs the same number of forward passes; drawn answers end when they end."""


def _shards(config: Config) -> bool:
    return config.distributed.strategy == "fsdp"


def reason_against_sharding(config: Config) -> str | None:
    """Give the key because of which the weights of a run cannot be sharded, or None."""
    against = {
        "training.optimizer": config.training.optimizer not in SHARDED_OPTIMIZERS,
        "model.quantization": config.model.quantization == "8bit",
        "objective.method": config.objective.method not in SHARDED_OBJECTIVES,
        "training.step_in_backward": config.training.step_in_backward,
        "tracking.watch": bool(config.tracking.watch),
    }
    return next((key for key, is_against in against.items() if is_against), None)


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
        ("training.optimizer", "distributed.strategy"),
        lambda c, _: _shards(c) and c.training.optimizer not in SHARDED_OPTIMIZERS,
        "this optimizer cannot move weights of which each process holds a part",
        "set `training.optimizer` to adamw, muon or sgd, or `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("model.quantization", "distributed.strategy"),
        lambda c, _: _shards(c) and c.model.quantization == "8bit",
        "weights in 8 bits lose their scales when they are sharded",
        "set `model.quantization: 4bit`, or `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("objective.method", "distributed.strategy"),
        lambda c, _: _shards(c) and c.objective.method not in SHARDED_OBJECTIVES,
        "answers are drawn only where every process holds the whole model",
        "set `distributed.strategy: ddp`",
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
        ("distributed.sequence_parallel", "distributed.strategy"),
        lambda c, _: _shares_rows(c) and c.distributed.strategy == "deepspeed",
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
