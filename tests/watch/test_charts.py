"""Lines of braille, cell by cell; charts of exact size; what the figures of a run look like."""

import io
import json
import math

import pytest
from rich.console import Console

from llmtune.watch.braille import Cell, Plot, Range, range_of
from llmtune.watch.charts import Chart, Line, charts_of, draw
from llmtune.watch.figures import figures_of
from llmtune.watch.log_file import LogFile
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series
from report_helpers import make_run, write_lines

UNIT = Range(0.0, 1.0)


def drawn(columns, rows, *series):
    plot = Plot(columns, rows, UNIT, UNIT)
    for one in series:
        plot.line(one, "cyan")
    return ["".join(cell.character for cell in row) for row in plot.cells()]


def test_a_rising_line_sets_the_dots_of_its_diagonal():
    """Two cells across and one down are four by four dots; the diagonal has one in each column."""
    assert drawn(2, 1, Series([0, 1], [0.0, 1.0])) == ["⡠⠊"]


def test_a_level_line_sets_one_row_of_dots():
    assert drawn(3, 2, Series([0, 1], [1.0, 1.0])) == ["⠉⠉⠉", "   "]
    assert drawn(3, 2, Series([0, 1], [0.0, 0.0])) == ["   ", "⣀⣀⣀"]


def test_a_gap_is_not_bridged_and_a_point_alone_is_a_dot():
    assert drawn(3, 1, Series([0.0, 0.5, 1.0], [0.0, math.nan, 0.0])) == ["⡀ ⢀"]


def test_two_lines_share_a_cell():
    assert drawn(1, 1, Series([0, 1], [0.0, 0.0]), Series([0, 1], [1.0, 1.0])) == ["⣉"]


def test_a_mark_stands_over_a_line_and_a_level_behind_it():
    plot = Plot(3, 1, UNIT, UNIT)
    plot.level(0.5, "dim")
    plot.line(Series([0, 0.2], [0.0, 0.0]), "cyan")
    plot.mark(1.0, 0.5, "o", "red")
    assert plot.cells() == [[Cell("⣀", "cyan"), Cell("╌", "dim"), Cell("o", "red")]]


def test_a_level_outside_the_field_is_not_drawn():
    plot = Plot(2, 1, UNIT, UNIT)
    plot.level(1.5, "dim")
    assert plot.cells() == [[Cell(" ", ""), Cell(" ", "")]]


def test_a_value_outside_is_drawn_at_the_nearest_edge():
    assert drawn(1, 1, Series([0.5], [7.0])) == drawn(1, 1, Series([0.5], [1.0]))


@pytest.mark.parametrize("values", [[], [math.nan], [5.0], [1e300, 1e300], [0.0], [-3.0, -3.0], [1e-320]])
def test_every_axis_has_a_width(values):
    span = range_of(values)
    assert span.low < span.high
    assert all(0 <= span.share(value) <= 1 for value in values if math.isfinite(value))


@pytest.mark.parametrize(("columns", "rows"), [(24, 5), (39, 10), (120, 30)])
@pytest.mark.parametrize("values", [[], [1.0], [step % 7 for step in range(5000)]])
def test_a_chart_has_exactly_the_size_that_was_asked_for(columns, rows, values):
    line = Line(Series(list(range(len(values))), values), "cyan", end_mark="A")
    lines = draw(Chart("loss " * 50, [line], [(2.0, "clip")]), columns, rows).plain.split("\n")
    assert len(lines) == rows
    assert max(map(len, lines)) <= columns


def test_a_line_has_its_own_colour_at_full_strength_and_the_axis_is_dim():
    console = Console(width=40, color_system="truecolor", force_terminal=True, file=io.StringIO())
    text = draw(Chart("loss", [Line(Series([1, 9], [2.5, 7.25]), "cyan")]), 40, 6)
    styles = {}
    for segment in console.render(text):
        for character in segment.text.strip():
            styles.setdefault("line" if "\u2800" < character <= "\u28ff" else character, set()).add(str(segment.style))
    assert styles["line"] == {"cyan"}
    assert styles["│"] == styles["┤"] == {"dim"}


def test_the_axis_names_the_largest_and_the_smallest_value_and_the_steps():
    lines = draw(Chart("loss", [Line(Series([10, 400], [2.5, 7.25]), "cyan")]), 40, 6).plain.split("\n")
    assert lines[1].startswith("   7.25┤")
    assert lines[4].startswith("    2.5┤")
    assert lines[5].split() == ["10", "step", "400"]


def test_the_charts_of_a_run_have_its_heldout_points_its_clip_and_its_plan(tmp_path):
    run = RunData(make_run(tmp_path / "a", [5.0, 4.0, 3.0], heldout=[(0, 5.5), (3, 3.5)]))
    run.refresh()
    loss, gradients, _, _, memory = charts_of([run], 0.0)
    assert loss.title == "loss 3  o held-out 3.5"
    assert [list(line.series) for line in loss.lines][-1] == [(0, 5.5), (3, 3.5)]
    assert gradients.levels == [(1.0, "clip")]
    assert memory.levels == [(4e8, "planned")]
    assert draw(loss, 40, 10).plain.count("o") >= 4  # two of the title, two points


def test_several_runs_are_told_apart_by_letters_and_not_by_colour_alone(tmp_path):
    runs = [RunData(make_run(tmp_path / name, [5.0 - rate, 4.0 - rate])) for name, rate in (("a", 0), ("b", 1))]
    for run in runs:
        run.refresh()
    text = draw(charts_of(runs, 0.5)[0], 60, 12).plain
    assert "loss A 4  B 3" in text
    assert "\n" in text
    plot = text.split("\n", 1)[1]
    assert plot.count("A") == plot.count("B") == 1


