"""Plans of the tiny model's runs."""

import pytest

from llmtune.plan.forecast import Forecaster
from llmtune.preparation import prepare
from plan_helpers import OPTIONS, ROOMY


@pytest.fixture
def forecaster_of(config_of):
    """Forecast a config of the tiny model; further KEY=VALUE on top."""

    def make(*overrides, target=ROOMY):
        return Forecaster(prepare(config_of(*overrides), OPTIONS), OPTIONS, target)

    return make
