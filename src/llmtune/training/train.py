"""The whole story of a run, from its config to its last step, for a new run and for one that goes on.

What is decided at each step boundary is in `training_run`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from llmtune import durable
from llmtune.adapters.find import run_of
from llmtune.common.decisions import Decision
from llmtune.common.secrets import find_secrets
from llmtune.common.text import PrintLine, silent
from llmtune.config.distributed_checks import takes_deepspeed
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.config.schema import DistributedConfig
from llmtune.engine.deepspeed_settings import check_deepspeed
from llmtune.engine.devices import Devices
from llmtune.engine.own_loss import digest_of_code
from llmtune.errors import ConfigError, Problem, UsageError
from llmtune.evaluation.rewards import Reward, find_rewards, rewards_digest
from llmtune.evaluation.scores import Score, code_digest, find_score
from llmtune.models import save
from llmtune.models.tokenizer import LoadedTokenizer, load_tokenizer_folder
from llmtune.plan.forecast import Forecaster
from llmtune.plan.out_of_memory import Circumstances, out_of_memory_refused
from llmtune.plan.resolve_auto import keep_resolved, resolve_on_all_ranks, resolve_rates, resolve_strategy
from llmtune.plan.summary import Plan, make_plan
from llmtune.prepare import Prepared, prepare
from llmtune.runs.checkpoint import LoadedCheckpoint, checkpoint_named
from llmtune.runs.folder import RunFolder, config_file_of, resolve_run
from llmtune.runs.run_file import RUN_FILE
from llmtune.runs.signals import StopRequest
from llmtune.tracking.queue import choose_trackers
from llmtune.tracking.screen import Screen
from llmtune.training import run_setup
from llmtune.training.auto_resume import OwnRun
from llmtune.training.build import TrainingSetup, build_setup
from llmtune.training.progress import (
    RankPrinter,
    Result,
    print_preflight,
    print_setup,
    tokenizing_progress,
)
from llmtune.training.training_run import TrainingRun

__all__ = ["Continuation", "Result", "dry_run", "find_run", "open_run", "resume", "train", "train_or_resume"]


def train(
    resolved: ResolvedConfig,
    options: Options | None = None,
    *,
    print_line: PrintLine = silent,
    screen: Screen | None = None,
) -> Result:
    """Train a new run from its first step to its end, or to the signal that stops it.

    screen: lays out for a terminal what is said before the first step; plain lines when None. Raises ConfigError,
    DataError, ModelError, MachineError, DivergedError; StoppedBySignal after saving.
    """
    with StopRequest() as stop:
        run = open_run(resolved, options or Options(), stop, print_line=print_line, screen=screen)
        for _ in run.steps():
            pass  # what was due at the step is done when it is yielded
        return run.result()


def resume(
    name: str | None,
    *,
    overrides: Sequence[str] = (),
    options: Options | None = None,
    allow_changes: bool = False,
    checkpoint: Path | str | None = None,
    print_line: PrintLine = silent,
    screen: Screen | None = None,
) -> Result:
    """Go on with a run, bit for bit, from its newest valid checkpoint (or `checkpoint`), to its end or a stop.

    `name`: a folder, a name, or None for the newest unfinished run. Raises CheckpointError when nothing can be used;
    ConfigError, DataError, ModelError, MachineError, DivergedError as `train`; StoppedBySignal after saving.
    """
    with StopRequest() as stop:
        with stop.interrupting():
            resolved, earlier = find_run(name, overrides=overrides, checkpoint=checkpoint, allow_changes=allow_changes)
        run = open_run(resolved, options or Options(), stop, print_line=print_line, earlier=earlier, screen=screen)
        for _ in run.steps():
            pass
        return run.result()


def train_or_resume(
    own: OwnRun, options: Options, *, print_line: PrintLine = silent, screen: Screen | None = None
) -> Result:
    """Go on with the run that this command began before (see `find_own_run`), or begin it."""
    earlier = Continuation(own.path) if own.path is not None else None
    with StopRequest() as stop:
        run = open_run(
            own.resolved, options, stop, print_line=print_line, earlier=earlier, screen=screen, joined=own.joined
        )
        for _ in run.steps():
            pass
        return run.result()


@dataclass(frozen=True)
class Continuation:
    """A run to go on with."""

    path: Path
    checkpoint: Path | None = None
    """The newest valid one when None."""
    allow_changes: bool = False
    """Go on although something changed that makes it another training from there."""


def find_run(
    name: str | None,
    *,
    overrides: Sequence[str] = (),
    checkpoint: Path | str | None = None,
    allow_changes: bool = False,
) -> tuple[ResolvedConfig, Continuation]:
    """Find the run to go on with, and read its config with the overrides on top.

    `name` may be a checkpoint's folder too, `checkpoint` a folder or the name of a checkpoint of the run. Raises
    CheckpointError where there is none, ConfigError for a config that cannot be read.
    """
    # Every process finds it by itself: the main one locks it only after all of them have met.
    only = [override for override in overrides if override.startswith("run.output_dir=")]  # the rest is for the run
    output_dir = load_config(None, overrides=only).config.run.output_dir
    if isinstance(checkpoint, str):
        checkpoint = resolve_run(name, output_dir) / "checkpoints" / checkpoint_named(checkpoint)
    if name is None and checkpoint is not None and (checkpoint / RUN_FILE).is_file():
        name, checkpoint = str(checkpoint), None  # other toolkits take the folder of the run here
    if name is not None and checkpoint is None and not (Path(name) / RUN_FILE).is_file() and run_of(Path(name)):
        named = Path(name).resolve()  # RUN/final is a link into RUN/checkpoints
        # RUN/checkpoints/step-N names run and checkpoint at once.
        name, checkpoint = (str(named.parent), None) if named.name == "checkpoints" else (name, named)
    path = checkpoint.absolute().parent.parent if checkpoint else resolve_run(name, output_dir)
    # Without the environment: the run goes on as it began, whatever this shell sets.
    resolved = load_config(str(config_file_of(path)), overrides=overrides, environ={})
    return resolved, Continuation(path, checkpoint, allow_changes)


def open_run(
    resolved: ResolvedConfig,
    options: Options,
    stop: StopRequest,
    *,
    print_line: PrintLine,
    earlier: Continuation | None = None,
    screen: Screen | None = None,
    joined: run_setup.Joined | None = None,
) -> TrainingRun:
    """Do everything that comes before the first step of a new run, or of one to go on with.

    A failure leaves nothing behind. What differs from when the run stopped is printed, or refused (see `identity`).
    """
    with ExitStack() as on_failure:
        with stop.interrupting():
            # 1. What can be refused before rows are read and before processes wait for each other.
            judges = _check(resolved, options, is_new=earlier is None)
            is_asked = resolved.origins["tracking.trackers"].kind != "default"
            trackers, tracker_decisions = choose_trackers(resolved.config.tracking, explicit=is_asked)
            # 2. The processes meet. What fails from here on is printed by one of them, and all end.
            devices, device_decisions = joined or run_setup.meet_processes(resolved.config, options)
            on_failure.callback(devices.close)
            stop.announces = devices.is_main
            printer = RankPrinter(devices, print_line, screen)
            with devices.errors_printed_once():
                # 3. Rows, and what the config leaves open: planned for a new run, as it was for a stopped one.
                if earlier is None:
                    stopped = None
                    forecaster, plan = _prepare_and_plan(resolved, options, judges, devices, device_decisions, printer)
                else:
                    stopped, plan = _open_stopped(earlier, devices, printer, on_failure), None
                    forecaster = _prepare_again(resolved, options, judges, devices, stopped, printer)
                # 4. The model, which takes the memory.
                saved = stopped.loaded if stopped is not None else None
                with out_of_memory_refused(forecaster, lambda: _while_loading(forecaster.prepared, saved)):
                    setup = build_setup(forecaster.prepared, options, devices, judges.rewards, saved)
                # 5. The folder of a new run, last: until here nothing was written.
                if earlier is None or stopped is None:
                    print_setup(setup, tracker_decisions, printer)
                    folder = _new_folder(resolved, setup, (*device_decisions, *tracker_decisions), plan, printer)
                else:
                    folder, allow = stopped.folder, earlier.allow_changes
                    run_setup.compare_identity(stopped, setup, resolved, allow_changes=allow, print_line=printer)
                # 6. The run, at its first step or at that of its checkpoint.
                run = TrainingRun(
                    setup,
                    folder,
                    config_name=resolved.name,
                    trackers=trackers,
                    stop=stop,
                    print_line=printer,
                    forecaster=forecaster,
                    plan=plan,
                    score=judges.score,
                )
                if stopped is not None:
                    run.restore(stopped.loaded)
        on_failure.pop_all()  # devices and folder belong to the run now
    return run


def _open_stopped(
    earlier: Continuation, devices: Devices, printer: RankPrinter, on_failure: ExitStack
) -> run_setup.StoppedRun:
    """Lock a run's folder and read its checkpoint; what the other processes print goes there from here on."""
    stopped = run_setup.open_stopped(earlier.path, earlier.checkpoint, devices, printer)
    if stopped.folder is not None:
        on_failure.callback(stopped.folder.close)
    printer.open(stopped.path)
    return stopped


