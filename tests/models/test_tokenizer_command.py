"""`llmtune tokenizer train`, as a user types it."""

import json
import os
import signal
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from llmtune.cli.main import run as command
from llmtune.models import save
from training_helpers import Forked


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(rows, monkeypatch, capsys):
    """Run a command in the folder of the rows, in this process: a new one would import the libraries for seconds."""
    monkeypatch.chdir(rows)

    def run(*arguments):
        capsys.readouterr()
        return Done(command(arguments), *capsys.readouterr())

    return run


@pytest.fixture
def rows(tmp_path):
    conversations = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n} and {n}?"},
                {"role": "assistant", "content": f"it is {2 * n}. ✓"},
            ]
        }
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, conversations)))
    return tmp_path


def test_a_tokenizer_is_trained_saved_reported_and_loads_in_plain_transformers(run, rows):
    done = run(
        "tokenizer",
        "train",
        "data.train=rows.jsonl",
        "--vocab-size",
        "265",
        "--special-token",
        "<t>",
        "-o",
        "tok",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["vocab_size"], report["texts"], report["round_trip_failures"]) == (265, 120, 0)
    tokenizer = AutoTokenizer.from_pretrained(rows / "tok")
    assert (len(tokenizer), tokenizer.convert_tokens_to_ids("<t>")) == (265, 4)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert {path.name for path in rows.iterdir()} == {"rows.jsonl", "tok"}


def test_p1_what_a_killed_training_left_is_swept_by_the_next(run, rows):
    words = ["tokenizer", "train", "data.train=rows.jsonl", "--vocab-size", "265", "-o", "tok"]

    def killed():
        save.write_tokenizer = lambda tokenizer, folder: os.kill(os.getpid(), signal.SIGKILL)
        command(words)

    assert Forked(killed).wait(60) == -signal.SIGKILL
    left = [path.name for path in rows.iterdir() if path.name != "rows.jsonl"]
    assert len(left) == 1
    assert left[0].startswith(".llmtune")
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert left[0] in done.stderr
    assert {path.name for path in rows.iterdir()} == {"rows.jsonl", "tok"}


def test_a_folder_that_exists_is_not_overwritten(run, rows):
    (rows / "tok").mkdir()
    done = run("tokenizer", "train", "data.train=rows.jsonl", "-o", "tok")
    assert done.returncode == 2
    assert "`tok` exists already" in done.stderr
    assert list((rows / "tok").iterdir()) == []


def test_no_data_and_too_small_a_vocabulary_end_in_one_message(run, rows):
    for arguments, words in (
        (["-o", "t"], "no training data"),
        (["data.train=rows.jsonl", "--vocab-size", "9"], "cannot hold the 256 bytes"),
    ):
        done = run("tokenizer", "train", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert {path.name for path in rows.iterdir()} == {"rows.jsonl"}
