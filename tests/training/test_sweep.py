"""`llmtune sweep`: a run for each combination, one table, and the same command goes on."""

import json

import pytest

from llmtune.cli.main import run as command
from training_helpers import small_run, words_as_yaml


@pytest.fixture(scope="module")
def folder(tiny_model_folder, rows_file, tmp_path_factory):
    """A working folder with a sweep of 2 x 2 runs of 2 steps each."""
    folder = tmp_path_factory.mktemp("sweep")
    words = small_run(tiny_model_folder, rows_file, folder / "runs", "training.max_steps=2")
    (folder / "basis.yaml").write_text(words_as_yaml(words))
    return folder


KEYS = "{training.learning_rate: [0.001, 0.05], adapter.r: [2, 4]}"


def sweep(folder, capsys, *options, keys=KEYS, name="try", code=0):
    """Type the command; returns what it said, and its rows."""
    (folder / f"{name}.yaml").write_text(f"extends: basis.yaml\nsweep: {{keys: {keys}}}\n")
    assert command(["sweep", str(folder / f"{name}.yaml"), *options, "--json"]) == code
    out, err = capsys.readouterr()
    return err, [json.loads(line) for line in out.splitlines()]


def test_a_sweep_trains_every_combination_goes_on_and_marks_the_best(folder, capsys):
    _, rows = sweep(folder, capsys, "--status")
    assert [(row["state"], row["value"], row["is_best"]) for row in rows] == [("waiting", None, False)] * 4

    _, rows = sweep(folder, capsys, keys=KEYS.replace("[0.001, 0.05]", "[0.05]"))
    assert [row["state"] for row in rows] == ["finished"] * 2
    run_files = [folder / "runs" / "try" / row["name"] / "run.json" for row in rows]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in run_files]
    unfinished = folder / "runs" / "try" / "learning_rate=0.001,r=2"

    said, rows = sweep(folder, capsys)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in run_files] == before, "finished runs are kept"
    assert said.count("finished before, after step 2") == 2
    assert [(row["state"], row["step"]) for row in rows] == [("finished", 2)] * 4
    trained = [json.loads((folder / "runs" / "try" / row["name"] / "run.json").read_text()) for row in rows]
    configs = [one["identity"]["config"] for one in trained]
    assert [(one["training"]["learning_rate"], one["adapter"]["r"]) for one in configs] == [
        (0.001, 2),
        (0.001, 4),
        (0.05, 2),
        (0.05, 4),
    ]
    values = [row["value"] for row in rows]
    assert len(set(values)) == 4
    assert [row["is_best"] for row in rows] == [value == min(values) for value in values]
    lines = [json.loads(line) for line in (unfinished / "metrics.jsonl").read_text().splitlines()]
    assert values[0] == min(line["eval_mean_nll"] for line in lines if line["step"] and "eval_mean_nll" in line)

    assert command(["sweep", str(folder / "try.yaml"), "--status"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["RUN", "STATE", "STEP", "METRIC", "VALUE"]
    assert [line.split()[:3] for line in table[1:]] == [[row["name"], "finished", "2/2"] for row in rows]
    assert [line.endswith("best") for line in table[1:]] == [row["is_best"] for row in rows]

    basis = (folder / "basis.yaml").read_text()
    (folder / "basis.yaml").write_text(basis.replace("max_steps: 2", "max_steps: 3"))
    said, _ = sweep(folder, capsys, code=2)
    assert said.count("a run with another config is there") == 4, "all at once, before a run is trained"
    assert "sweep: {name: NAME}" in said
    (folder / "basis.yaml").write_text(basis)


def test_an_unfinished_run_goes_on_and_a_diverged_one_is_a_row(folder, capsys):
    keys = "{training.max_minutes: [0.0000001], adapter.r: [2, 4]}"
    _, rows = sweep(folder, capsys, keys=keys, name="stops")
    assert [(row["state"], row["step"]) for row in rows] == [("stopped", 1)] * 2
    diverged = folder / "runs" / "stops" / rows[0]["name"] / "run.json"
    diverged.write_text(json.dumps(json.loads(diverged.read_text()) | {"state": "diverged"}))
    said, rows = sweep(folder, capsys, keys=keys, name="stops")
    assert "going on after step 1" in said
    assert "diverged after step 1, and would again" in said
    assert [(row["state"], row["step"], row["is_best"]) for row in rows] == [
        ("diverged", 1, False),
        ("finished", 2, True),
    ]


def test_a_sweep_without_held_out_rows_says_that_nothing_will_be_compared(folder, capsys):
    keys = "{data.test_size: [0], adapter.r: [2, 4], evaluation.every_steps: [null]}"
    said, _ = sweep(folder, capsys, "--status", keys=keys, name="blind")
    assert "no rows are held out" in said
    assert "data.test_size: 0.1" in said
    assert "held out" not in sweep(folder, capsys, "--status")[0]
