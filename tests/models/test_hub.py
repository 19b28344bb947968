"""Hub ids without a hub: what is said when nothing can be fetched."""

import pytest

from llmtune.errors import MachineError, ModelError
from llmtune.models.hub import fetch_snapshot


def test_an_offline_run_says_what_is_missing():
    with pytest.raises(ModelError, match="`owner/none` is not in the hub cache, and the run is offline"):
        fetch_snapshot("owner/none", None, weights=False, offline=True)


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_machine():
    with pytest.raises(MachineError, match="`owner/none` could not be fetched") as caught:
        fetch_snapshot("owner/none", None, weights=True, offline=False)
    assert caught.value.exit_code == 6


def test_an_id_that_cannot_be_one_is_a_model_error():
    with pytest.raises(ModelError):
        fetch_snapshot("owner/none--x..", None, weights=False, offline=False)
