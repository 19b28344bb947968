"""`llmtune tokenizer train`, as a user types it."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", "from llmtune.cli.main import main; main()", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


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


def test_a_tokenizer_is_trained_saved_reported_and_loads_in_plain_transformers(rows):
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
        cwd=rows,
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


def test_p1_what_a_killed_training_left_is_swept_by_the_next(rows):
    code = (
        "import os, signal; from llmtune import durable; from llmtune.models import save; from llmtune.cli.main import main\n"  # noqa: E501
        "save.write_tokenizer = lambda tokenizer, folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(['tokenizer', 'train', 'data.train=rows.jsonl', '--vocab-size', '265', '-o', 'tok'])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=rows, capture_output=True, check=False).returncode == -9
    left = [path.name for path in rows.iterdir() if path.name != "rows.jsonl"]
    assert len(left) == 1
    assert left[0].startswith(".llmtune")
    done = run("tokenizer", "train", "data.train=rows.jsonl", "--vocab-size", "265", "-o", "tok", cwd=rows)
    assert done.returncode == 0, done.stderr
    assert left[0] in done.stderr
    assert {path.name for path in rows.iterdir()} == {"rows.jsonl", "tok"}


def test_a_folder_that_exists_is_not_overwritten(rows):
    (rows / "tok").mkdir()
    done = run("tokenizer", "train", "data.train=rows.jsonl", "-o", "tok", cwd=rows)
    assert done.returncode == 2
    assert "`tok` exists already" in done.stderr
    assert list((rows / "tok").iterdir()) == []


def test_no_data_and_too_small_a_vocabulary_end_in_one_message(rows):
    for arguments, words in (
        (["-o", "t"], "no training data"),
        (["data.train=rows.jsonl", "--vocab-size", "9"], "cannot hold the 256 bytes"),
    ):
        done = run("tokenizer", "train", *arguments, cwd=rows)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert {path.name for path in rows.iterdir()} == {"rows.jsonl"}
