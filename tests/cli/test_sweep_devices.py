"""`llmtune sweep --devices`: runs one on each device. In most tests a small program stands for llmtune."""

import json
import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from llmtune.cli import sweep_devices
from llmtune.cli.main import run as command
from llmtune.cli.sweep_devices import train_on_devices
from llmtune.errors import StoppedBySignal, UsageError
from training_fixtures import rows_file  # noqa: F401 - a fixture
from training_helpers import small_run, words_as_yaml

PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
name, began = sys.argv[-1], time.monotonic()
print(name, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), flush=True)
open(f"{name}.began", "w").close()
time.sleep(60 if name == "long" else 0.3)
sys.exit(6 if name == "bad" else 0)
"""


@pytest.fixture
def runs_of(tmp_path, monkeypatch):
    """Runs with these names, in this test's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):  # the tests' own
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sweep_devices, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(sweep_devices, "available_cores", lambda: 6)
    return lambda *names: [SimpleNamespace(name=name, path=tmp_path / "runs" / name) for name in names]


def test_each_run_prints_into_its_log_and_a_failed_one_is_named(runs_of, tmp_path, capsys):
    runs = runs_of("a", "bad", "c")
    assert train_on_devices(runs, 2, ["sweep"], no_cuda=True) == {"bad": 6}
    logs = {run.name: (tmp_path / "runs" / f"{run.name}.log").read_text().split() for run in runs}
    assert logs == {name: [name, "None", "3"] for name in ("a", "bad", "c")}  # half of six cores each
    said = capsys.readouterr().err
    assert "exit code 6" in said
    assert "run 1 of 3 on device 0: a" in said
    assert "run 2 of 3 on device 1: bad" in said


def test_each_cuda_device_has_one_run_by_the_name_that_the_environment_gives(runs_of, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert train_on_devices(runs_of("a", "b"), 2, ["sweep"], no_cuda=False) == {}
    seen = {name: (tmp_path / "runs" / f"{name}.log").read_text().split()[1] for name in ("a", "b")}
    assert seen == {"a": "5", "b": "7"}
    with pytest.raises(UsageError, match="3 devices were asked for, and there are 2"):
        train_on_devices(runs_of("a"), 3, ["sweep"], no_cuda=False)


def test_a_signal_is_passed_on_and_nothing_more_is_begun(runs_of, tmp_path):
    def stop_when_it_runs():
        while not (tmp_path / "long.began").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_it_runs, daemon=True).start()
    with pytest.raises(StoppedBySignal, match="the same command goes on"):
        train_on_devices(runs_of("long", "never"), 1, ["sweep"], no_cuda=True)
    assert not (tmp_path / "never.began").exists()


def test_each_process_has_the_flags_of_the_sweep(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("llmtune.cli.sweep.train_on_devices", lambda _, __, words, **___: given.append(words) or {})
    file = tmp_path / "s.yaml"
    file.write_text(f"run: {{output_dir: {tmp_path}}}\nsweep: {{keys: {{training.learning_rate: [0.1, 0.2]}}}}\n")
    flags = ["--no-cuda", "--trust-remote-code", "--verbose"]
    assert command(["sweep", str(file), "--devices", "2", *flags]) in (0, None)
    assert given == [["sweep", str(file), *flags, "--only"]]
    assert command(["sweep", str(file), "--devices", "2", "--status"]) == 2


@pytest.mark.campaign
def test_a_sweep_on_two_devices_trains_the_runs_of_one(tiny_model_folder, rows_file, tmp_path, capsys):  # noqa: F811
    words = small_run(tiny_model_folder, rows_file, tmp_path / "runs", "training.max_steps=2")
    basis = words_as_yaml(words)
    table = {}
    for name, options in (("one", []), ("two", ["--devices", "2"])):
        (tmp_path / f"{name}.yaml").write_text(f"{basis}sweep: {{keys: {{training.learning_rate: [0.001, 0.05]}}}}\n")
        assert command(["sweep", str(tmp_path / f"{name}.yaml"), *options, "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        table[name] = [(row["name"], row["state"], row["step"], round(row["value"], 5)) for row in rows]
    assert table["one"] == table["two"]
    assert [state for _, state, *_ in table["two"]] == ["finished"] * 2
    assert command(["sweep", str(tmp_path / "two.yaml"), "--only", "learning_rate=0.001", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["name"] == "learning_rate=0.001"
    assert "finished before" in err
    assert command(["sweep", str(tmp_path / "two.yaml"), "--only", "learning_rate=1"]) == 2
    assert "name one of: learning_rate=0.001, learning_rate=0.05" in capsys.readouterr().err
