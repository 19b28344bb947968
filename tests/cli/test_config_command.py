"""`llmtune config ...`: what a run would be told, with origins; differences; the schema; checks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmtune.cli.main import run
from llmtune.config.dump import config_to_yaml
from llmtune.config.json_schema import json_schema
from llmtune.config.keys import LEAVES
from llmtune.config.layers import load_config, parse_config


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_show_prints_yaml_that_reads_back_to_the_same_config(capsys):
    assert (
        run(["config", "show", "--config", "test", "training.learning_rate=1e-5", "data.train=[a.jsonl,b.jsonl]"]) == 0
    )
    expected = load_config(
        "test", environ={}, overrides=["training.learning_rate=1e-5", "data.train=[a.jsonl,b.jsonl]"]
    ).config
    out = capsys.readouterr().out
    assert parse_config(out).config == expected
    assert out == config_to_yaml(expected)


def test_show_says_what_each_key_means_where_asked(capsys):
    assert run(["config", "show", "--commented"]) == 0
    assert "  # Longest example, and length of a pack, in tokens.\n  max_length: 2048\n" in capsys.readouterr().out


def test_show_origin_prints_every_key_with_its_value_and_its_place(tmp_path, monkeypatch, capsys):
    """Q3."""
    monkeypatch.setenv("LLMTUNE_RUN__SEED", "5")
    (tmp_path / "my.yaml").write_text("training:\n  epochs: 1\n")
    assert run(["config", "show", "-c", "my.yaml", "--origin", "data.max_samples=9"]) == 0
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(LEAVES)
    found = {key: lines[key] for key in ("training.epochs", "run.seed", "data.max_samples", "training.eps")}
    assert found == {
        "training.epochs": ["1.0", "my.yaml:2"],
        "run.seed": ["5", "env LLMTUNE_RUN__SEED"],
        "data.max_samples": ["9", "command line"],
        "training.eps": ["1.0e-08", "default"],
    }


def test_show_json_is_data(capsys):
    assert run(["config", "show", "-c", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["batch_size"] == 2
    assert run(["config", "show", "-c", "test", "--json", "--origin"]) == 0
    assert json.loads(capsys.readouterr().out)["training.batch_size"]["value"] == 2


def test_show_says_on_stderr_which_names_were_another_toolkits(capsys):
    assert run(["config", "show", "num_train_epochs=1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "command line: `num_train_epochs` is called `training.epochs` here\n"
    assert "is called" not in captured.out


def test_diff_prints_the_keys_that_differ_with_both_origins(tmp_path, capsys):
    """Q3, also for two runs."""
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text(f"run:\n  seed: {seed}\n")
    assert run(["config", "diff", "runs/one", "runs/two"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "run.seed\n  - 1  (runs/one/config.yaml:2)\n  + 2  (runs/two/config.yaml:2)\n"
    assert captured.err == f"1 of {len(LEAVES)} keys differ\n"


def test_diff_of_equal_configs_prints_nothing(capsys):
    assert run(["config", "diff", "test", "test"]) == 0
    assert capsys.readouterr().out == ""


def test_diff_does_not_look_at_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("LLMTUNE_RUN__SEED", "x")
    assert run(["config", "diff", "test", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}


def test_schema_prints_the_json_schema(capsys):
    assert run(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_validate_says_ok_or_every_problem_of_every_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("training:\n  epohcs: 1\n")
    (tmp_path / "b.yaml").write_text("data:\n  trian: x\n")
    assert run(["config", "validate", "test", "a.yaml", "b.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "test: ok\n"
    assert captured.err.startswith("error: 2 problems\n  a.yaml:2: ")
    assert "\n  b.yaml:2: " in captured.err


def test_validate_takes_settings_alone_and_on_top_of_files(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("adapter: {method: lora, init: pissa}\n")
    assert run(["config", "validate", "training.epochs=2"]) == 0
    assert run(["config", "validate", "a.yaml", "model.quantization=4bit"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "training.epochs=2: ok\n"
    assert "quantized again" in captured.err


def test_five_problems_of_one_file_are_one_answer_of_the_real_program(tmp_path):
    """Q1: the seventh thing the main job must show, through `llmtune train`."""
    (tmp_path / "my.yaml").write_text(
        "extends: developement\ntraining:\n  lerning_rate: 1e-4\n  batch_size: four\n  epohcs: 3\ndata:\n  max_lenght: 512\n"  # noqa: E501
    )
    for command in (["train", "--config"], ["config", "validate"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "llmtune", *command, "my.yaml"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        talk = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == 2
        assert done.stdout == ""
        assert talk[0] == "error: 5 problems"
        assert [line.split(": ")[0].strip() for line in talk if line.startswith("  my.yaml")] == [
            f"my.yaml:{line}" for line in (1, 3, 4, 5, 7)
        ]
        assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]
