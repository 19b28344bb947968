"""`llmtune report`: what is drawn is what was measured, and nothing of the data becomes part of the page."""

import json
import math
import re

import pytest

from llmtune.cli.main import main
from llmtune.training import train as training
from llmtune.watch.differences import numbers_of
from llmtune.watch.figures import figures_of
from llmtune.watch.report.chart import Chart, Line
from llmtune.watch.report.charts import loss_charts
from llmtune.watch.report.overview import facts
from llmtune.watch.report.page import SECTIONS, read_run, report_html
from llmtune.watch.series import Series
from report_helpers import HOSTILE, Page, make_run, quiet_losses, write_lines


def run_command(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


def drawn(path, frame):
    """The points of an SVG path in the units of the chart, by stretches without a gap."""
    x0, x1, y0, y1 = frame
    return [
        [
            (x0 + float(x) * (x1 - x0) / 1000, y1 - float(y) * (y1 - y0) / 1000)
            for x, y in (point.split(",") for point in part.removesuffix("h0").split("L"))
        ]
        for part in path.split("M")[1:]
    ]


def test_the_points_of_the_svg_are_the_series_and_gaps_interrupt_it():
    values = [3.0, 2.5, math.nan, 2.25, math.nan, 1.0, 1.25]
    series = Series(list(range(10, 17)), values)
    page = Page(Chart("Loss", [Line("training", series, "noisy")], smoothing=0.5).html())
    (chart,) = page.charts
    for kind, expected in (("noisy", series), ("smooth", series.smoothed(0.5))):
        (path,) = page.paths(kind)
        points = drawn(path, chart["frame"])
        wanted = [list(part) for part in expected.runs()]
        assert [len(part) for part in points] == [2, 1, 2]
        for part, want in zip(points, wanted, strict=True):
            assert part == [pytest.approx(point, abs=1e-4) for point in want]
    assert chart["lines"][0]["y"] == [None if math.isnan(value) else value for value in values]
    assert chart["lines"][0]["x"] == {"from": 10, "by": 1, "n": 7}


def test_every_line_of_a_report_is_drawn_where_the_record_has_it(tmp_path):
    losses = quiet_losses(300)
    run = read_run(make_run(tmp_path / "a", losses, heldout=[(0, 4.1), (100, 2.6), (300, 1.9)]))
    page = Page(report_html([run]))
    loss = page.charts[0]
    (points,) = drawn(page.paths("noisy")[0], loss["frame"])
    assert [y for _, y in points] == pytest.approx(losses, abs=1e-4)
    assert [x for x, _ in points] == pytest.approx(list(range(1, 301)), abs=2e-3)
    (heldout,) = drawn(page.paths("line")[0], loss["frame"])
    assert heldout == [pytest.approx(point, abs=2e-3) for point in [(0, 4.1), (100, 2.6), (300, 1.9)]]
    (clip,) = page.paths("limit")[:1]
    _, _, y0, y1 = page.charts[1]["frame"]
    assert y1 - float(clip.split(",")[1].split("H")[0]) * (y1 - y0) / 1000 == pytest.approx(1.0, abs=1e-3)


def test_hostile_text_in_every_file_of_a_run_stays_text(tmp_path):
    losses = quiet_losses(12)
    pages = {}
    for text in ("plain", HOSTILE):
        folder = tmp_path / f"{len(text)}"
        runs = [read_run(make_run(folder / name, losses, text=text, heldout=[(0, 4.0), (12, 2.0)])) for name in "ab"]
        pages[text] = [Page(report_html(chosen)) for chosen in (runs[:1], runs)]
    for plain, hostile in zip(pages["plain"], pages[HOSTILE], strict=True):
        assert [tag for tag, _ in plain.elements] == [tag for tag, _ in hostile.elements]
        names = {name for _, attributes in hostile.elements for name in attributes}
        assert names == {name for _, attributes in plain.elements for name in attributes}
        assert not any(name.startswith("on") or name in ("src", "srcset") for name in names)
        links = [attributes["href"] for tag, attributes in hostile.elements if "href" in attributes]
        assert links
        assert all(link.startswith("#") for link in links)
        shown = "".join(hostile.texts)
        assert shown.count("<script>alert(1)</script>") > 10
        assert "\x1b" not in shown
        assert "\u202e" not in shown


def test_a_report_of_ten_thousand_steps_is_smaller_than_a_megabyte_and_a_half(tmp_path):
    run = read_run(
        make_run(tmp_path / "long", quiet_losses(10_000), heldout=[(step, 2.0) for step in range(0, 10_000, 50)])
    )
    content = report_html([run])
    assert len(content.encode()) < 1_500_000
    page = Page(content)
    assert len(page.charts[0]["lines"][0]["y"]) == 10_000


def test_a_run_of_which_only_run_json_is_left_still_gives_a_page(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text('{"run_id": "0", "state": "failed"}')
    page = Page(report_html([read_run(tmp_path / "bare")]))
    assert "failed" in page.texts


@pytest.mark.parametrize(
    "broken",
    ["identity", "data", "plan", "decisions", "parameters", "command", "tags", "total_steps"],
)
@pytest.mark.parametrize("value", [None, [], "x", {"train": 1, "steps": 7, "memory": [], "config": "x"}])
def test_facts_of_another_shape_than_expected_are_left_out(tmp_path, broken, value):
    folder = make_run(tmp_path / "a", [3.0, 2.0])
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, broken: value}))
    assert "</html>" in report_html([read_run(folder), read_run(folder)])