def _new_folder(
    resolved: ResolvedConfig,
    setup: TrainingSetup,
    decisions: Sequence[Decision],
    plan: Plan | None,
    printer: RankPrinter,
) -> RunFolder | None:
    """Make the folder on the main process, None on the others; what those print goes there from here on."""
    folder = setup.devices.on_main(lambda: run_setup.create(resolved, setup, decisions, printer, plan))
    printer.open(Path(setup.devices.from_main(str(folder.path) if folder is not None else "")))
    return folder


class _Judges(NamedTuple):
    """What judges answers in a run."""

    score: Score | None
    rewards: list[Reward]
    code: dict[str, str | None]
    """sha256 of the user's own code by what it is for, alike in all processes: content, not paths."""


def _check(resolved: ResolvedConfig, options: Options, *, is_new: bool) -> _Judges:
    """Check what needs no model, and return the judges of answers that the command line or the config names.

    Raises ConfigError for a secret in a new run's config, for a run of grpo without a reward and for a best model by a
    score without a judge, UsageError for a name that no new run can have, or a judge that does not exist.
    """
    if is_new:
        refuse_secrets(resolved)
        run_setup.check_name(resolved)
    name, objective = options.score or resolved.config.evaluation.score, resolved.config.objective
    score = find_score(name) if name is not None else None
    code = {"loss function": None if options.loss is None else digest_of_code(options.loss)}
    if options.score is not None and ":" in options.score:
        code["score function"] = f"{options.score.rpartition(':')[2]}: {code_digest(options.score)}"
    if score is None and resolved.config.evaluation.best_by.endswith("_score"):
        raise ConfigError(
            "the best model is chosen by the score of its answers, and nothing judges them",
            where="evaluation.best_by",
            fix="set `evaluation.score: exact`, or name a function of your own with `--score FILE.py:FUNCTION`",
        )
    if objective.method == "grpo":
        rewards = find_rewards(objective, options.rewards, no_cuda=options.no_cuda, offline=options.offline)
        return _Judges(score, rewards, {**code, "rewards": rewards_digest(rewards)})
    if options.rewards:
        method = f"objective.method is {objective.method}"
        raise UsageError(f"a reward counts only with grpo, and {method}", "--reward", "set `objective.method: grpo`")
    return _Judges(score, [], code)


