"""`llmtune runs`."""

import json
import subprocess
import sys

from llmtune import durable
from llmtune.cli.runs import runs
from llmtune.runs.folder import create_run


def make(tmp_path):
    for name in ("one", "two"):
        with create_run(tmp_path, name, details={"total_steps": 8}) as run:
            with durable.AppendLog(run.path / "metrics.jsonl") as log:
                log.append({"step": 4, "train_mean_nll": 1.25, "eval_mean_nll": 1.5})
            run.update(state="stopped")


def test_the_runs_of_a_folder_stand_in_a_table(tmp_path, capsys):
    make(tmp_path)
    runs(str(tmp_path))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["RUN", "STATE", "STEP", "TRAIN", "LOSS", "EVAL", "LOSS", "CREATED", "(UTC)"]
    assert [line.split()[:5] for line in lines[1:]] == [
        [name, "stopped", "4/8", "1.2500", "1.5000"] for name in ("one", "two")
    ]
    assert err == ""


def test_a_program_reads_one_object_a_line(tmp_path, capsys):
    make(tmp_path)
    runs(str(tmp_path), as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["step"], row["path"]) for row in rows] == [
        (name, 4, str(tmp_path / name)) for name in ("one", "two")
    ]


def test_an_empty_folder_is_said_on_the_side(tmp_path, capsys):
    runs(str(tmp_path))
    out, err = capsys.readouterr()
    assert out == ""
    assert "no runs in" in err


def test_it_answers_without_torch():
    code = "import sys, llmtune.cli.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
