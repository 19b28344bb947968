"""Trainings that send themselves signals when they enter a phase, for forked processes that end afterwards."""

import functools
import inspect
import os
import time

from llmtune.runs import checkpoint
from llmtune.runs.folder import RunFolder
from llmtune.training import checkpointer, evaluator, run_setup, train, training_run

# (where, function, the phase that lasts while it runs); of nested functions the innermost one counts
PHASES = (
    (train, "prepare", "data"),
    (train, "build_setup", "loading"),
    (run_setup, "create", "creating"),
    (RunFolder, "open", "resuming"),
    (run_setup, "find_checkpoint", "resuming"),
    (training_run.TrainingRun, "restore", "resuming"),
    (training_run.TrainingRun, "steps", "training"),
    (evaluator.Evaluator, "evaluate", "evaluation"),
    (evaluator, "generate", "generation"),
    (evaluator, "predict_answers", "generation"),
    (checkpointer.Checkpointer, "save", "saving"),
    (checkpointer.Checkpointer, "save_best", "saving"),
    (checkpoint, "delete_old_checkpoints", "retention"),
    (checkpointer.Checkpointer, "save_final", "finishing"),
    (training_run.TrainingRun, "_cleanup", "finishing"),
)


def sending(function, phase, signals, *, nth=1, pause_s=0.0):
    """Return `function` for a forked process: at its `nth` change to `phase` it sends itself `signals`.

    The changed functions are not restored, so it must not be called in a process that goes on.
    """
    changes = iter(range(1, 1_000_000))

    def enter(new):
        if new == phase and next(changes) == nth:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(pause_s)

    def run():
        current = ["start"]
        for owner, name, phase_of_function in PHASES:
            setattr(owner, name, _marked(getattr(owner, name), phase_of_function, current, enter))
        return function()

    return run


def _marked(original, phase, current, enter):
    @functools.wraps(original)
    def marked(*arguments, **named):
        before, current[0] = current[0], phase
        enter(phase)
        try:
            return original(*arguments, **named)
        finally:
            current[0] = before
            enter(before)

    @functools.wraps(original)
    def marked_generator(*arguments, **named):
        before, current[0] = current[0], phase
        enter(phase)
        try:
            yield from original(*arguments, **named)
        finally:
            current[0] = before
            enter(before)

    if inspect.isgeneratorfunction(original):
        return marked_generator
    return staticmethod(marked) if inspect.ismethod(original) else marked