def _while_loading(prepared: Prepared, saved: LoadedCheckpoint | None) -> Circumstances:
    name = None if saved is None else saved.path.name
    return Circumstances("while the model was loaded", prepared.config.model.name, name)


def _prepare_and_plan(
    resolved: ResolvedConfig,
    options: Options,
    judges: _Judges,
    devices: Devices,
    device_decisions: Sequence[Decision],
    print_line: RankPrinter,
) -> tuple[Forecaster, Plan]:
    """Read the rows of a new run, resolve what its config leaves open, plan and print it."""
    for note in resolved.notes:
        print_line(note)
    made_once = functools.partial(_trained_once, devices)
    prepared = prepare(resolved, options, made_once=made_once, progress=tokenizing_progress(print_line))
    devices.check_alike({**run_setup.facts_of(prepared), **judges.code})
    forecaster = Forecaster.for_this_machine(prepared, options, devices)
    forecaster = forecaster.with_prepared(resolve_strategy(forecaster, devices))
    forecaster = forecaster.with_prepared(resolve_on_all_ranks(forecaster, devices))
    plan = make_plan(forecaster)
    print_preflight(forecaster.prepared, resolved.name, device_decisions, plan, print_line)
    if devices.world_size > 1:
        _print_shares(forecaster.batches(forecaster.config).global_batch, devices, print_line)
    return forecaster, plan


