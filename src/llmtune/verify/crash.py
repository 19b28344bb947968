"""`verify crash`: a training is killed at chosen file operations (writes, syncs, renames, deletions), resumed, and compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from llmtune import durable, pipeline
from llmtune.config.layers import load_config
from llmtune.durable.faults import Counting, Killing
from llmtune.errors import CheckpointError
from llmtune.verify.children import in_child
from llmtune.verify.sameness import compare_runs
from llmtune.verify.verdict import Verdict

__all__ = ["verify_crash"]


def verify_crash(
    config: str | None, overrides: Sequence[str], folder: Path, *, steps: int, kills: int, say: Callable[[str], None]
) -> Verdict:
    """Kill a training of `steps` steps at `kills` file operations, evenly spread over all it makes, and resume it each time.

    Every kill must leave a run that `resume` finishes with no repair by hand, byte-identical to the run nobody stopped. The processes
    are forked, so this one must not have computed anything, nor set torch's number of threads (each thread of a child would then set it
    again, and torch's pool does not survive that after a fork). Raises CheckpointError when the run that nobody stopped does not end well.
    """
    shared = [*overrides, f"training.max_steps={steps}", f"run.output_dir={folder}", "tracking.trackers=[jsonl]"]
    shared += [f"checkpoint.every_steps={max(1, steps // 4)}", "checkpoint.keep_last=1", "evaluation.prompts=[]"]

    def train(name: str) -> None:
        pipeline.train(load_config(config, overrides=[*shared, f"run.name={name}"]))

    whole, count_file = folder / "whole", folder / "operations.json"

    def count() -> None:
        with durable.use_backend(Counting()) as backend:
            train("counted")
        assert isinstance(backend, Counting)
        durable.write_json(count_file, backend.count)

    durable.make_folder(folder)
    # The first training fills the caches, so that the second makes just the operations that the killed ones make.
    for function in (lambda: train("whole"), count):
        end = in_child(function)
        if end.code != 0:
            what = f"the training that nobody stopped ended with exit code {end.code}: {end.error}"
            raise CheckpointError(what, fix="try `llmtune train` with the same config")
    operations = json.loads(count_file.read_bytes())
    verdict = Verdict("crash")
    outcomes: Counter[str] = Counter()
    places = sorted({1 + index * (operations - 1) // max(1, kills - 1) for index in range(min(kills, operations))})
    for place in places:
        outcomes[_kill_and_resume(train, folder, place, whole, verdict)] += 1
        say(f"killed at operation {place} of {operations}")
    counted = ", ".join(f"{number} {what}" for what, number in sorted(outcomes.items()))
    verdict.note(
        "every killed run finishes byte-identical, with no repair by hand",
        counted,
        set(outcomes) <= {"identical", "before the run existed"},
    )
    return verdict


def _kill_and_resume(train: Callable[[str], None], folder: Path, place: int, whole: Path, verdict: Verdict) -> str:
    name = f"killed-{place}"
    stopped = folder / name

    def killed() -> None:
        with durable.use_backend(Killing(place, for_real=True)):
            train(name)

    end = in_child(killed)
    if end.code != -9:
        verdict.note(f"the kill at operation {place} happened", f"the training ended with exit code {end.code}: {end.error}", False)
        return "not killed"
    if not (stopped / "run.json").is_file():
        return "before the run existed"
    end = in_child(lambda: pipeline.resume(str(stopped)))
    if end.code != 0:
        verdict.note(f"the run killed at operation {place} resumes", f"exit code {end.code}: {end.error}", False)
        return "not resumed"
    one = Verdict(name)
    compare_runs(whole, stopped, one)
    if not one.passed:
        verdict.findings += [finding for finding in one.findings if not finding.holds]
        return "different"
    durable.remove_tree(stopped)
    return "identical"
