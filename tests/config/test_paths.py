"""Paths of a config: `~` is the home folder everywhere, variables are refused, and the config's own folder a hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtune.cli.main import run
from llmtune.config.layers import load_config
from llmtune.config.paths import PATH_KEYS
from llmtune.errors import ConfigError
from llmtune.runs.folder import create_run, list_runs, resolve_run

ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder; the working folder is another one."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    return home


def test_a_run_goes_below_the_home_folder_and_is_found_there(home):
    folder = create_run("~/runs", "one")
    path = folder.path
    folder.close()
    assert path == home / "runs" / "one"
    assert [summary.path for summary in list_runs("~/runs")] == [path]
    assert resolve_run("one", "~/runs") == path
    assert not Path("~").exists()


@pytest.mark.parametrize("value", ["$OUT/x", "${OUT}/x", "a/$OUT"])
@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_variable_in_a_path_is_refused_with_the_way_out(home, key, value):
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ={}, overrides=[f"{key}={value}"])
    (problem,) = caught.value.problems
    assert f"`{key}` holds a variable, which is not filled in (`$" in problem.problem
    assert f"`LLMTUNE_{key.upper().replace('.', '__')}={value}`" in problem.fix


def test_a_path_that_has_a_dollar_in_its_name_is_that_path(home):
    Path("$x.jsonl").write_text(ROW)
    assert load_config(None, environ={}, overrides=["data.train=$x.jsonl"]).config.data.train[0].path == "$x.jsonl"
    assert load_config(None, environ={}, overrides=["run.notes=$x"]).config.run.notes == "$x"


@pytest.mark.parametrize("command", [["data", "report"], ["train", "--dry-run"], ["plan"]])
def test_a_file_beside_the_config_is_named_in_the_hint(home, command, capsys):
    Path("exp").mkdir()
    Path("exp/rows.jsonl").write_text(ROW)
    Path("exp/c.yaml").write_text("model: {name: custom-nano}\ndata:\n  train: [no.jsonl, rows.jsonl]\n")
    assert run([*command, "-c", "exp/c.yaml"]) == 3
    err = capsys.readouterr().err
    assert "this one lies beside the config file: write `exp/rows.jsonl`" in err
    assert err.count("beside the config file") == 1  # `no.jsonl` lies nowhere
