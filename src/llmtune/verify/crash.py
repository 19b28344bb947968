"""`verify crash`: trainings are killed, half of the times at a random moment and half at a random file operation,
resumed, and compared.

A *life* is one training under attack: its first process is killed, the process that resumes it is killed too, and so
on; the last one finishes. Then the run must be byte for byte the one that nobody stopped.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmtune import durable
from llmtune.common.printing import PrintLine
from llmtune.errors import CheckpointError
from llmtune.runs.folder import read_run_file
from llmtune.verify.file_checks import compare_runs
from llmtune.verify.kill_points import PHASES
from llmtune.verify.launch import Commands, End, Forked, Kill, Starter
from llmtune.verify.result import Verdict

__all__ = ["verify_crash"]

_KILLS_IN_A_LIFE = 2
_FRUITLESS_LIVES = 50


@dataclass(frozen=True)
class Death:
    """One kill, and what became of its run."""

    life: int
    process: str
    """`train`, `resume` or the like: what was killed."""
    how: str
    """`time` or `call`: what the moment was drawn from."""
    moment: str
    phase: str
    outcome: str = ""


def verify_crash(
    config: str | None,
    overrides: Sequence[str],
    folder: Path,
    *,
    steps: int,
    kills: int,
    print_line: PrintLine,
    seed: int = 0,
    through_commands: bool = False,
    record: Path | None = None,
) -> Verdict:
    """Kill trainings of `steps` steps `kills` times with SIGKILL and resume them; `seed` decides the moments.

    Half of the kills fall uniformly in the time a process lives, half uniformly over its file operations while it
    saves, deletes old checkpoints, resumes and finishes (a write is torn in its middle). `through_commands` starts
    `llmtune train` and `llmtune resume` instead of forked processes; all kills then fall in time. `record` gets one
    JSON line for each kill.

    The processes are forked, so this one must not have computed anything, nor set torch's number of threads (each
    thread of a child would then set it again, and torch's pool does not survive that after a fork). Raises
    CheckpointError when the run that nobody stopped does not end well.
    """
    shared = [*overrides, f"training.max_steps={steps}", f"run.output_dir={folder}", "tracking.trackers=[jsonl]"]
    shared += [f"checkpoint.every_steps={max(1, steps // 4)}", "checkpoint.keep_last=1"]
    shared += [f"evaluation.every_steps={max(1, steps // 2)}", "evaluation.max_new_tokens=4"]
    durable.make_folder(folder)
    starter = Commands(config, shared, folder) if through_commands else Forked(config, shared, folder)
    campaign = _Campaign(starter, folder, steps, np.random.default_rng(seed))
    campaign.measure(print_line)
    deaths: list[Death] = []
    fruitless = 0
    for life in itertools.count(1):
        if len(deaths) >= kills or fruitless == _FRUITLESS_LIVES:
            break
        found = campaign.live(life, min(_KILLS_IN_A_LIFE, kills - len(deaths)))
        fruitless = 0 if found else fruitless + 1
        for one in found:
            deaths.append(one)
            print_line(f"kill {len(deaths)} of {kills}: {one.process} in {one.phase}, {one.moment}: {one.outcome}")
        _keep_record(record, found, seed)
    return _verdict(deaths, kills, campaign.findings)


class _Campaign:
    """The runs of one attack."""

    def __init__(self, starter: Starter, folder: Path, steps: int, chance: np.random.Generator) -> None:
        self._starter, self._folder, self._steps, self._chance = starter, folder, steps, chance
        self._whole = folder / "whole"
        self._ways: Counter[str] = Counter()
        self._speeds: deque[float] = deque(
            [1.0], maxlen=5
        )  # of processes nobody killed: seconds lived for each second expected
        self.findings = Verdict("differences")
        """What does not hold of a run that was resumed."""

    def measure(self, print_line: PrintLine) -> None:
        """Train what nobody stops, and learn how long a process lives and how many operations it makes."""
        self._check(self._starter.train("whole"))
        # The first training fills the caches, so that the second lives as long as the killed ones.
        self._new = self._check(self._starter.train("measured"))
        self._resumed = self._check(self._starter.resume(self._folder / "measured"))
        lives = f"a training takes {self._new.seconds:.2f} s and makes {self._new.calls} of the operations"
        print_line(f"{lives}; resuming takes {self._resumed.seconds:.2f} s")

    @staticmethod
    def _check(end: End) -> End:
        if end.code != 0:
            what = f"the training that nobody stopped ended with exit code {end.code}: {end.error}"
            raise CheckpointError(what, fix="try `llmtune train` with the same config")
        return end

    def live(self, life: int, kills: int) -> list[Death]:
        """Kill one run up to `kills` times, finish it, compare it, and return the kills that met it."""
        name = f"life-{life}"
        run = self._folder / name
        deaths: list[Death] = []
        end: End | None = None
        while len(deaths) < kills:
            how = self._next_way()
            kill, process = self._draw(how, run), "resume" if (run / "run.json").is_file() else "train"
            end = self._go_on(run, kill)
            if not end.was_killed:
                break
            deaths.append(Death(life, process, how, str(kill), end.phase))
            self._ways[how] += 1
        if end is None or end.was_killed:
            end = self._go_on(run, Kill())
        outcome = self._judge(run, end)
        if outcome == "identical":
            durable.remove_tree(run)
        return [Death(**{**asdict(one), "outcome": outcome}) for one in deaths]

    def _next_way(self) -> str:
        """`time` or `call`: the one that had fewer kills, either when they had as many."""
        if not self._starter.counts_calls:
            return "time"
        ways = ("time", "call") if self._chance.random() < 0.5 else ("call", "time")
        return min(ways, key=lambda way: self._ways[way])

    def _go_on(self, run: Path, kill: Kill) -> End:
        """What a user does after a crash, and no more: the same command again where there is no run yet, otherwise
        `resume`.
        """
        expected_s, _ = self._expected(run)
        end = self._starter.resume(run, kill) if (run / "run.json").is_file() else self._starter.train(run.name, kill)
        if not end.was_killed:
            self._speeds.append(end.seconds / expected_s)
        return end

    def _expected(self, run: Path) -> tuple[float, int]:
        """Seconds and operations that the next process of `run` is expected to live and to make."""
        if not (run / "run.json").is_file():
            return self._new.seconds, self._new.calls
        saved = max((int(one.name[5:]) for one in (run / "checkpoints").glob("step-??????")), default=0)
        left = (self._steps - saved) / self._steps
        rest_s = max(0.0, self._new.seconds - self._resumed.seconds)
        return self._resumed.seconds + left * rest_s, self._resumed.calls + round(left * self._new.calls)

    def _draw(self, how: str, run: Path) -> Kill:
        """Choose a moment in the life that the next process of `run` is expected to have."""
        seconds, calls = self._expected(run)
        if how == "time":
            return Kill(after_s=float(self._chance.uniform(0, seconds * float(np.median(self._speeds)))))
        return Kill(at_call=int(self._chance.integers(1, calls + 1)))

    def _judge(self, run: Path, end: End) -> str:
        """`identical`, or what is wrong, which is noted."""
        if end.code != 0:
            self.findings.note(f"{run.name} goes on", f"exit code {end.code}: {end.error}", False)
            return "lost"
        litter = [
            one.name
            for one in (*self._folder.iterdir(), *run.iterdir(), *(run / "checkpoints").iterdir())
            if one.name.startswith(".llmtune")
        ]
        if litter:
            self.findings.note(f"{run.name} leaves nothing behind", ", ".join(litter), False)
            return "litter"
        one = Verdict(run.name)
        compare_runs(self._whole, run, one)
        self.findings.findings += [finding for finding in one.findings if not finding.holds]
        state = read_run_file(run)["state"]
        if state != "finished":
            self.findings.note(f"{run.name} is finished", state, False)
            return "different"
        return "identical" if one.passed else "different"


def _keep_record(record: Path | None, deaths: Sequence[Death], seed: int) -> None:
    if record is not None:
        with durable.AppendLog(record) as log:
            for one in deaths:
                log.append({**asdict(one), "seed": seed})


def _verdict(deaths: Sequence[Death], kills: int, differences: Verdict) -> Verdict:
    """Sum up."""
    verdict = Verdict("crash")
    verdict.table = list(_table(deaths))
    outcomes = Counter(one.outcome for one in deaths)
    counted = ", ".join(f"{number} {what}" for what, number in sorted(outcomes.items())) or "none"
    verdict.note(
        "every killed run finishes byte-identical, with no repair by hand", counted, set(outcomes) == {"identical"}
    )
    verdict.note("as many kills as asked for met a living process", f"{len(deaths)} of {kills}", len(deaths) == kills)
    verdict.findings += differences.findings
    return verdict


def _table(deaths: Sequence[Death]) -> Iterator[str]:
    """Kills by phase and by what their moment was drawn from."""
    counts = Counter((one.phase, one.how) for one in deaths)
    yield f"{'phase':12} {'in time':>8} {'at calls':>8} {'identical':>9}"
    for phase in PHASES:
        same = sum(one.outcome == "identical" for one in deaths if one.phase == phase)
        if counts[phase, "time"] + counts[phase, "call"]:
            yield f"{phase:12} {counts[phase, 'time']:8} {counts[phase, 'call']:8} {same:9}"
    times, calls = (sum(one.how == how for one in deaths) for how in ("time", "call"))
    yield f"{'all':12} {times:8} {calls:8} {sum(one.outcome == 'identical' for one in deaths):9}"
