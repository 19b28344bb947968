"""The fixtures of whole runs."""

from pipeline_fixtures import _one_thread  # noqa: F401
