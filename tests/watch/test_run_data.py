"""A run folder as data: series with gaps, a growing, cut or replaced file, resume overlaps, smoothing, thinning."""

import json
import math

import pytest

from llmtune.watch.log_reader import LogReader
from llmtune.watch.run_data import Event, RunData, Sample, SkippedStep
from llmtune.watch.series import Series


def write(path, *lines, torn=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")


def append(path, text):
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def step(number, loss, **more):
    return {"step": number, "train_mean_nll": loss, "step_seconds": 2.0, **more}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_a_growing_file_is_read_from_where_the_last_reading_ended(run):
    path = run / "metrics.jsonl"
    write(path, step(1, 4.0), torn='{"step": 2, "train_')
    data = RunData(run)
    assert data.refresh()
    assert list(data.metrics["train_mean_nll"]) == [(1, 4.0)]
    assert not data.refresh()
    append(path, 'mean_nll": 3.5}\n')
    assert data.refresh()
    assert list(data.metrics["train_mean_nll"]) == [(1, 4.0), (2, 3.5)]


def test_only_new_bytes_are_read(run):
    path = run / "log.jsonl"
    write(path, {"a": 1})
    reader = LogReader(path)
    assert reader.read() == ([{"a": 1}], False)
    append(path, '{"a": 2}\nnonsense\n[3]\n{"a": 4}\n')
    assert reader.read() == ([{"a": 2}, {"a": 4}], False)
    assert reader.read() == ([], False)


@pytest.mark.parametrize("how", ["cut", "cut and grown", "replaced", "removed"])
def test_what_a_cut_replaced_or_removed_file_held_is_forgotten(run, how):
    path = run / "metrics.jsonl"
    write(path, *(step(number, 5.0 - number) for number in range(1, 5)))
    data = RunData(run)
    data.refresh()
    assert data.step == 4
    new = {
        "cut": [step(1, 4.0), step(2, 3.0)],
        "cut and grown": [step(1, 4.0), step(2, 3.0), *(step(number, 9.0) for number in range(3, 9))],
        "replaced": [step(number, 7.0) for number in range(1, 7)],
        "removed": [],
    }[how]
    if how in ("replaced", "removed"):
        path.unlink()
    if new:
        write(path, *new)
    assert data.refresh()
    loss = data.metrics.get("train_mean_nll", Series())
    assert list(loss) == [(line["step"], line["train_mean_nll"]) for line in new]
    assert not data.refresh()


def test_a_later_line_of_the_same_step_wins(run):
    write(run / "metrics.jsonl", step(1, 4.0), step(2, 3.0), step(3, 2.5), step(2, 3.1), step(3, 2.4), step(4, 2.0))
    write(run / "samples.jsonl", *({"step": 2, "prompt": "p", "text": text} for text in ("old", "new")))
    data = RunData(run)
    data.refresh()
    assert list(data.metrics["train_mean_nll"]) == [(1, 4.0), (2, 3.1), (3, 2.4), (4, 2.0)]
    assert data.samples == [Sample(2, "p", "new")]


def test_values_that_are_not_finite_are_gaps_and_skipped_windows_replace_no_step(run):
    skipped = {**step(2, None), "skipped": True, "reason": "the loss is nan", "sources": ["a.jsonl:7"]}
    lines = [step(1, 4.0), step(2, 3.0), skipped, step(3, None), step(4, 2.0), step(5, 10**400)]
    write(run / "metrics.jsonl", *lines, torn='{"step": 6, "train_mean_nll": NaN}\n')
    data = RunData(run)
    data.refresh()
    loss = data.metrics["train_mean_nll"]
    assert [(x, None if math.isnan(value) else value) for x, value in loss] == [
        (1, 4.0),
        (2, 3.0),
        (3, None),
        (4, 2.0),
        (5, None),
        (6, None),
    ]
    assert [list(part) for part in loss.runs()] == [[(1, 4.0), (2, 3.0)], [(4, 2.0)]]
    assert loss.last == (4, 2.0)
    assert data.skipped == [SkippedStep(2, "the loss is nan", ("a.jsonl:7",))]


def test_heldout_loss_is_kept_for_each_data_set(run):
    write(run / "metrics.jsonl", {"step": 0, "eval_mean_nll": 3.0, "eval_a b_mean_nll": 2.0, "eval_perplexity": 20.1})
    data = RunData(run)
    data.refresh()
    assert {name: list(series) for name, series in data.heldout_sets.items()} == {"": [(0, 3.0)], "a b": [(0, 2.0)]}


def test_system_figures_are_series_over_seconds(run):
    write(run / "system.jsonl", *({"time": 100.0 + t, "step": t, "devices": [{"use": t / 10}]} for t in (0, 5)))
    data = RunData(run)
    data.refresh()
    assert list(data.system["devices.0.use"]) == [(0, 0.0), (5, 0.5)]


def test_facts_of_the_run_and_its_events_are_read(run):
    write(run / "events.jsonl", {"step": 3, "kind": "loss_spike", "level": "warning", "message": "m", "advice": "a"})
    info = {"state": "running", "total_steps": 10, "identity": {"config": {"run": {"seed": 1}}}}
    (run / "run.json").write_text(json.dumps(info))
    (run / "origins.json").write_text('{"run.seed": "default"}')
    write(run / "metrics.jsonl", step(1, 4.0), step(2, 3.0))
    data = RunData(run)
    data.refresh()
    assert data.events == [Event(3, "loss_spike", "warning", "m", "a")]
    assert (data.state, data.step, data.total_steps) == ("interrupted", 2, 10)
    assert data.flat_config == {"run.seed": 1}
    assert data.origins == {"run.seed": "default"}
    assert data.eta_seconds() == 8 * 2.0
    (run / "run.json").write_text("{")  # half written: what was read stays
    data.refresh()
    assert data.total_steps == 10


def test_a_folder_that_is_not_there_shows_nothing_and_may_appear(tmp_path):
    data = RunData(tmp_path / "later")
    assert not data.refresh()
    assert (data.state, data.step, data.metrics, data.eta_seconds()) == ("unknown", 0, {}, None)
    (tmp_path / "later").mkdir()
    write(tmp_path / "later" / "metrics.jsonl", step(1, 4.0))
    assert data.refresh()
    assert data.step == 1


def test_hostile_files_are_read_without_harm(run):
    for name in ("metrics", "samples", "events", "system", "ledger"):
        (run / f"{name}.jsonl").write_bytes(b'{"step": "x"}\n{"step": true}\n\xff\xfe\n{"step": -1}\n' + b"[" * 10**5)
    (run / "run.json").write_text("[" * 10**5)
    data = RunData(run)
    data.refresh()
    assert (data.metrics, data.samples, data.events, data.system, data.info) == ({}, [], [], {}, {})


def test_smoothing_is_the_bias_corrected_average():
    series = Series([1, 2, 3], [1.0, 2.0, 4.0])
    assert series.smoothed(0.0).values == [1.0, 2.0, 4.0]
    weights = [0.9**2, 0.9, 1.0]
    expected = sum(w * v for w, v in zip(weights, series.values, strict=True)) / sum(weights)
    assert series.smoothed(0.9).values[-1] == pytest.approx(expected, rel=1e-12)
    constant = Series(list(range(50)), [3.0] * 50).smoothed(0.99)
    assert constant.values == pytest.approx([3.0] * 50)


def test_thinning_keeps_ends_extremes_and_gaps():
    values = [math.sin(x / 50) for x in range(10_000)]
    values[1234], values[7001], values[5000] = 9.0, -9.0, math.nan
    thin = Series(list(range(10_000)), values).thinned(600)
    assert len(thin) <= 600
    assert (thin.xs[0], thin.xs[-1]) == (0, 9999)
    assert max(thin.finite().values) == 9.0
    assert min(thin.finite().values) == -9.0
    assert [x for x, value in thin if math.isnan(value)] == [5000]
    assert set(thin.finite()) <= set(zip(range(10_000), values, strict=True))
