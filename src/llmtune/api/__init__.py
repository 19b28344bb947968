"""llmtune from Python: the code behind the command line, with the training loop in the hands of the caller.

>>> from llmtune import load_config
>>> load_config("production", overrides={"model.name": "custom-small"}).config.model.name
'custom-small'
"""

from llmtune.common.environment import limit_spinning

limit_spinning()  # before the imports below load torch, whose OpenMP reads its settings once

# ruff: noqa: E402
from llmtune.api.metrics import Stop
from llmtune.api.trainer import Trainer, train, train_single_model
from llmtune.training.progress import Result
from llmtune.watch.report.curve import Curve

__all__ = ["Curve", "Result", "Stop", "Trainer", "train", "train_single_model"]
