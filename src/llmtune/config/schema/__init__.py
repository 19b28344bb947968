"""The frozen dataclasses of a run: the only place where a default is written.

A section of the config is a module: `training.learning_rate` stands in `training.py`. Here the sections are put together.

The string under a field describes it, once: it is the line in the reference page, in an editor and in a commented YAML file.
Units stand in the names (`every_steps`, `timeout_s`). `None` means "not asked for": nothing happens, or llmtune chooses and says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmtune.config.schema.adapter import AdapterConfig
from llmtune.config.schema.checkpoint import CheckpointConfig
from llmtune.config.schema.data import DataConfig, SourceConfig, TrainOn
from llmtune.config.schema.distributed import DistributedConfig
from llmtune.config.schema.evaluation import EvaluationConfig
from llmtune.config.schema.model import ArchitectureConfig, ModelConfig
from llmtune.config.schema.run import RunConfig
from llmtune.config.schema.tracking import TrackingConfig
from llmtune.config.schema.training import TrainingConfig

__all__ = [
    "AdapterConfig",
    "ArchitectureConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "ModelConfig",
    "RunConfig",
    "SourceConfig",
    "TrackingConfig",
    "TrainOn",
    "TrainingConfig",
]


@dataclass(frozen=True)
class Config:
    """Everything a run is told."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives and what it is called."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Which part of it is trained."""

    data: DataConfig = field(default_factory=DataConfig)
    """On what."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How it is judged."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How it is kept safe."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Who is told."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """On how many devices."""
