"""`verify crash`: trainings are killed at random moments, resumed, and compared with the run nobody stopped.

A *life* is one training under attack: its first process is killed, the process that resumes it is killed too, and so
on; the last one finishes. Then the run must be byte for byte the one that nobody stopped. The phase a kill met is read
from the run folder as the kill left it, so that the attacked process runs exactly the code a user runs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmtune import durable
from llmtune.common.text import PrintLine
from llmtune.config.layers import load_config
from llmtune.errors import CheckpointError
from llmtune.runs.run_file import read_run_file
from llmtune.training import train as training
from llmtune.verify.compare_runs import compare_runs
from llmtune.verify.result import Verdict
from llmtune.verify.subprocesses import ProcessEnd, run_command, run_forked

__all__ = ["PHASES", "verify_crash"]

PHASES = ("starting", "resuming", "training", "saving", "finishing")
"""starting: there is no run folder yet; resuming: it is as the last process left it; saving: an unfinished folder lies
beside the checkpoints; finishing: the last step is recorded; training: every other moment.
"""

_FRUITLESS_LIVES = 50  # this many lives in a row without a kill: the measured lifetimes are of no use


@dataclass(frozen=True)
class Death:
    """One kill and the outcome of its run."""

    life: int
    process: str
    """The killed process: `train` or `resume`."""
    moment: str
    phase: str
    """One of `PHASES`."""
    outcome: str = ""
    """`identical`, `different`, `lost` (the run cannot be resumed) or `litter` (unfinished files stay behind)."""


def verify_crash(
    config: str | None,
    overrides: Sequence[str],
    folder: Path,
    *,
    steps: int,
    kills: int,
    kills_in_a_life: int = 2,
    print_line: PrintLine,
    seed: int = 0,
    through_commands: bool = False,
    record: Path | None = None,
) -> Verdict:
    """Kill trainings of `steps` steps `kills` times with SIGKILL and resume them; `seed` decides the moments.

    The moments spread over the time that a run is expected to live (see `_Campaign.live`). A run is finished and
    compared after `kills_in_a_life` of them. `through_commands` starts `llmtune train` and `llmtune resume` instead of
    forked processes. `record` gets one JSON line for each kill.

    Processes are forked, so this one must not have computed anything, nor set torch's number of threads (each thread
    of a child would then set it again, and torch's pool does not survive that after a fork). Raises CheckpointError
    when the run that nobody stops fails.
    """
    shared = [*overrides, f"training.max_steps={steps}", f"run.output_dir={folder}", "tracking.trackers=[jsonl]"]
    shared += [f"checkpoint.every_steps={max(1, steps // 4)}", "checkpoint.keep_last=1"]
    shared += [f"evaluation.every_steps={max(1, steps // 2)}", "evaluation.max_new_tokens=4"]
    durable.make_folder(folder)
    trainings = _as_commands if through_commands else _as_forks
    campaign = _Campaign(trainings(config, shared), folder, steps, np.random.default_rng(seed))
    campaign.measure(print_line)
    deaths: list[Death] = []
    fruitless = 0
    for life in itertools.count(1):
        if len(deaths) >= kills or fruitless == _FRUITLESS_LIVES:
            break
        deaths_of_life = campaign.live(life, min(kills_in_a_life, kills - len(deaths)))
        fruitless = 0 if deaths_of_life else fruitless + 1
        for number, death in enumerate(deaths_of_life, len(deaths) + 1):
            print_line(f"kill {number} of {kills}: {death.process} in {death.phase}, {death.moment}: {death.outcome}")
        deaths += deaths_of_life
        if record is not None:
            with durable.AppendLog(record) as log:
                for death in deaths_of_life:
                    log.append({**asdict(death), "seed": seed})
    return _verdict(deaths, kills, campaign.differences)


class Trainings(NamedTuple):
    """How the attacked processes are started; each function waits for the end, or kills after so many seconds."""

    train: Callable[[str, float | None], ProcessEnd]
    """Starts a training under a name."""
    resume: Callable[[Path, float | None], ProcessEnd]
    """Resumes the training in a folder."""


def _as_commands(config: str | None, overrides: Sequence[str]) -> Trainings:
    """`llmtune train` and `llmtune resume`, as a user types them."""
    train = ["train", *(["--config", config] if config else []), *overrides]
    return Trainings(
        lambda name, kill_after_s: run_command([*train, f"run.name={name}"], kill_after_s=kill_after_s),
        lambda run, kill_after_s: run_command(["resume", str(run)], kill_after_s=kill_after_s),
    )


def _as_forks(config: str | None, overrides: Sequence[str]) -> Trainings:
    """The functions behind those commands in forked processes, each of which takes a fraction of a second."""

    def train(name: str) -> None:
        training.train(load_config(config, overrides=[*overrides, f"run.name={name}"]))

    return Trainings(
        lambda name, kill_after_s: run_forked(lambda: train(name), kill_after_s=kill_after_s),
        lambda run, kill_after_s: run_forked(lambda: training.resume(str(run)), kill_after_s=kill_after_s),
    )


class _Campaign:
    """The runs of one attack."""

    def __init__(self, trainings: Trainings, folder: Path, steps: int, random: np.random.Generator) -> None:
        self._trainings, self._folder, self._steps, self._random = trainings, folder, steps, random
        self._train_s = self._resume_s = 0.0
        self.differences = Verdict("differences")
        """The claims that do not hold of a resumed run."""

    def measure(self, print_line: PrintLine) -> None:
        """Train the run that nobody stops, and measure how long a training and a resume of it take."""

        def seconds_of(end: ProcessEnd) -> float:
            if end.code != 0:
                problem = f"the training that nobody stopped ended with exit code {end.code}: {end.error}"
                raise CheckpointError(problem, fix="try `llmtune train` with the same config")
            return end.seconds

        seconds_of(self._trainings.train("whole", None))
        # The first training fills the caches; the second one lives as long as those that will be killed.
        self._train_s = seconds_of(self._trainings.train("measured", None))
        self._resume_s = seconds_of(self._trainings.resume(self._folder / "measured", None))
        print_line(f"a training takes {self._train_s:.2f} s; resuming takes {self._resume_s:.2f} s")

    def live(self, life: int, kills: int) -> list[Death]:
        """Kill one run up to `kills` times, finish it, compare it, and return the kills that met a living process."""
        run = self._folder / f"life-{life}"
        deaths: list[Death] = []
        while True:
            before = trace_of(run)
            # The last one uniform over the expected life, so that no moment is left out for good; those before it over
            # a part, so that the kills after them find the run unfinished.
            left = kills - len(deaths)
            kill_after_s = float(self._random.uniform(0, 2 / (left + 1) * self._expected_s(run))) if left else None
            # After a crash a user types the same command again where there is no run yet, otherwise `resume`.
            if before.is_run:
                end = self._trainings.resume(run, kill_after_s)
            else:
                end = self._trainings.train(run.name, kill_after_s)
            if not end.was_killed:
                break
            phase = phase_between(before, trace_of(run), steps=self._steps)
            deaths.append(Death(life, "resume" if before.is_run else "train", f"after {kill_after_s:.2f} s", phase))
        outcome = self._judge(run, end)
        # Those that differ stay, to be looked at.
        if outcome == "identical":
            durable.remove_tree(run)
        return [replace(death, outcome=outcome) for death in deaths]

    def _expected_s(self, run: Path) -> float:
        """Seconds that the next process of `run` is expected to live."""
        if not (run / "run.json").is_file():
            return self._train_s
        saved = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-??????")), default=0)
        return self._resume_s + (1 - saved / self._steps) * max(0.0, self._train_s - self._resume_s)

    def _judge(self, run: Path, end: ProcessEnd) -> str:
        """Return the outcome of a life (see `Death.outcome`) and note every difference."""
        if end.code != 0:
            self.differences.add(f"{run.name} goes on", f"exit code {end.code}: {end.error}", False)
            return "lost"
        litter = unfinished_in(self._folder) | unfinished_in(run) | unfinished_in(run / "checkpoints")
        if litter:
            self.differences.add(f"{run.name} leaves nothing behind", ", ".join(sorted(litter)), False)
            return "litter"
        comparison = Verdict(run.name)
        compare_runs(self._folder / "whole", run, comparison)
        state = read_run_file(run)["state"]
        comparison.add(f"{run.name} is finished", state, state == "finished")
        self.differences.findings += [finding for finding in comparison.findings if not finding.holds]
        return "identical" if comparison.passed else "different"


class Trace(NamedTuple):
    """The parts of a run folder that tell the phase of a killed process."""

    is_run: bool
    last_line: dict[str, object]
    """The newest line of metrics.jsonl; empty where there is none."""
    unfinished: frozenset[str]
    """Names of unfinished folders beside the checkpoints."""


def trace_of(run: Path) -> Trace:
    """Read the trace in the run folder `run`, which need not exist."""
    lines = durable.read_lines(run / "metrics.jsonl")
    return Trace((run / "run.json").is_file(), lines[-1] if lines else {}, unfinished_in(run / "checkpoints"))


def unfinished_in(folder: Path) -> frozenset[str]:
    """Return the names of unfinished files and folders in `folder`, which need not exist."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return frozenset(name for name in names if name.startswith(durable.UNFINISHED_PREFIX))


