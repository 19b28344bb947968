"""What tests of the plan share: where they plan for, and the run that a plan is about."""

from llmtune.config.process_options import Options
from llmtune.engine.devices import open_devices
from llmtune.plan.hardware import Target
from llmtune.plan.resolve_auto import resolve_rates
from llmtune.training.build import build_setup

OPTIONS = Options(no_cuda=True, offline=True)
ROOMY = Target("a roomy machine", "cpu", 1 << 40, is_local=True)


def assembled_like(forecaster):
    """The training that this forecast is about, before its first step."""
    prepared, _ = resolve_rates(forecaster)
    return build_setup(prepared, OPTIONS, open_devices(forecaster.config, OPTIONS)[0])