def test_the_command_writes_a_page_with_everything_that_a_real_run_holds(config_of, capsys):
    result = training.train(config_of("evaluation.prompts=[numbers]", "checkpoint.every_steps=null"))
    assert run_command("report", str(result.folder)) == 0
    out = capsys.readouterr().out.strip()
    assert out == str(result.folder / "report.html")
    content = (result.folder / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert ids == [section.name for section in SECTIONS if section.name not in ("wins", "differences")]
    shown = " ".join(page.texts)
    assert "24 rows" in shown
    assert f"llmtune train --config {result.folder / 'config.yaml'}" in shown
    # Planned and measured stand side by side, the weights to the byte.
    info = json.loads((result.folder / "run.json").read_text())
    assert info["measured_bytes"]["weights"] == info["plan"]["memory"]["parts"]["weights"]
    assert info["measured_bytes"]["optimizer"] == pytest.approx(info["plan"]["memory"]["parts"]["optimizer"], rel=0.01)
    # The masks are those of the rows: the answer and its end, nothing else.
    first = json.loads((result.folder / "data.json").read_text())["train"]["examples"][0]
    trained = "".join(text for text, weight, _ in first["stretches"] if weight)
    whole = "".join(text for text, _, _ in first["stretches"])
    assert whole.endswith("<|im_start|>assistant\n" + trained + "\n")
    assert trained.endswith("<|im_end|>")


def test_a_heldout_file_named_train_is_told_from_the_training_loss(tmp_path):
    run = read_run(make_run(tmp_path / "a", [4.0, 3.0], text="train", heldout=[(0, 4.1), (2, 2.6)]))
    (chart,) = loss_charts([run])
    assert [line.name for line in chart.lines] == ["training", "held-out", "held-out, source train"]
    assert "loss of source train" in Page(report_html([run])).texts


def test_a_level_names_every_run_that_it_belongs_to(tmp_path):
    """In the legend of compared runs, where the first run's name alone would say that the others have none."""
    folders = [make_run(tmp_path / name, [4.0, 3.0], heldout=[(0, 4.1)]) for name in "abc"]

    def levels(*chosen):
        charts = Page(report_html([read_run(folder) for folder in chosen])).charts
        lines = [line for chart in charts for line in chart["lines"] if line["kind"] == "limit"]
        return [(line["name"], line["colour"]) for line in lines]

    assert levels(folders[0]) == [("clipped above", 7), ("planned", 7)]
    assert levels(*folders) == [("clipped above", 7), ("planned", 7)]
    info = json.loads((folders[1] / "run.json").read_text())
    info["identity"]["config"]["training"]["max_grad_norm"] = 2.0
    (folders[1] / "run.json").write_text(json.dumps(info))
    assert levels(*folders) == [("a, c: clipped above", 7), ("b: clipped above", 1), ("planned", 7)]


def test_two_runs_are_drawn_over_each_other_with_what_differs_and_who_wins(tmp_path, capsys):
    first = make_run(tmp_path / "runs" / "first", [3.0, 2.0, 1.5], rate=0.001, heldout=[(0, 4.0), (3, 2.0)])
    make_run(tmp_path / "runs" / "second", [3.0, 2.5, 1.0], rate=0.002, heldout=[(0, 4.0), (3, 2.5)])
    assert run_command("report", "first", "second", "--runs", str(tmp_path / "runs")) == 0
    assert capsys.readouterr().out.strip() == str(first / "comparison.html")
    content = (first / "comparison.html").read_text(encoding="utf-8")
    page = Page(content)
    assert [line["name"] for line in page.charts[0]["lines"]] == [
        "first: training",
        "first: held-out",
        "second: training",
        "second: held-out",
    ]
    part = content[content.index('id="differences"') : content.index('id="held-out"')]
    assert re.findall("<code>(.*?)</code>", part) == ["training.learning_rate", "0.001", "0.002"]
    part = content[content.index('id="wins"') : content.index('id="differences"')]
    assert re.findall('<b class="better">(.*?)</b>', part) == ["2", "2"]
    assert "<td><b>wins</b></td><td><b>2</b></td><td><b>0</b></td>" in part


def test_a_folder_that_is_no_run_is_refused_with_its_name(tmp_path, capsys):
    assert run_command("report", str(tmp_path)) == 5
    assert str(tmp_path) in capsys.readouterr().err


def test_figures_of_the_machine_are_drawn_over_seconds_and_constants_are_not(tmp_path):
    folder = make_run(tmp_path / "a", [3.0, 2.0])
    gpu = {"index": 0, "use": 0.5, "memory_total_bytes": 8e9, "memory_used_bytes": 4e9}
    write_lines(
        folder / "system.jsonl", [{"time": 10.0 + t, "cpu_count": 8, "cpu_use": 0.25, "gpus": [gpu]} for t in (0, 5)]
    )
    page = Page(report_html([read_run(folder)]))
    drawn_over_seconds = {chart["lines"][0]["name"]: chart["unit"] for chart in page.charts if chart["x"] == "seconds"}
    assert drawn_over_seconds == {"cpu use": "percent", "gpus 0 use": "percent", "gpus 0 memory used": "bytes"}


def rewarded_run(folder, rewards, heldout):
    """A run that learns from rewards: training rewards from step 1 on, (step, reward) held out."""
    run = make_run(folder, quiet_losses(len(rewards)))
    lines = [{"step": step, "eval_reward": reward} for step, reward in heldout]
    lines += [{"step": step, "train_loss": 0.01, "reward": reward} for step, reward in enumerate(rewards, 1)]
    write_lines(run / "metrics.jsonl", lines)
    return read_run(run)


def test_a_run_that_learns_from_rewards_shows_rewards_and_higher_is_better(tmp_path):
    rewards = [-0.5 + step / 40 for step in range(1, 31)]
    run = rewarded_run(tmp_path / "up", rewards, [(0, -0.1), (10, 0.2), (30, 0.1)])
    page = Page(report_html([run]))
    tiles = {fact.label: fact for fact in facts(run)}
    assert (tiles["held-out reward"].value, tiles["held-out reward"].detail) == (
        "0.1",
        "-0.1 before; best 0.2 at step 10",
    )
    assert tiles["training reward"].value == "0.25"
    assert not any("loss" in label for label in tiles)
    assert page.charts[0]["lines"][0]["y"] == [pytest.approx(reward, abs=1e-5) for reward in rewards]
    shown = " ".join(page.texts)
    assert "Higher is better." in shown
    assert "Lower is better." not in shown
    trend = {figure.name: figure for figure in figures_of(run)}
    assert (trend["reward"].verdict, trend["reward"].is_fine) == ("rising", True)
    assert trend["held-out reward"].verdict == "best was 0.2 at step 10"
    worse = rewarded_run(tmp_path / "down", rewards[::-1], [(0, 0.1), (30, -0.1)])
    assert {figure.name: figure for figure in figures_of(worse)}["reward"].verdict.startswith("falling: a lower")
    numbers = numbers_of([run, worse])
    assert numbers["held-out reward, best"] == [0.2, 0.1]
    assert "held-out loss, best" not in numbers


def test_losses_of_different_units_and_rewards_are_not_drawn_over_each_other(tmp_path):
    tokens = [read_run(make_run(tmp_path / name, quiet_losses(30))) for name in "ab"]
    rewarded = rewarded_run(tmp_path / "c", [0.1] * 30, [(0, 0.1), (30, 0.2)])
    charts = loss_charts([tokens[0], rewarded, tokens[1]])
    assert [(chart.title, chart.unit) for chart in charts] == [
        ("Loss", "nats per trained token"),
        ("Reward", "mean reward of the drawn answers"),
    ]
    assert [(line.name, line.colour) for line in charts[0].lines if line.kind == "noisy"] == [
        ("a: training", 0),
        ("b: training", 2),
    ]
    assert [line.colour for line in charts[1].lines] == [1, 1]


def test_no_number_of_the_axis_of_steps_lies_under_its_name(tmp_path):
    content = report_html([read_run(make_run(tmp_path / "run", quiet_losses(12)))])
    places = [float(place) for place in re.findall(r'class="x" style="left:([\d.]+)%', content)]
    assert len(places) > 10
    assert max(places) < 84
    assert content.count('class="xname">step 12<') >= 4
