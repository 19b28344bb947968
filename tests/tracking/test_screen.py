"""What a run says on a terminal: laid out at every width, nothing lost, nothing told by colour alone."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from llmtune.common.decisions import Decision
from llmtune.common.text import Fact
from llmtune.config.process_options import Options
from llmtune.tracking.screen import Screen, open_screen, shares
from llmtune.training import train as training
from llmtune.training.progress import print_result
from training_fixtures import _one_thread, _planned_bytes, config_of, rows_file  # noqa: F401

WIDTHS = (60, 80, 120, 200)
DECISIONS = [
    Decision("device", "cpu", "no CUDA device was found"),
    Decision("training.gradient_accumulation_steps", 16, "a step of 128 rows; 8 of them fit into the memory at once"),
    Decision("model.tokenizer", "1,088 of 16,384 entries", "`custom-tiny` is built from scratch " * 8 + "end"),
    Decision(
        "data.cache_dir", "/home/somebody/.cache/llmtune/rows/c8d911b01b6743c86a5cc0033e17", "nothing has changed"
    ),
]
PARTS = {"process": 700, "weights": 200, "gradients": 0, "loss": 90, "allocator": 10}


def shown(width, *, verbose=False, **console):
    """(the screen, a function that returns its text so far)."""
    stream = io.StringIO()
    made = Console(file=stream, force_terminal=True, width=width, _environ={}, **console)
    return Screen(made, verbose=verbose), stream.getvalue


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def words(text):
    return "".join(plain(text).split())


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(width):
    screen, text = shown(width)
    screen.title("custom-tiny", "test")
    screen.facts([Fact("train", "39 rows: 35 used, 4 held out; 72 answers, 72 trained"), Fact("memory", "1 kB", PARTS)])
    screen.decisions("chosen for you", DECISIONS)
    screen.end_of_decisions()
    screen.line("note    " + "a long word and another " * 20)
    assert max(map(len, plain(text()).splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_verbose_shows_every_choice_with_its_whole_reason(width):
    for decision in DECISIONS:
        screen, text = shown(width, verbose=True)
        screen.decisions("", [decision])
        screen.end_of_decisions()
        # Cells are folded within their columns.
        lines, reason_from = plain(text()).splitlines(), 46 if width > 72 else 26
        assert words("".join(line[2:24] for line in lines)) == words(decision.key)
        beside = "".join(line[26 : 44 if width > 72 else None] for line in lines)
        assert words(beside).startswith(words(str(decision.value)))
        assert words("".join(line[reason_from:] for line in lines)).endswith(words(decision.reason))
        assert "in full" not in text()


def test_a_shortened_reason_says_where_it_is_in_full():
    screen, text = shown(80)
    screen.decisions("chosen for you", DECISIONS[:1])
    screen.end_of_decisions()
    assert "--verbose" not in text()
    screen.decisions("", DECISIONS[2:])
    screen.end_of_decisions()
    assert "in full: --verbose, and `decisions` in the run's run.json" in text()
    assert "…" in text()


def test_the_bar_of_memory_has_a_cell_for_each_part_and_names_them_all():
    screen, text = shown(64)
    screen.facts([Fact("memory", "1.00 kB planned", PARTS)])
    _, bar, *legend = (line.strip() for line in plain(text()).splitlines())
    assert bar == "█" * 35 + "▓" * 10 + "▒" * 4 + "░"
    assert legend == ["██ process 700 B   ▓▓ weights 200 B   ▒▒ loss 90 B", "░░ allocator 10 B"]


@pytest.mark.parametrize(("counts", "cells"), [([5], 7), ([1, 1, 1], 3), ([10**9, 1, 1, 1], 40), ([3, 3, 3], 10)])
def test_shares_add_up_and_leave_no_part_out(counts, cells):
    assert sum(shares(counts, cells)) == cells
    assert min(shares(counts, cells)) >= 1


def test_without_colour_the_text_is_the_same():
    texts = []
    for options in ({"color_system": "256"}, {"color_system": "256", "no_color": True}):
        screen, text = shown(80, **options)
        screen.facts([Fact("memory", "1 kB", PARTS), Fact("warning:", "by the plan this does not fit")])
        screen.decisions("chosen for you", DECISIONS)
        screen.commands("next", [("ask", "llmtune generate runs/a 'your question'")])
        texts.append(text())
    assert plain(texts[0]) == plain(texts[1])
    assert "warning" in plain(texts[1])
    assert "\x1b[36m" in texts[0]  # the terminal's own cyan
    assert re.search(r"\x1b\[(\d;)*3\d|38;", texts[1]) is None


def test_a_command_to_copy_is_never_folded():
    screen, text = shown(60)
    command = "llmtune generate " + "a-long-name/" * 12 + " 'your question'"
    screen.commands("next", [("ask", command)])
    assert command in plain(text())


def test_text_from_outside_is_no_markup():
    screen, text = shown(80)
    screen.facts([Fact("model", "[bold]x[/bold] :smile:")])
    assert "[bold]x[/bold] :smile:" in plain(text())


def test_there_is_no_screen_without_a_terminal_or_on_a_dumb_one(monkeypatch):
    assert open_screen(io.StringIO()) is None
    script = "import sys; from llmtune.tracking.screen import open_screen; sys.exit(0 if open_screen() else 3)"
    for term, code in (("xterm-256color", 0), ("dumb", 3)):
        ours, theirs = os.openpty()
        environment = {**os.environ, "TERM": term}
        done = subprocess.run([sys.executable, "-c", script], stderr=theirs, env=environment, check=False)
        os.close(ours), os.close(theirs)
        assert done.returncode == code


def test_a_run_shows_on_a_terminal_what_its_plain_lines_say_and_records_every_choice(config_of):  # noqa: F811
    """The same run twice: once in plain lines, once on a wide verbose screen."""
    lines, options = [], Options(no_cuda=True, offline=True)
    changes = ("training.max_steps=1", "checkpoint.every_steps=1")
    first = training.train(config_of(*changes, name="plain"), options, print_line=lines.append)
    print_result(first, lines.append)
    screen, text = shown(200, verbose=True)
    second = training.train(config_of(*changes, name="laid-out"), options, print_line=screen.line, screen=screen)
    print_result(second, screen.line, screen)
    said = words(text())
    choices = [line.strip() for line in lines if line.startswith("  ")]
    assert len(choices) > 5
    recorded = json.loads((first.folder / "run.json").read_text())["decisions"]
    assert sorted(choices) == sorted(f"{row['key']} = {row['value']}: {row['reason']}" for row in recorded)
    for row in recorded:
        if row["key"] not in ("data.cache_dir", "process.threads"):  # folded between other cells
            assert words(row["key"]) in said
            assert all(words(word) in said for word in row["reason"].split())
    for label in ("model", "train", "plan", "memory", "training", "run", "finished after step 1", "planned, 1 made"):
        assert words(label) in said
    assert "llmtune generate" in text()
    assert f"try it: llmtune generate {first.folder} 'your question'" in lines
