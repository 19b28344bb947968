"""The whole story of a run: what is checked first, how it begins, and how it goes on again.

What happens at each step is in `session`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmtune.common.decisions import Decision
from llmtune.common.printing import PrintLine, silent
from llmtune.common.secrets import find_secrets
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.config.schema import DistributedConfig
from llmtune.engine.devices import Devices, check_distribution, open_devices
from llmtune.errors import ConfigError, Problem
from llmtune.models.memory_errors import MEMORY_ERRORS, is_out_of_memory
from llmtune.plan import resolve_auto
from llmtune.plan.forecast import Forecaster
from llmtune.plan.out_of_memory import out_of_memory_error, reserve_address_space
from llmtune.plan.summary import Plan, make_plan
from llmtune.prepare import Prepared, prepare
from llmtune.runs import identity
from llmtune.runs.folder import RunFolder, config_file_of, resolve_run
from llmtune.runs.signals import StopRequest
from llmtune.tracking.choose import choose_trackers
from llmtune.tracking.tracker import Tracker
from llmtune.training import checkpointer, run_setup
from llmtune.training import progress as reporting
from llmtune.training.build import TrainingSetup, build_setup
from llmtune.training.training_run import Result, TrainingRun

__all__ = ["Result", "dry_run", "preflight", "reopen", "resume", "start", "train"]


def preflight(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine) -> tuple[Prepared, Devices, Plan]:
    """Everything that can go wrong before a model is loaded, first; says what was read, found, chosen and planned."""
    for note in resolved.notes:
        print_line(note)
    run_setup.check_name(resolved)
    devices, decisions = open_devices(resolved.config, options)
    prepared = prepare(resolved, options, progress=reporting.tokenizing_progress(print_line))
    forecaster = Forecaster.for_this_machine(prepared, options, devices)
    prepared = resolve_auto.resolve_on_all_ranks(forecaster, devices)
    plan = make_plan(forecaster.with_prepared(prepared))
    reporting.print_preflight(prepared, decisions, plan, print_line)
    return prepared, devices, plan


def dry_run(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine) -> None:
    """Do everything that comes before a model is loaded, and say it.

    What cannot be shared between devices yet is planned too.

    Raises what `preflight` raises; ConfigError for that after the plan was said.
    """
    refusal = None
    try:
        check_distribution(resolved.config)
    except ConfigError as error:
        refusal = error
        resolved = replace(resolved, config=replace(resolved.config, distributed=DistributedConfig()))
        print_line(f"planned as one process that holds the whole model: {error.problems[0].problem}")
    preflight(resolved, options, print_line=print_line)
    if refusal is not None:
        raise refusal


def refuse_secrets(resolved: ResolvedConfig) -> None:
    """Raise ConfigError for values that look like a secret: the config of a run is written beside it.

    The values are not in the message.
    """
    values = {key: functools.reduce(getattr, key.split("."), resolved.config) for key in resolved.origins}
    found = find_secrets(values)
    if found:
        fix = "take it out; keys come from the environment (HF_TOKEN, WANDB_API_KEY) or from the login command of their service"
        raise ConfigError.all(
            Problem(f"`{key}` holds what looks like a secret", str(resolved.origins[key]), fix) for key in found
        )


def build_within_memory(prepared: Prepared, options: Options, devices: Devices) -> TrainingSetup:
    """Load and assemble; where the memory is used up by that, refuse with the numbers and what to change.

    Raises what `build_setup` raises.
    """
    reserve = reserve_address_space()
    try:
        return build_setup(prepared, options, devices)
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        if reserve is not None:
            reserve.close()
        forecaster = Forecaster.for_this_machine(prepared, options, devices)
        doing = "while the model was loaded"
        raise out_of_memory_error(
            error, forecaster, doing=doing, where=prepared.config.model.name, saved=None
        ) from error


def train(resolved: ResolvedConfig, options: Options | None = None, *, print_line: PrintLine = silent) -> Result:
    """Train a new run from its first step to its end, or to the signal that stops it; raises what the rooms raise."""
    with StopRequest() as stop:
        return start(resolved, options or Options(), stop, print_line=print_line).go()


def start(resolved: ResolvedConfig, options: Options, stop: StopRequest, *, print_line: PrintLine) -> TrainingRun:
    """Check, prepare and assemble a new run and make its folder.

    Nothing is trained yet, and nothing is left behind by a failure.
    """
    with stop.interrupting():
        refuse_secrets(resolved)
        trackers, decisions = _trackers(resolved)
        prepared, devices, plan = preflight(resolved, options, print_line=print_line)
        setup = build_within_memory(prepared, options, devices)
        reporting.print_setup(setup, decisions, print_line)
        run = run_setup.create(resolved, prepared, setup, print_line) if devices.is_main else None
    return TrainingRun(resolved, prepared, setup, run, trackers, stop, print_line, plan=plan, options=options)


def resume(
    name: str | None,
    *,
    overrides: Sequence[str] = (),
    options: Options | None = None,
    allow_changes: bool = False,
    checkpoint: Path | None = None,
    print_line: PrintLine = silent,
) -> Result:
    """Go on with a run (a folder, a name, or None for the newest unfinished one) from its newest valid checkpoint, to
    its end or a stop.

    Raises what `reopen` raises, and what the rooms raise.
    """
    with StopRequest() as stop:
        chosen = options or Options()
        return reopen(
            name,
            chosen,
            stop,
            overrides=overrides,
            allow_changes=allow_changes,
            checkpoint=checkpoint,
            print_line=print_line,
        ).go()


def reopen(
    name: str | None,
    options: Options,
    stop: StopRequest,
    *,
    overrides: Sequence[str] = (),
    allow_changes: bool = False,
    checkpoint: Path | None = None,
    print_line: PrintLine,
) -> TrainingRun:
    """Open a stopped run at its newest valid checkpoint; nothing is trained yet.

    What differs from the stopped run is said before the first step, and refused where it would make it another training
    (unless `allow_changes`) or where the checkpoint no longer fits. Raises CheckpointError when nothing can be used.
    """
    with stop.interrupting():
        folder = checkpoint.parent.parent if checkpoint else resolve_run(name, _output_dir(overrides))
        resolved = load_config(str(config_file_of(folder)), overrides=overrides, environ={})
        run = RunFolder.open(folder)
        try:
            trackers, _ = _trackers(resolved)
            loaded, problems = checkpointer.find_checkpoint(run, checkpoint)
            reporting.print_resume(run, loaded, problems, print_line)
            prepared, devices = preflight_again(
                resolved, options, run_setup.own_tokenizer(run, resolved.config.model), print_line
            )
            prepared = resolve_auto.keep_resolved(prepared, run.info["identity"]["config"])
            setup = build_within_memory(prepared, options, devices)
            now = run_setup.identity_of(prepared, setup)
            differences = identity.compare(run.info["identity"], now)
            for one in identity.refuse_changes(differences, where=str(run.path), allow_changes=allow_changes):
                reporting.print_difference(one, print_line)
        except BaseException:
            run.close()
            raise
    session = TrainingRun(resolved, prepared, setup, run, trackers, stop, print_line, options=options)
    session.restore(loaded)
    return session


def _output_dir(overrides: Sequence[str]) -> str:
    """Where runs are looked for by name: `run.output_dir` as overridden or by default.

    Other overrides are for the run that is found.
    """
    only = [one for one in overrides if one.startswith("run.output_dir=")]
    return load_config(None, overrides=only).config.run.output_dir


def preflight_again(
    resolved: ResolvedConfig, options: Options, tokenizer_folder: Path | None, print_line: PrintLine
) -> tuple[Prepared, Devices]:
    """The preflight of a resumed run: quiet about choices that were said when it began."""
    devices, _ = open_devices(resolved.config, options)
    return prepare(
        resolved, options, tokenizer_folder=tokenizer_folder, progress=reporting.tokenizing_progress(print_line)
    ), devices


def _trackers(resolved: ResolvedConfig) -> tuple[list[Tracker], list[Decision]]:
    return choose_trackers(resolved.config.tracking, explicit=resolved.origins["tracking.trackers"].kind != "default")
