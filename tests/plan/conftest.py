"""Plans of the tiny model's runs."""

from functools import cached_property

import pytest

from llmtune.plan.forecast import Forecaster
from llmtune.prepare import prepare
from plan_helpers import OPTIONS, ROOMY


@pytest.fixture
def forecaster_of(config_of):
    """Forecast a config of the tiny model; further KEY=VALUE on top.

    All forecasts of a test see the same process: it grows between two of them by more than the tiny model takes.
    """
    measured = {}

    class InOneProcess(Forecaster):
        @cached_property
        def process_bytes(self):
            key = (self.target.kind, self.precision)
            if key not in measured:
                measured[key] = Forecaster.process_bytes.func(self)
            return measured[key]

    def make(*overrides, target=ROOMY):
        return InOneProcess(prepare(config_of(*overrides), OPTIONS), OPTIONS, target)

    return make
