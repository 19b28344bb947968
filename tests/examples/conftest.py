"""The fixtures of whole runs."""

from training_fixtures import _one_thread  # noqa: F401