def test_a_heldout_loss_that_was_measured_once_is_not_called_the_best(tmp_path):
    run = RunData(make_run(tmp_path / "a", [5.0, 1.0], heldout=[(0, 5.5)]))
    run.refresh()
    figures = {figure.name: figure for figure in figures_of(run)}
    assert figures["held-out loss"].verdict == "measured once, at step 0"


def test_a_level_that_runs_do_not_share_has_their_letters(tmp_path):
    folders = [make_run(tmp_path / name, [5.0, 4.0]) for name in "abc"]
    info = json.loads((folders[2] / "run.json").read_text())
    info["identity"]["config"]["training"]["max_grad_norm"] = 0.5
    info["plan"]["memory"]["peak_bytes"] = 900_000_000
    (folders[2] / "run.json").write_text(json.dumps(info))
    runs = [RunData(folder) for folder in folders]
    for run in runs:
        run.refresh()
    _, gradients, _, _, memory = charts_of(runs[:2], 0.0)
    assert gradients.title.endswith("  ╌ clipped at 1")
    assert memory.title.endswith("  ╌ planned 400 MB")
    _, gradients, _, _, memory = charts_of(runs, 0.0)
    assert gradients.title.endswith("  ╌ clipped at A 1, B 1, C 0.5")
    assert memory.title.endswith("  ╌ planned A 400 MB, B 400 MB, C 900 MB")
    assert gradients.levels == [(1.0, "clip"), (0.5, "clip")]


def test_the_figures_of_a_run_say_what_they_look_like(tmp_path):
    run = RunData(
        make_run(tmp_path / "a", [6 - step / 4 for step in range(12)], heldout=[(0, 6.0), (6, 4.0), (12, 3.0)])
    )
    run.refresh()
    figures = {figure.name: figure for figure in figures_of(run)}
    assert figures["loss"].verdict == "falling"
    assert figures["held-out loss"].verdict == "the best so far"
    assert figures["memory"].verdict == "125% of the 400.00 MB planned"
    assert not figures["memory"].is_fine
    assert figures["tokens/s"].verdict == "as usual"


def test_a_rising_loss_and_overfitting_do_not_look_right(tmp_path):
    run = RunData(
        make_run(tmp_path / "a", [float(step) for step in range(1, 13)], heldout=[(1, 2.0), (4, 2.5), (8, 3.0)])
    )
    run.refresh()
    figures = {figure.name: figure for figure in figures_of(run)}
    assert not figures["loss"].is_fine
    assert figures["loss"].verdict.startswith("rising")
    assert figures["held-out loss"].verdict == "best was 2 at step 1; no better since: it may over-fit"


def test_a_redirected_log_is_read_as_a_run(tmp_path):
    log = tmp_path / "log"
    lines = ["plan    4 steps, 4 an epoch; 9 tokens an epoch, 9 of them trained", "{'eval_loss': 5.5, 'epoch': 0.0}"]
    lines += [
        f"{{'loss': {loss}, 'learning_rate': 0.001, 'epoch': {step / 4}}}"
        for step, loss in enumerate((5.0, "nan", 3.0), 1)
    ]
    log.write_text("\n".join([*lines, "[step 3] hello -> a \\x1b", "{'loss': 2.0, 'ep"]))
    source = LogFile(log)
    assert source.refresh()
    assert source.data.step == 3
    assert source.data.total_steps == 4
    assert list(source.data.metrics["train_mean_nll"].finite()) == [(1, 5.0), (3, 3.0)]
    assert list(source.data.metrics["eval_mean_nll"]) == [(0, 5.5)]
    assert [sample.text for sample in source.data.samples] == ["a \\x1b"]
    assert not source.refresh()
    with log.open("a") as file:
        file.write("och': 1.0}\nfinished after step 4\n")
    assert source.refresh()
    assert source.data.metrics["train_mean_nll"].last == (4, 2.0)
    assert source.data.state == "finished"
    log.write_text("{'loss': 9.0}\n")
    assert source.refresh()
    assert list(source.data.metrics["train_mean_nll"]) == [(1, 9.0)]
    log.unlink()
    assert not source.refresh()


def test_lines_of_a_log_that_are_steps_apart_are_placed_by_their_epoch(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "plan    100 steps, 50 an epoch; 9\n" + "".join(f"{{'loss': 1.0, 'epoch': {e}}}\n" for e in (0.2, 0.4, 0.6))
    )
    source = LogFile(log)
    source.refresh()
    assert source.data.metrics["train_mean_nll"].xs == [10, 20, 30]


def test_the_loss_of_a_run_of_another_unit_is_left_out_and_its_letter_says_so(tmp_path):
    runs = [RunData(make_run(tmp_path / name, [5.0, 4.0])) for name in "ab"]
    write_lines(
        tmp_path / "b" / "metrics.jsonl", [{"step": step, "reward": 0.25, "train_loss": 0.0} for step in (1, 2)]
    )
    for run in runs:
        run.refresh()
    assert draw(charts_of(runs, 0.5)[0], 60, 12).plain.startswith("loss A 4  (B: another unit)\n")
    assert draw(charts_of(runs[1:], 0.5)[0], 60, 12).plain.startswith("reward 0.25\n")
