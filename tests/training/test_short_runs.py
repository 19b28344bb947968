"""Settings that a short run rounds to nothing, or never comes to: refused, or said before the model is loaded."""

import pytest

from llmtune.config.process_options import Options
from llmtune.errors import ConfigError, UsageError
from llmtune.prepare import prepare
from llmtune.training import train as training
from llmtune.training.progress import print_result

ONE_STEP = ("training.max_steps=1",)


def notes(resolved):
    """What a dry run notes."""
    lines = []
    training.dry_run(resolved, Options(no_cuda=True, offline=True), print_line=lines.append)
    return [line.removeprefix("note    ") for line in lines if line.startswith("note ")]


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("training.warmup_ratio=0.1", "training.warmup_ratio=0"),
        ("training.warmup_ratio=0.001", "training.warmup_ratio=0"),
        ("training.warmup_steps=1", "training.warmup_steps=0"),
    ],
)
def test_a_run_of_which_every_rate_is_zero_is_refused_and_its_fix_trains(config_of, setting, fix):
    for start in (notes, training.train):
        with pytest.raises(ConfigError, match="nothing would be trained") as error:
            start(config_of(*ONE_STEP, setting))
        assert f"set `{fix}`" in error.value.problems[0].fix
    assert training.train(config_of(*ONE_STEP, setting, fix)).metrics["learning_rate"] == 0.01


def test_a_dry_run_refuses_a_judge_that_the_run_would_refuse(config_of):
    with pytest.raises(UsageError, match=r"there is no file `nosuch\.py`"):
        training.dry_run(config_of(), Options(score="nosuch.py:f", no_cuda=True), print_line=lambda line: None)
    with pytest.raises(ConfigError, match="none is named"):
        notes(config_of("objective.method=grpo"))


def test_ten_rows_in_one_batch_are_one_step(config_of):
    with pytest.raises(ConfigError, match="the warm-up of 1 begins at 0 and the run has 1"):
        notes(
            config_of("data.max_samples=10", "training.epochs=1", "training.batch_size=16", "training.warmup_ratio=0.1")
        )


@pytest.mark.parametrize("rate", ["1e-45", "1e-39"])
def test_a_rate_that_float32_has_not_is_refused(config_of, rate):
    for start in (notes, training.train):
        with pytest.raises(ConfigError, match=f"a learning rate of {rate} is 0 for float32 weights"):
            start(config_of(f"training.learning_rate={rate}"))


@pytest.mark.parametrize(
    "settings",
    [
        ("training.learning_rate=1e-20",),
        ("training.max_grad_norm=1e-30", "training.weight_decay=0"),
        ("training.eps=1e30", "training.weight_decay=0"),
        ("training.optimizer=sgd", "training.learning_rate=1e-15", "training.weight_decay=0"),
    ],
    ids=" ".join,
)
def test_a_training_that_changes_no_weight_says_so_at_its_first_step_and_at_its_end(config_of, settings):
    lines = []
    # The embedding has a row of zeros, which any number above 0 moves.
    settings = (*settings, "model.train_only=[.*q_proj.*, .*norm.*]", "training.max_steps=3", "data.max_samples=12")
    run = training.train(config_of(*settings), print_line=lines.append)
    print_result(run, lines.append)
    said = [line for line in lines if line.startswith("warning")]
    assert [line.split(":")[1] for line in said] == [
        " step 1 has changed no weight",
        " the steps made now have changed no weight",
    ]
    assert "a gradient of norm" in run.unchanged_reason


def test_a_training_that_moves_any_weight_says_no_such_thing(config_of):
    """The first step of a warm-up has rate 0; LoRA moves its B matrices from 0 by whatever it is told to."""
    for settings in (("training.warmup_steps=2",), ("adapter.method=lora", "training.learning_rate=1e-8")):
        lines = []
        run = training.train(config_of(*settings, "training.max_steps=3"), print_line=lines.append)
        assert run.unchanged_reason is None
        assert not [line for line in lines if "no weight" in line]


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (("training.learning_rate=1e-12",), "training.learning_rate of 1e-12 trains next to nothing"),
        (("training.learning_rate=1e-8", "training.warmup_ratio=1.0"), "never reaches its peak of 1e-08"),
        (("training.embedding_learning_rate=1e-10",), "training.embedding_learning_rate of 1e-10 trains next to"),
        (
            ("training.lr_schedule=cosine_with_restarts", "training.num_cycles=50"),
            "training.num_cycles asks for 50 falls of the learning rate, and after the warm-up the run has 10 steps",
        ),
        (("training.warmup_ratio=1.0",), "the learning rate ends at 0.009 and never reaches its peak of 0.01"),
        (("evaluation.every_steps=11",), "nothing is evaluated during training: every 11 steps is more than the 10"),
        (("evaluation.every_steps=null", "evaluation.every_epochs=3"), "every 15 steps is more than the 10"),
        (("checkpoint.every_steps=50",), "saved at the end only: every 50 steps is more than the 10"),
        (("tracking.every_steps=11",), "metrics of the last step only: tracking.every_steps is 11"),
        (
            ("evaluation.every_steps=4", "evaluation.early_stopping_patience=3"),
            "this run cannot stop early: 2 evaluations before its last step",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_setting_that_the_run_never_comes_to_is_named(config_of, settings, note):
    """The run has ten steps."""
    assert [line for line in notes(config_of(*settings)) if note in line]


def test_a_run_that_comes_to_all_of_its_settings_has_no_such_note(config_of):
    settings = ("evaluation.every_steps=4", "evaluation.early_stopping_patience=2", "training.warmup_ratio=0.9")
    assert notes(config_of(*settings)) == []


@pytest.mark.parametrize(
    ("settings", "evaluated"),
    [
        (("evaluation.every_steps=0.3",), [0, 3, 6, 9, 10]),
        (("evaluation.every_steps=null", "evaluation.every_epochs=1"), [0, 5, 10]),
        (("evaluation.every_steps=null", "evaluation.every_epochs=0.5"), [0, 3, 5, 8, 10]),
    ],
)
def test_evaluations_and_saves_come_by_parts_of_the_run_and_by_epochs(config_of, settings, evaluated):
    same_for_saves = [setting.replace("evaluation.", "checkpoint.") for setting in settings]
    run = training.train(config_of(*settings, *same_for_saves, "checkpoint.keep_last=0"))
    saved = sorted(int(path.name[5:]) for path in (run.folder / "checkpoints").glob("step-*"))
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert saved == evaluated[1:]
    assert sum("eval_mean_nll" in line for line in lines) == len(evaluated)


@pytest.mark.parametrize("more", [(), ("data.packing=greedy", "data.max_length=40")])
def test_without_a_shuffle_seed_a_run_takes_its_rows_in_the_order_of_the_file(config_of, more):
    words = ("data.shuffle_seed=null", "data.test_size=0", "evaluation.every_steps=null", "training.max_steps=6", *more)
    batches = prepare(config_of(*words), Options(offline=True)).batch_plan()
    rows = [name for step in range(1, 7) for name in batches.window(step).row_names()]
    places = [int(name.rpartition(":")[2]) for name in rows]
    assert places == list(range(1, len(places) + 1))
