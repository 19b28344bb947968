"""Rows in memory train as the same rows in a file; callbacks see every evaluation and save, and change nothing."""

import datetime as dt
import json

import datasets
import pytest

from llmtune import Stop, Trainer, load_config, train
from llmtune.errors import DataError, UsageError
from llmtune.training import train as training
from training_helpers import lines_of, weights_of


def quiet(line):
    """Say nothing."""


@pytest.fixture
def rows(rows_file):
    return [json.loads(line) for line in rows_file.read_text().splitlines()]


def as_pairs(row):
    question, answer = row["messages"]
    return {"ask": question["content"], "say": answer["content"]}


def as_messages(pair):
    roles = {"user": "ask", "assistant": "say"}
    return {"messages": [{"role": role, "content": pair[name]} for role, name in roles.items()]}


def test_rows_in_memory_train_as_the_same_rows_in_a_file(config_of, rows):
    short = ("training.max_steps=2",)
    whole = train(config_of(*short, name="whole"), print_line=quiet)
    forms = {
        "list": {"train_dataset": rows},
        "dataset": {"train_dataset": datasets.Dataset.from_list(rows)},
        "function": {"train_dataset": [as_pairs(row) for row in rows], "formatting_func": as_messages},
        "generator": {"train_dataset": (row for row in rows)},
    }
    for form, given in forms.items():
        said = []
        result = train(config_of("data.train=[]", *short, name=form), print_line=said.append, **given)
        assert weights_of(result.folder) == weights_of(whole.folder)
        assert lines_of(result.folder) == lines_of(whole.folder)
        assert any("the 24 rows of `train_dataset`" in line for line in said)
        entry = json.loads((result.folder / "ledger.jsonl").read_text().splitlines()[0])
        assert entry["source"].startswith(str(result.folder.parent / "rows" / "train-"))


def test_a_run_on_rows_in_memory_is_resumed_from_its_folder_alone(config_of, rows, whole):
    trainer = Trainer(config_of("data.train=[]", name="left"), train_dataset=rows, print_line=quiet)
    for step in trainer.steps():
        if step.step == 4:
            break
    folder = trainer.result().folder
    with pytest.raises(UsageError, match="a run that goes on takes no train_dataset"):
        Trainer.resume(folder, train_dataset=rows)
    assert training.resume(str(folder)).state == "finished"
    assert weights_of(folder) == weights_of(whole.folder)


def test_held_out_rows_in_memory_are_evaluated_alone_and_rows_of_no_use_are_left_out(config_of, rows):
    said = []
    trainer = Trainer(
        config_of("training.max_steps=1"),
        train_dataset=rows[:6],
        eval_dataset=rows[6:9],
        formatting_func=lambda row: None if row is rows[0] else row,
        print_line=said.append,
    )
    result = trainer.train()
    text = "\n".join(said)
    assert "train   5 rows: 5 used" in text
    assert "eval    3 rows: 3 used" in text
    assert "data.test_size = 0: the held-out rows are those of `eval_dataset`" in text
    assert str(trainer.config.origins["data.train"]) == "train_dataset"
    assert result.metrics["eval_mean_nll"] > 0


BAD_ROWS = {
    "a date": ([{"text": "x"}, {"text": dt.date(2025, 1, 1)}], r"train_dataset\[1\]: the row is not JSON"),
    "not a number": ([{"text": "x", "score": float("nan")}], r"train_dataset\[0\]: the row is not JSON"),
    "a text": ([{"text": "x"}, "y"], r"train_dataset\[1\]: a row must be a mapping of fields, this is a str"),
    "a wrong row": ([{"messages": [{"role": "user"}]}], r"rows/train-\w+.jsonl:1"),
}


@pytest.mark.parametrize("form", BAD_ROWS)
def test_rows_that_are_none_are_named(config_of, form):
    given, expected = BAD_ROWS[form]
    with pytest.raises(DataError, match=expected):
        train(config_of(), train_dataset=given, print_line=quiet)


def test_what_is_no_rows_at_all_is_refused_at_once(config_of, rows):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    with pytest.raises(UsageError, match=r"give one of them: `train_dataset=rows\[...\]`"):
        Trainer(config_of(), train_dataset=splits)
    with pytest.raises(UsageError, match="files are named in the config"):
        Trainer(config_of(), train_dataset="rows.jsonl")
    with pytest.raises(UsageError, match="there are none"):
        Trainer(config_of(), formatting_func=as_messages)


# --- callbacks


class Seen:
    """Remembers what it was told."""

    def __init__(self):
        self.evaluations, self.saves = [], []

    def on_evaluate(self, step, metrics):
        self.evaluations.append((step, metrics["eval_mean_nll"]))
        metrics.clear()  # its own copy

    def on_save(self, step, folder):
        assert (folder / "manifest.json").is_file()
        self.saves.append((step, folder.name))


def test_callbacks_see_every_evaluation_and_save_and_change_nothing(config_of, whole):
    import random

    class Disturbing:
        def on_save(self, step, folder):
            random.seed(step)
            raise RuntimeError("a full disk")

        def on_evaluate(self, step, metrics):
            return {"score": 1}

    seen, said = Seen(), []
    watched = train(config_of(name="watched"), callbacks=[seen, Disturbing()], print_line=said.append)
    assert weights_of(watched.folder) == weights_of(whole.folder)
    assert lines_of(watched.folder) == lines_of(whole.folder)
    lines = [(line["step"], line["eval_mean_nll"]) for line in lines_of(whole.folder) if "eval_mean_nll" in line]
    assert seen.evaluations == lines
    assert [step for step, _ in lines] == [0, 4, 8, 10]
    names = [name for _, name in seen.saves]
    assert [name for name in names if name.startswith("step-")] == [f"step-{step:06}" for step in (3, 6, 9, 10)]
    assert "best" in names
    assert seen.saves[-1] == (10, "final")
    warnings = [line for line in said if line.startswith("warning: Disturbing")]
    assert warnings == [
        "warning: Disturbing.on_evaluate returns a dict, which is not used; return `Stop(reason)` or None",
        "warning: Disturbing.on_save failed at step 3: RuntimeError: a full disk",
    ]


def test_a_callback_or_a_method_of_a_trainer_ends_a_run_saved(config_of):
    class Impatient(Trainer):
        def on_evaluate(self, step, metrics):
            return Stop("seen enough") if step == 4 else None

    class OnSave:
        def on_save(self, step, folder):
            return Stop("saved once")

    said = []
    result = Impatient(config_of(name="evaluated"), print_line=said.append).train()
    assert (result.state, result.step) == ("stopped", 4)
    assert "stopped: seen enough; `llmtune resume` goes on" in said
    result = train(config_of(name="saved"), callbacks=[OnSave()], print_line=quiet)
    assert (result.state, result.step) == ("stopped", 3)


def test_what_is_no_callback_is_refused():
    with pytest.raises(UsageError, match="is no callback"):
        Trainer(load_config("test"), callbacks=[lambda step: None])
