"""A program with a trainer of its own, started in two processes."""

import os
import signal
import threading
import time

import pytest

from llmtune import Stop, Trainer
from llmtune.errors import ConfigError, StoppedBySignal, UsageError
from rank_helpers import in_two_ranks

SHORT_ANSWERS = ("evaluation.max_new_tokens=4",)


def quiet(line):
    """Say nothing."""


def both_end(function):
    """Run it in two processes, which end without an error."""
    codes, said = in_two_ranks(function)
    assert codes == [0, 0], "\n".join(said)


def is_first():
    return os.environ["RANK"] == "0"


@pytest.mark.parametrize("where", ["the first", "the other"])
def test_callbacks_and_metrics_of_one_process_do_not_part_them(config_of, tmp_path, where):
    """The usual `if rank == 0`; and what it says to stop for stops both."""
    config = config_of("training.max_steps=6", "distributed.timeout_s=10")

    class Seen:
        def on_evaluate(self, step, metrics):
            (tmp_path / f"seen-{os.environ['RANK']}").write_text(str(step))

    def program():
        has_some = is_first() == (where == "the first")
        more = {"callbacks": [Seen()], "metrics": [lambda step: Stop("enough") if step.step == 5 else None]}
        trainer = Trainer(config, print_line=quiet, **(more if has_some else {}))
        assert [step.step for step in trainer.steps()] == [1, 2, 3, 4, 5]

    both_end(program)
    assert [path.name for path in tmp_path.glob("seen-*")] == [f"seen-{0 if where == 'the first' else 1}"]


def test_a_signal_while_one_process_waits_for_the_other_between_two_steps_stops_both_saved(config_of):
    """It waits to hear whether the other one goes on."""
    config = config_of("training.max_steps=6", "checkpoint.every_steps=100", "distributed.timeout_s=20")

    def program():
        def pause(step):
            if step.step == 2 and not is_first():
                time.sleep(2)
            elif step.step == 2:
                threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

        trainer = Trainer(config, print_line=quiet)
        with pytest.raises(StoppedBySignal):
            any(pause(step) for step in trainer.steps())
        result = trainer.result()
        assert (result.state, result.step) == ("stopped", 3)
        if is_first():
            assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["step-000003"]

    both_end(program)


@pytest.mark.parametrize("how", ["break", "an error"])
def test_where_one_process_leaves_the_loop_all_stop_at_that_step_saved(config_of, how):
    """An exception in the loop of one process leaves it too."""
    config = config_of("training.max_steps=6", "checkpoint.every_steps=100", "distributed.timeout_s=10")

    def program():
        seen = []
        try:
            with Trainer(config, print_line=quiet) as trainer:
                for step in trainer.steps():
                    seen.append(step.step)
                    if step.step == 3 and not is_first():
                        assert how == "break", "an error"
                        break
        except AssertionError:
            assert not is_first()
        assert seen == [1, 2, 3]
        result = trainer.result()
        assert (result.state, result.step) == ("stopped", 3)
        if is_first():
            assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["step-000003"]

    both_end(program)


def test_the_model_is_evaluated_and_asked_after_the_end_by_one_process_or_all(config_of):
    config = config_of("training.max_steps=2", "distributed.timeout_s=10", "evaluation.score=f1", *SHORT_ANSWERS)

    def program():
        trainer = Trainer(config, print_line=quiet)
        result = trainer.train()
        again = trainer.evaluate()
        assert again["eval_score"] == pytest.approx(result.metrics["eval_score"])
        assert again["eval_mean_nll"] == pytest.approx(result.metrics["eval_mean_nll"], rel=1e-6)
        assert again["eval_num_loss_tokens"] == result.metrics["eval_num_loss_tokens"]
        if not is_first():
            assert trainer.evaluate() == again
            assert trainer.generate("the user asks", max_new_tokens=2)

    both_end(program)


def test_processes_that_hold_parts_of_the_weights_are_asked_together_and_refuse_after_the_end(config_of):
    config = config_of("training.max_steps=2", "distributed.strategy=fsdp", "distributed.timeout_s=10")

    def program():
        trainer = Trainer(config, print_line=quiet)
        for step in trainer.steps():
            (answer,) = trainer.generate("the user asks", max_new_tokens=4)
            assert answer.num_tokens
            assert trainer.evaluate()["eval_mean_nll"] > 0
            if step.step == 1:
                with pytest.raises(ConfigError, match=r"what is asked is .* there and .* here"):
                    trainer.generate("the user asks" if is_first() else "something else", max_new_tokens=4)
        with pytest.raises(UsageError, match="parted at its end"):
            trainer.evaluate()
        with pytest.raises(UsageError, match="`llmtune generate RUN` afterwards"):
            trainer.generate("the user asks")

    both_end(program)
