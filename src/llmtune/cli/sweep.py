"""`llmtune sweep`: a run for each of several values of config keys, one after another, and how they compare."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from llmtune.cli.failure import report_error
from llmtune.cli.options import NoCudaInTraining, TrustRemoteCode, Verbose
from llmtune.cli.process import prepare_process
from llmtune.cli.runs import print_table
from llmtune.cli.sweep_devices import train_on_devices
from llmtune.cli.train import open_training_output
from llmtune.common.environment import is_offline, launched_process
from llmtune.common.records import is_better
from llmtune.common.text import excerpt, print_line, printable
from llmtune.config.process_options import Options
from llmtune.config.sweep import Sweep, SweepRun, load_sweep
from llmtune.errors import ConfigError, DivergedError, LlmtuneError, Problem, RankLostError, StoppedBySignal, UsageError
from llmtune.runs.run_file import read_run_file
from llmtune.watch.run_data import RunData

__all__ = ["sweep"]


class SweepRow(NamedTuple):
    """One line of the table."""

    name: str
    path: str
    values: Mapping[str, str]
    """The swept keys as they are written."""
    state: str
    """As in `llmtune runs`; `waiting` before the run has a folder."""
    step: int
    total_steps: int | None
    metric: str
    """`evaluation.best_by` of the run."""
    value: float | None
    """The best value of the metric after at least one step."""
    is_best: bool = False


def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A config file with a section `sweep:`.")],
    status: Annotated[bool, typer.Option("--status", help="Print the table as it is now, and train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    devices: Annotated[
        int | None, typer.Option("--devices", help="Train so many runs at once, each alone on one device.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME", help="Train this run alone, by its name in the table.")
    ] = None,
    no_cuda: NoCudaInTraining = False,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
) -> int | None:
    """Train the runs that FILE describes, one after another; the same command goes on where it was stopped."""
    if status and devices is not None:
        raise UsageError("--status trains nothing", "--devices", "leave out one of them")
    prints = status or launched_process().rank == 0  # of the processes that a launcher may have started
    plan = load_sweep(file)
    if only is not None:
        plan = _run_named(plan, only)
    configs = (run.resolved.config for run in plan.runs)
    config = next((config for config in configs if not (config.data.eval or config.data.test_size)), None)
    if config is not None and prints:
        metric = config.evaluation.best_by
        print_line(
            f"note    no rows are held out, so nothing gives `{metric}` to compare by: set `data.test_size: 0.1`"
        )
    failed: dict[str, int] = {}
    if devices is not None:
        _refuse_changed_runs(plan)
        given = {"--no-cuda": no_cuda, "--trust-remote-code": trust_remote_code, "--verbose": verbose}
        flags = [flag for flag, is_given in given.items() if is_given]
        failed = train_on_devices(plan.runs, devices, ["sweep", file, *flags, "--only"], no_cuda=no_cuda)
    elif not status:
        prepare_process(trains=True)
        _refuse_changed_runs(plan)
        for number, run in enumerate(plan.runs, 1):
            if prints:
                print_line(f"sweep   run {number} of {len(plan.runs)}: {run.name}")
            code = _train(run, Options(no_cuda, is_offline(), trust_remote_code), verbose=verbose)
            if code:
                failed[run.name] = code
            gc.collect()  # the model of this run, before the next one is loaded
    if prints:
        _print(mark_best([_row(run, has_failed=run.name in failed) for run in plan.runs]), as_json=as_json)
    # A run that diverged is a result: it says that its values do not work.
    return next((code for code in failed.values() if code != DivergedError.exit_code), None)


def _run_named(plan: Sweep, name: str) -> Sweep:
    runs = tuple(run for run in plan.runs if run.name == name)
    if not runs:
        problem = f"the sweep has no run `{excerpt(name)}`"
        raise UsageError(problem, "--only", f"name one of: {', '.join(run.name for run in plan.runs[:5])}")
    return Sweep(plan.name, runs)


def _refuse_changed_runs(plan: Sweep) -> None:
    """Raise ConfigError, for all runs at once, where a folder holds a run with another config."""
    from llmtune.training.auto_resume import refuse_another

    problems: list[Problem] = []
    for run in plan.runs:
        if os.path.lexists(run.path):
            try:
                refuse_another(read_run_file(run.path).get("requested"), run.resolved.config, run.path)
            except ConfigError as error:
                problems += error.problems
    if problems:
        fix = "put the file back as it was, or give the new sweep a name of its own: `sweep: {name: NAME}`"
        raise ConfigError.all(problem._replace(fix=fix) for problem in problems)


def _train(run: SweepRun, options: Options, *, verbose: bool) -> int:
    """Begin the run or go on with it, and return the exit code of its failure, which is printed; 0 without one."""
    from llmtune.training.auto_resume import find_own_run
    from llmtune.training.train import train_or_resume

    try:
        own = find_own_run(run.resolved, options)
        if own.path is not None and own.state == "finished":
            own.joined[0].close(wait_for_main=True)
            if own.joined[0].is_main:
                print_line(f"sweep   finished before, after step {own.step}")
            return 0
        output = open_training_output(verbose=verbose)
        train_or_resume(own, options, print_line=output.line, screen=output.screen)
    except (StoppedBySignal, RankLostError):
        raise  # asks the whole command to stop; and nobody comes to the next run without the process that is lost
    except LlmtuneError as error:
        return report_error(error)
    return 0


def _row(run: SweepRun, *, has_failed: bool) -> SweepRow:
    data = RunData(run.path)
    data.refresh()
    metric = str(data.flat_config.get("evaluation.best_by", run.resolved.config.evaluation.best_by))
    best: float | None = None
    if metric in data.metrics:
        for step, value in data.metrics[metric].finite():
            # Before the first step every run is the same model.
            if step > 0 and (best is None or is_better(metric, value, best)):
                best = value
    state = data.state if data.info else ("failed" if has_failed else "waiting")
    return SweepRow(run.name, str(run.path), run.values, state, data.step, data.total_steps, metric, best)


def mark_best(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Mark the best of the rows that have a value and did not fail; none where they are judged by different metrics."""
    best: SweepRow | None = None
    for row in rows:
        counts = row.value is not None and row.state not in ("diverged", "failed")
        if counts and (best is None or is_better(row.metric, row.value or 0.0, best.value or 0.0)):
            best = row
    if len({row.metric for row in rows}) > 1:
        print_line("the runs are judged by different metrics, so none is marked as the best")
        best = None
    return [row._replace(is_best=row is best) for row in rows]


def _print(rows: Sequence[SweepRow], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps({**row._asdict(), "path": printable(Path(row.path))}, ensure_ascii=False))
        return
    table = [("RUN", "STATE", "STEP", "METRIC", "VALUE", "")]
    for row in rows:
        step = "-" if row.state == "waiting" else f"{row.step}/{row.total_steps or '?'}"
        value = "-" if row.value is None else f"{row.value:.4f}"
        table.append((row.name, row.state, step, row.metric, value, "best" if row.is_best else ""))
    print_table(table)
