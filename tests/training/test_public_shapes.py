"""The table of public data sets in docs/data.md: each entry trains the answers of its rows, and nothing else."""

import itertools
import json
import re
from pathlib import Path

import pytest

from llmtune.config.layers import load_config
from llmtune.data.dataset.make_dataset import prepare_data
from llmtune.data.rendering.renderer import Renderer
from llmtune.training import train as training

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "data" / "public_shapes.jsonl").read_text().splitlines()
]

ANSWERS = {
    "dolly": ["In Pisa.", "An apple."],
    "OpenOrca": ["Yes, it is.", "Four."],
    "ultrachat": ["Hello.", "Now we talk.", "Because."],
    "Capybara": ["What has keys?", "Right.", "See you."],
    "GSM8K": ["2 + 3 = <<2+3=5>>5\n#### 5", "8 / 2 = <<8/2=4>>4\n#### 4"],
    "MetaMath": ["The answer is: 2", "The answer is: 6"],
    "glaive": [
        '<functioncall> {"name": "get_time", "arguments": \'{}\'}',
        "It is noon.",
        "Hello, how can I help?",
    ],
    "hh-rlhf": ["Is it ripe?", "Then you can.", "You are welcome."],
    "SQuAD": ["The tower of Pisa", "The sea"],
    "SlimOrca": ["Yes, it is.", "Four."],
    "code-alpaca": ["print(7)", "rows.sort()"],
    "OASST": ["An animal.", "Mostly.", "Hello."],
    "guanaco": ["An animal.", "Mostly.", "Hello."],
}


def entries():
    """(data set, its entry of `data.train`) of each line of the table."""
    table = PAGE.read_text().partition("## Public data sets")[2].partition("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    return {cells[0].strip().split(",")[0]: re.findall(r"`([^`]+)`", cells[2])[0] for cells in lines}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ANSWERS:
        rows = [json.dumps(line["row"]) for line in ROWS if line["set"] == name]
        assert len(rows) == 2
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_table_has_every_data_set():
    assert set(entries()) == set(ANSWERS)
    assert len(ANSWERS) > 12


@pytest.mark.parametrize("name", ANSWERS)
def test_one_entry_trains_the_answers_of_each_public_shape(name, folder, tiny_tokenizer):
    data = load_config(
        None, environ={}, overrides=[f"data.train=[{entries()[name]}]", "data.max_length=512"]
    ).config.data
    prepared = prepare_data(data, Renderer(tiny_tokenizer))
    trained = []
    for example in prepared.train:
        pairs = zip(example.input_ids.tolist(), example.weights.tolist(), strict=True)
        for is_trained, run in itertools.groupby(pairs, lambda pair: pair[1] > 0):
            trained += [[token for token, _ in run]] if is_trained else []
    texts = [tiny_tokenizer.decode(run, skip_special_tokens=True).strip() for run in trained]
    expected = [
        tiny_tokenizer.decode(tiny_tokenizer.encode(answer, add_special_tokens=False)).strip()
        for answer in ANSWERS[name]
    ]
    assert texts == expected
    summary = prepared.ledger.summary()["train"]
    assert (summary["used"], summary["answers"], summary["trained_answers"]) == (2, len(expected), len(expected))


def test_all_public_shapes_train_in_one_run_each_by_its_entry(folder, config_of):
    listed = ", ".join(entries().values())
    rest = ("data.overlong=truncate_left", "training.epochs=1")
    result = training.train(
        config_of(f"data.train=[{listed}]", "data.test_size=0", "evaluation.every_steps=null", *rest)
    )
    assert (result.state, result.step) == ("finished", 7)
