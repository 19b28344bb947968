"""P2: the comparison that every kill is judged by is tried on mutants of a resume: each forgets one thing, and must be
caught.

One run is killed in the middle of its training; each mutant resumes a copy of it in a forked child, and the finished
run must differ from the run nobody stopped, or the resume must refuse. The honest resume of the same copy must not.
"""

import shutil
import signal
from dataclasses import replace

import peft  # noqa: F401 - once here, not in every child
import pytest
import transformers.models.llama.modeling_llama  # noqa: F401

from disk_faults import Unsynced
from fault_helpers import in_memory
from llmtune import durable
from llmtune.config.layers import load_config
from llmtune.data.dataset.batches import BatchPlan
from llmtune.engine import loop, state
from llmtune.tracking.jsonl import RunRecord
from llmtune.training import checkpointer, evaluator, training_run
from llmtune.training import train as training
from llmtune.verify.subprocesses import run_forked
from phase_signals import sending
from training_helpers import difference, small_run

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

rebuild_windows = BatchPlan.windows
restore_all = state.restore
train_steps = loop.train_steps


def forget(*given, **named):
    """Does nothing where something is needed."""


def windows_from_the_start(plan, start_step=0):
    return rebuild_windows(plan, 0)


def windows_one_too_far(plan, start_step=0):
    return rebuild_windows(plan, start_step + bool(start_step))


def restore_but_the_counters(snapshot, **named):
    restore_all(snapshot, **{**named, "state": state.TrainingState()})


def mean_of_means(**named):
    """Each micro-batch is averaged by itself, as if all had as many trained tokens."""
    objective = named["objective"]
    averaged = replace(objective, loss_sum=lambda batch: objective.loss_sum(batch) / batch.loss_weight)
    return train_steps(**{**named, "objective": averaged})


# What is left out of a resume -> (where, name, what stands in its place)
MUTANTS = {
    "no random generators": (state, "restore_rng", forget),
    "no cursor: the rows start again": (BatchPlan, "windows", windows_from_the_start),
    "the cursor is one window too far": (BatchPlan, "windows", windows_one_too_far),
    "no optimizer state": (state, "_restore_optimizer", forget),
    "no counters": (training_run, "restore", restore_but_the_counters),
    "no weights": (checkpointer, "restore_weights", forget),
    "no outlook: the best so far is forgotten": (evaluator.Evaluator, "restore", forget),
    "the record not cut": (RunRecord, "rewind", lambda record, position: 0),
    "the rate starts again": (training_run.TrainingRun, "_rate", lambda one, step: one.learning_rate(0)),
    "a mean of means": (training_run, "train_steps", mean_of_means),
}


class Scene:
    def __init__(self, place, model, rows):
        self.place = place
        self.given = small_run(
            model,
            rows,
            place,
            "training.max_steps=6",
            "training.gradient_accumulation_steps=2",
            "training.learning_rate=0.01",
            "checkpoint.every_steps=2",
        )
        assert self.child(lambda: self.train("whole")).code == 0
        # Killed after step 4, whose lines are in the log, with step 2 saved.
        end = self.child(sending(lambda: self.train("template"), "evaluation", [signal.SIGKILL], nth=3))
        assert end.code == -signal.SIGKILL, end
        saved = [one.name for one in (place / "template" / "checkpoints").glob("step-??????")]
        assert saved == ["step-000002"]
        assert '"step": 4' in (place / "template" / "metrics.jsonl").read_text()

    def train(self, name, *more):
        training.train(load_config(None, overrides=[*self.given, f"run.name={name}", *more], environ={}))

    @staticmethod
    def child(story):
        def run():
            with durable.use_backend(Unsynced()):
                story()

        return run_forked(run)

    def difference(self, change=lambda: None):
        """Resume a copy of the killed run after `change`; the first claim that does not hold, or ''."""
        run = self.place / "copy"
        shutil.copytree(self.place / "template", run)

        def resume():
            change()
            training.resume(str(run))

        try:
            end = self.child(resume)
            if end.code:
                return f"refused: {end.error}"
            return difference(self.place / "whole", run)
        finally:
            shutil.rmtree(run)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_model_folder, rows_file):
    with in_memory(tmp_path_factory.mktemp("mutants")) as place:
        yield Scene(place, tiny_model_folder, rows_file)


def test_the_honest_resume_is_not_taken_for_a_mutant(scene):
    assert scene.difference() == ""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_p2_a_mutant_of_a_resume_is_caught(scene, mutant):
    found = scene.difference(lambda: setattr(*MUTANTS[mutant]))
    print(mutant, "->", found[:120])  # shown by `pytest -rP`
    assert found