def phase_between(before: Trace, after: Trace, *, steps: int) -> str:
    """Return the phase (see `PHASES`) of a process that began at the trace `before` and was killed at `after`."""
    if not after.is_run:
        return "starting"
    is_saving = bool(after.unfinished - before.unfinished)
    if before.is_run and not is_saving and after.last_line == before.last_line:
        return "resuming"
    if after.last_line.get("step") == steps:
        return "finishing"
    return "saving" if is_saving else "training"


def _verdict(deaths: Sequence[Death], kills: int, differences: Verdict) -> Verdict:
    """Sum up all kills in a table and two claims, followed by the differences."""
    verdict = Verdict("crash", table=list(_table(deaths)))
    outcomes = Counter(death.outcome for death in deaths)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())) or "none"
    verdict.add(
        "every killed run finishes byte-identical, with no repair by hand", counts, set(outcomes) == {"identical"}
    )
    verdict.add("as many kills as asked for met a living process", f"{len(deaths)} of {kills}", len(deaths) == kills)
    verdict.findings += differences.findings
    return verdict


def _table(deaths: Sequence[Death]) -> Iterator[str]:
    """Yield the lines of the table: kills, and those whose run finished byte-identical, by phase."""
    kills = Counter(death.phase for death in deaths)
    identical = Counter(death.phase for death in deaths if death.outcome == "identical")
    yield f"{'phase':12} {'kills':>8} {'identical':>9}"
    for phase in PHASES:
        if kills[phase]:
            yield f"{phase:12} {kills[phase]:8} {identical[phase]:9}"
    yield f"{'all':12} {kills.total():8} {identical.total():9}"
