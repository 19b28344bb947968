"""The fixtures of whole runs."""

from training_fixtures import _one_thread, _planned_bytes, config_of, rows_file  # noqa: F401