def _trained_once(devices: Devices, train: Callable[[], LoadedTokenizer]) -> LoadedTokenizer:
    """Let the main process train the run's tokenizer, and give it to the others.

    Raises the LlmtuneError that `train` raises, in all.
    """
    own = devices.on_main(train)
    with TemporaryDirectory() as made:
        folder = Path(made)
        if own is not None:
            save.write_tokenizer(own.tokenizer, folder)
        files = devices.from_main({path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()})
        if own is not None:
            return own
        for name, text in files.items():
            durable.write_text(folder / name, text)
        return load_tokenizer_folder(folder)


def _print_shares(sequences: int, devices: Devices, print_line: PrintLine) -> None:
    """Print how the processes share a step's sequences: in other toolkits each of them takes a batch of its own."""
    count = devices.readers
    of = "processes" if devices.row_size == 1 else f"group{'s' * (count > 1)} of {devices.row_size} processes"
    print_line(f"note    a step has {sequences:,} sequences in all, shared by {count:,} {of}")
    if sequences < count:
        idle = f"{count - sequences:,} of {count:,} {of} have no row in a step"
        print_line(f"note    {idle}: raise `training.batch_size` or `training.gradient_accumulation_steps`")


def _prepare_again(
    resolved: ResolvedConfig,
    options: Options,
    judges: _Judges,
    devices: Devices,
    stopped: run_setup.StoppedRun,
    print_line: PrintLine,
) -> Forecaster:
    """Read the rows of a stopped run, and keep what was resolved when it began: going on changes no sum."""
    for note in resolved.notes:
        print_line(note)
    tokenizer_folder = stopped.own_tokenizer(resolved.config.model)
    progress = tokenizing_progress(print_line)
    prepared = prepare(resolved, options, tokenizer_folder=tokenizer_folder, is_stopped=True, progress=progress)
    devices.check_alike({**run_setup.facts_of(prepared), **judges.code})
    prepared = keep_resolved(prepared, stopped.identity["config"])
    forecaster = Forecaster.for_this_machine(prepared, options, devices)
    # Another number of processes may hold the weights in another way.
    forecaster = forecaster.with_prepared(resolve_strategy(forecaster, devices))
    return forecaster.with_prepared(resolve_rates(forecaster)[0])


def dry_run(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine, screen: Screen | None = None) -> None:
    """Do and print everything that comes before a model is loaded.

    A way to share a model between devices that does not work here is planned as one process, and refused with
    ConfigError after that. Raises ConfigError, UsageError, DataError, ModelError.
    """
    refusal = None
    try:
        if takes_deepspeed(resolved.config):
            check_deepspeed(resolved.config)
    except ConfigError as error:
        refusal = error
        resolved = replace(resolved, config=replace(resolved.config, distributed=DistributedConfig()))
        print_line(f"planned as one process that holds the whole model: {error.problems[0].problem}")
    judges = _check(resolved, options, is_new=True)
    devices, device_decisions = run_setup.meet_processes(resolved.config, options)
    _prepare_and_plan(resolved, options, judges, devices, device_decisions, RankPrinter(devices, print_line, screen))
    devices.close(wait_for_main=True)
    if refusal is not None:
        raise refusal


def refuse_secrets(resolved: ResolvedConfig) -> None:
    """Raise ConfigError, without the values, for those that look like a secret: a run's config is written beside it."""
    values = {key: functools.reduce(getattr, key.split("."), resolved.config) for key in resolved.origins}
    # Before anything is written, because the run folder is what people share.
    keys = find_secrets(values)
    if keys:
        login = "or from the login command of their service"
        fix = f"take it out; keys come from the environment (HF_TOKEN, WANDB_API_KEY) {login}"
        raise ConfigError.all(
            Problem(f"`{key}` holds what looks like a secret", str(resolved.origins[key]), fix) for key in keys
        )
