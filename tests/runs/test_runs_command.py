"""`llmtune runs`."""

import json
import subprocess
import sys

from llmtune import durable
from llmtune.cli.main import run
from llmtune.cli.runs import runs
from llmtune.runs.folder import create_run
from report_helpers import make_run


def make(tmp_path):
    for name in ("one", "two"):
        with create_run(tmp_path, name, details={"total_steps": 8}) as run:
            with durable.AppendLog(run.path / "metrics.jsonl") as log:
                log.append({"step": 4, "train_mean_nll": 1.25, "eval_mean_nll": 1.5})
            run.update(state="stopped")


def test_the_runs_of_a_folder_stand_in_a_table(tmp_path, capsys):
    make(tmp_path)
    runs([str(tmp_path)])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["RUN", "STATE", "STEP", "TRAIN", "LOSS", "EVAL", "LOSS", "CREATED", "(UTC)"]
    assert [line.split()[:5] for line in lines[1:]] == [
        [name, "stopped", "4/8", "1.2500", "1.5000"] for name in ("one", "two")
    ]
    assert err == ""


def test_a_program_reads_one_object_a_line(tmp_path, capsys):
    make(tmp_path)
    runs([str(tmp_path)], as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["step"], row["path"]) for row in rows] == [
        (name, 4, str(tmp_path / name)) for name in ("one", "two")
    ]


def test_an_empty_folder_is_said_on_the_side(tmp_path, capsys):
    runs([str(tmp_path)])
    out, err = capsys.readouterr()
    assert out == ""
    assert "no runs in" in err


def test_it_answers_without_torch():
    code = "import sys, llmtune.cli.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_runs_are_compared_by_their_keys_and_their_numbers(tmp_path, capsys):
    folders = [make_run(tmp_path / name, [3.0, loss], rate=loss / 1000) for name, loss in (("a", 2.0), ("b", 1.0))]
    assert run(["runs", "--compare", *map(str, folders), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["keys"] == {"training.learning_rate": [0.002, 0.001]}
    assert found["numbers"]["training loss, last"] == [2.0, 1.0]
    assert found["numbers"]["steps"] == [2.0, 2.0]
    assert run(["runs", "--compare", *map(str, folders)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["training.learning_rate", "0.002", "0.001"] in lines
    assert ["training", "loss,", "last", "2", "1"] in lines


def test_one_run_is_not_compared_and_two_folders_are_not_listed(tmp_path, capsys):
    assert run(["runs", "--compare", str(tmp_path)]) == 2
    assert run(["runs", "a", "b"]) == 2
    assert "add --compare" in capsys.readouterr().err
