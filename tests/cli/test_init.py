"""`llmtune init` looks at rows of any kind and writes a commented config that trains."""

from __future__ import annotations

import csv
import json
import shlex

import pytest

from llmtune.cli.main import run
from llmtune.config.layers import load_config
from training_fixtures import _planned_bytes  # noqa: F401

CHAT = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_csv(path):
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer"])
        writer.writerows([f"What is {n}?", f"It is {n}."] for n in range(60))


def make_parquet(path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"messages": [{**turn, "content": f"{turn['content']} {n}"} for turn in CHAT]} for n in range(8)]
    parquet.write_table(pa.Table.from_pylist(rows), path)


def make_pairs(path):
    jsonl(path, ({"prompt": f"Say {n}", "chosen": f"{n}!", "rejected": "No."} for n in range(8)))


def make_folder(path):
    path.mkdir()
    for n in range(4):
        (path / f"{n}.txt").write_text(f"Once there were {n} cats. " * 3)


def make_sharegpt(path):
    turns = [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]
    jsonl(path, ({"conversations": turns, "tools": json.dumps(TOOLS), "id": n} for n in range(8)))


def make_alpaca(path):
    path.write_text(json.dumps([{"instruction": f"Double {n}", "input": "", "output": str(2 * n)} for n in range(8)]))


def make_labels(path):
    jsonl(path, ({"text": f"number {n}", "label": ("even", "odd")[n % 2]} for n in range(8)))


ODD = {
    "rows.csv": (make_csv, "sft"),
    "structs.parquet": (make_parquet, "sft"),
    "pairs.jsonl": (make_pairs, "dpo"),
    "texts": (make_folder, "sft"),
    "labels.jsonl": (make_labels, "classification"),
    "sharegpt.jsonl": (make_sharegpt, "sft"),
    "alpaca.json": (make_alpaca, "sft"),
}
EXAMPLES = {
    "example:records/train": "sft",
    "example:records/heldout": "sft",
    "example:conversations": "sft",
    "example:alpaca": "sft",
    "example:stories": "sft",
    "example:preferences/pairs": "dpo",
    "example:preferences/pairs-heldout": "dpo",
    "example:preferences/labels": "kto",
    "example:preferences/labels-heldout": "kto",
}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def init_and_train(rows, method, model):
    assert run(["init", rows, "--model", str(model), "--output", "c.yaml"]) == 0
    config = load_config("c.yaml", environ={}).config
    assert config.objective.method == method
    quick = [
        "training.max_steps=2",
        "training.batch_size=2",
        "run.name=r",
        "data.max_samples=12",
        "evaluation.before_training=false",
    ]
    assert run(["train", "--config", "c.yaml", "--no-cuda", *quick]) == 0
    return config


@pytest.mark.parametrize("name", ODD)
def test_rows_of_six_odd_kinds_get_a_config_that_trains(tmp_path, tiny_model_folder, name):
    make, method = ODD[name]
    make(tmp_path / name)
    init_and_train(name, method, tiny_model_folder)


@pytest.mark.campaign
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_file_gets_a_config_that_trains(tiny_model_folder, name):
    init_and_train(name, EXAMPLES[name], tiny_model_folder)


def test_the_config_says_why_each_value_stands_there(tmp_path, tiny_model_folder):
    make_csv(tmp_path / "rows.csv")
    assert run(["init", "rows.csv", "--model", str(tiny_model_folder)]) == 0
    text = (tmp_path / "llmtune.yaml").read_text()
    assert "  train: [rows.csv]  # 60 rows of the format prompt-completion\n" in text
    assert "  test_size: 0.1  # a tenth of the rows is held out and measured\n" in text
    assert "tokens\n" in next(line + "\n" for line in text.splitlines() if "max_length" in line)


def test_a_config_that_stands_there_is_not_written_over(tmp_path, capsys):
    (tmp_path / "llmtune.yaml").write_text("mine")
    assert run(["init"]) == 2
    assert (tmp_path / "llmtune.yaml").read_text() == "mine"


def test_rows_of_no_format_are_refused_as_training_would(tmp_path, tiny_model_folder, capsys):
    jsonl(tmp_path / "odd.jsonl", [{"colour": 1}])
    assert run(["init", "odd.jsonl", "--model", str(tiny_model_folder)]) == 3
    assert "`colour`" in capsys.readouterr().err
    assert not (tmp_path / "llmtune.yaml").exists()


def test_rows_whose_columns_have_other_names_get_the_command_that_takes_them(tmp_path, tiny_model_folder, capsys):
    jsonl(
        tmp_path / "odd.jsonl",
        ({"talk": [{**turn, "content": f"{turn['content']} {n}"} for turn in CHAT]} for n in range(8)),
    )
    assert run(["init", "odd.jsonl", "--model", str(tiny_model_folder)]) == 3
    said = capsys.readouterr().err
    command = shlex.split(said.partition("`llmtune ")[2].partition("`")[0])
    assert command == ["init", "{path: odd.jsonl, columns: {messages: talk}}"]
    config = init_and_train(command[1], "sft", tiny_model_folder)
    assert config.data.train[0].columns == {"messages": "talk"}
