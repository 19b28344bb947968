"""`llmtune plan`: the steps, memory, time and disk of a run, before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer

from llmtune.cli.options import ConfigName, Overrides, TrustRemoteCode
from llmtune.cli.process import prepare_process
from llmtune.common.environment import is_offline
from llmtune.common.text import print_line, readable_bytes
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.errors import UsageError

__all__ = ["plan"]


def plan(
    overrides: Overrides = None,
    config: ConfigName = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="Plan for another device: a size such as 24GB, rtx3090, rtx4090, l4, t4, a100-80, h100."
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", help="With --device: plan for this many, each strategy with the bytes it sends."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train a few steps (nothing is kept) to measure the time.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; sizes in bytes, times in seconds.")
    ] = False,
    no_cuda: Annotated[
        bool, typer.Option("--no-cuda", help="Plan for the CPU even where there is a CUDA device.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print exact steps and tokens, memory by part, time and disk; whether it fits, and what to change if not."""
    _check_options(measure, device, devices)
    resolved = load_config(config, overrides=overrides or ())
    for note in resolved.notes:
        print_line(note)
    prepare_process(trains=True)  # as in the run: its memory is planned, and `--measure` takes its steps
    from llmtune.engine.devices import open_devices
    from llmtune.plan.forecast import Forecaster
    from llmtune.plan.hardware import find_target
    from llmtune.plan.many_devices import plan_strategies, strategies_as_dicts, strategy_lines
    from llmtune.plan.resolve_auto import resolve
    from llmtune.plan.summary import as_dict, make_plan, plan_lines
    from llmtune.prepare import prepare
    from llmtune.training.progress import tokenizing_progress

    options = Options(no_cuda=no_cuda, offline=is_offline(), trust_remote_code=trust_remote_code)
    target = find_target(device, no_cuda=no_cuda)
    run = prepare(resolved, options, progress=tokenizing_progress(print_line))
    forecaster = Forecaster(run, options, target, world_size=devices or 1)
    prepared, decisions = resolve(forecaster)
    for decision in (*forecaster.prepared.decisions, *decisions):
        print_line(str(decision))
    forecaster = forecaster.with_prepared(prepared)
    measured_bytes = None
    planned = make_plan(forecaster, full=True)  # before real weights are in memory
    strategies = plan_strategies(forecaster) if devices is not None and planned.memory is not None else []
    if measure:
        from llmtune.training.calibration import measure as calibrate

        rate, measured_bytes = calibrate(forecaster, open_devices(prepared.config, options)[0])
        planned = replace(planned, tokens_per_second=rate)
    if as_json:
        more = {"measured_peak_bytes": measured_bytes, "strategies": strategies_as_dicts(strategies)}
        print(json.dumps(as_dict(planned) | more, ensure_ascii=False))
        return
    _print_lines([*plan_lines(planned), *strategy_lines(strategies)], measured_bytes)


def _print_lines(lines: list[str], measured_bytes: int | None) -> None:
    for line in lines:
        print(line)
    if measured_bytes is not None:
        print(f"measured   {readable_bytes(measured_bytes)} at most in a few steps")


def _check_options(measure: bool, device: str | None, devices: int | None) -> None:
    """Raise UsageError for options that contradict each other."""
    if measure and device is not None:
        raise UsageError(
            "--measure trains here, and --device plans for elsewhere", "command line", "give one of the two"
        )
    if devices is not None and devices < 2:
        raise UsageError(f"{devices} devices were asked for", "--devices", "name how many train together, from 2")
    if devices is not None and device is None:
        raise UsageError("--devices plans for several of a kind", "command line", "name it, as `--device h100`")
