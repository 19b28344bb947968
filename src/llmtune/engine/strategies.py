"""The ways in which processes hold the weights of a run, as a table."""

from __future__ import annotations

from collections.abc import Callable

from llmtune.config.schema import Config
from llmtune.engine.devices import Devices
from llmtune.engine.sharding import Sharded, Strategy, Whole

__all__ = ["make_strategy"]


def make_strategy(config: Config, devices: Devices) -> Strategy:
    """The strategy that the config names for several processes; one alone holds the whole model in any."""
    return STRATEGIES[config.distributed.strategy](config, devices)


def _zero(config: Config, devices: Devices) -> Strategy:
    from llmtune.engine.zero import Zero  # what only an optional package needs

    return Zero(config, devices)


STRATEGIES: dict[str, Callable[[Config, Devices], Strategy]] = {
    "auto": lambda _, devices: Whole(devices),  # resolved before there is a model, where several processes train it
    "ddp": lambda _, devices: Whole(devices),
    "fsdp": lambda config, devices: Sharded(devices, on_host=config.distributed.offload == "all"),
    "deepspeed": _zero,
}
