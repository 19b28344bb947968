"""The fixtures of whole runs."""

from sharded_runs import ranks_of, untied_model_folder  # noqa: F401
from training_fixtures import _one_thread, _planned_bytes, config_of, pairs_file, rows_file  # noqa: F401
