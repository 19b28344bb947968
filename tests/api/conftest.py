"""The fixtures of whole runs."""

import pytest

from llmtune import train
from training_fixtures import _one_thread, _planned_bytes, config_of, rows_file  # noqa: F401


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """A folder of runs that no test removes, and the results of those that were made."""
    return tmp_path_factory.mktemp("kept"), {}


@pytest.fixture
def whole(config_of, kept):  # noqa: F811
    """The run that others are compared with, made once; read only."""
    folder, results = kept
    if "whole" not in results:
        resolved = config_of(f"run.output_dir={folder}", name="whole")
        results["whole"] = train(resolved, print_line=lambda line: None)
    return results["whole"]
