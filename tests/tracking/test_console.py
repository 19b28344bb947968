"""What a run looks like in a terminal, in a narrow one, in a dumb one, and in a file."""

import ast
import fcntl
import io
import os
import random
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from llmtune.tracking import RunInfo
from llmtune.tracking.console import ConsoleTracker, on_one_line

INFO = RunInfo(name="a-run", folder=Path("nowhere"), total_steps=4)
SCRIPT = """
from pathlib import Path
from llmtune.tracking import RunInfo
from llmtune.tracking.console import ConsoleTracker
shown = ConsoleTracker()
shown.start(RunInfo(name="a-run", folder=Path("nowhere"), total_steps=4))
for step in range(1, 5):
    shown.log(step, {"train_mean_nll": 2.451 / step, "learning_rate": 2e-4, "epoch": step / 4, "tokens_per_second": 2345.6})
shown.log(4, {"eval_mean_nll": 1.25, "eval_perplexity": 3.49, "epoch": 1.0})
shown.log(4, {"eval_mean_nll": 1.25, "eval_train_mean_nll": 1.5, "eval_best_mean_nll": 1.0})
shown.samples(4, [{"prompt": "hello", "text": "a\\x1b[31mb"}])
shown.finish("finished")
"""  # noqa: E501


def run_in_terminal(columns, **environ):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **environ}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    stdout, _ = process.communicate()
    assert process.returncode == 0, shown.decode()
    assert stdout == b""
    return shown.decode()


def lines_of(*calls):
    stream = io.StringIO()
    tracker = ConsoleTracker(stream)
    tracker.start(INFO)
    for step, metrics in calls:
        tracker.log(step, metrics)
    tracker.finish("finished")
    return stream.getvalue().splitlines()


def test_without_a_terminal_a_step_is_the_line_people_know():
    lines = lines_of((1, {"train_mean_nll": 2.451, "learning_rate": 2e-4, "epoch": 0.0123, "grad_norm": 3.0}))
    assert lines == ["{'loss': 2.451, 'learning_rate': 0.0002, 'epoch': 0.01}"]


def test_an_evaluation_is_a_line_of_its_own_names():
    lines = lines_of((4, {"eval_mean_nll": 1.25, "eval_perplexity": 3.490343, "eval_bits_per_byte": 0.5, "epoch": 1.0}))
    assert [ast.literal_eval(line) for line in lines] == [
        {"eval_loss": 1.25, "eval_perplexity": 3.4903, "eval_bits_per_byte": 0.5, "epoch": 1.0}
    ]


def test_exact_answers_are_shown_where_they_were_counted():
    assert lines_of((0, {"eval_mean_nll": 1.25, "eval_exact_answers": 58, "eval_num_answers": 60})) == [
        "{'eval_loss': 1.25, 'eval_exact': '58 of 60'}"
    ]


def test_a_loss_that_is_not_a_number_is_shown_as_it_is():
    assert lines_of((1, {"train_mean_nll": float("nan"), "learning_rate": 0.0, "epoch": 0.5})) == [
        "{'loss': nan, 'learning_rate': 0.0, 'epoch': 0.5}"
    ]


def test_a_long_line_is_never_folded_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert len(lines_of((1, {"train_mean_nll": 2.451, "learning_rate": 2e-4, "epoch": 0.5}))) == 1


def test_a_terminal_shows_a_bar_with_loss_rate_and_time_left():
    shown = run_in_terminal(120)
    assert "loss 2.451" in shown
    assert "2.3k tok/s" in shown
    assert "ETA 0:00:00" in shown
    assert "100%" in shown
    assert "4/4" in shown
    assert "held-out 1.25" in shown


def test_a_terminal_shows_evaluations_and_samples_as_rows():
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", run_in_terminal(80))
    assert " held-out  step 4       loss 1.25   perplexity 3.49\r\n" in shown
    # A held-out file may be named as a number of the run is: train.jsonl.
    row = "held-out step 4 loss 1.25 (+0.0000) loss of source train 1.5 loss of source best 1"
    assert row in " ".join(shown.split())
    assert " samples   hello\r\n           → a\\x1b[31mb\r\n" in shown
    assert "{'" not in shown


def test_a_terminal_of_twenty_columns_keeps_step_and_loss():
    shown = run_in_terminal(20)
    assert "1/4 loss 2.451" in shown


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": "dumb", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}])
def test_a_dumb_terminal_gets_plain_lines(environ):
    shown = run_in_terminal(20, **environ)
    assert "{'loss': 2.451, 'learning_rate': 0.0002, 'epoch': 0.25}" in shown
    assert "\x1b" not in shown


def test_an_answer_cannot_steer_the_terminal():
    assert "\x1b[31mb" not in run_in_terminal(120)
    assert on_one_line("a\x07\u202eb\u200b") == "a\\x07\\u202eb\\u200b"


def test_showing_a_run_draws_no_random_numbers():
    """N12: the state of Python's global generator belongs to the training."""
    before = random.getstate()
    lines_of(*[(step, {"train_mean_nll": 1.0, "learning_rate": 1e-4, "epoch": 0.1}) for step in range(1, 5)])
    assert random.getstate() == before
