"""The dashboard at 80x24 and elsewhere: of a run at work, a dead one, one whose file is cut or gone, and of several."""

import asyncio
import json
import subprocess
import sys

import pytest

from llmtune import durable
from llmtune.cli.dashboard import _Folder
from llmtune.cli.main import run as run_command
from llmtune.watch import dashboard, pace
from llmtune.watch.dashboard import Dashboard
from llmtune.watch.run_data import RunData
from report_helpers import HOSTILE, make_run, quiet_losses


def source(folder):
    return _Folder(RunData(folder))


def with_info(folder, **fields):
    """The folder, with these fields of run.json."""
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def screen_of(app):
    """The characters on the screen, line by line."""
    return ["".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips()]


def watched(sources, scenario, size=(80, 24)):
    async def act():
        app = Dashboard(sources, seconds=3600)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await scenario(app, pilot)

    asyncio.run(act())


@pytest.mark.parametrize("size", [(80, 24), (60, 20), (200, 50)])
def test_the_screen_holds_progress_and_four_charts(tmp_path, size):
    folder = make_run(tmp_path / "a-run", quiet_losses(300), heldout=[(0, 3.0), (300, 2.0)])
    with_info(folder, total_steps=300)

    async def scenario(app, pilot):
        lines = screen_of(app)
        assert len(lines) == size[1]
        text = "\n".join(lines)
        words = ("a-run finished", "300/300 100%", "held-out 2", "gradient norm", "learning rate", "tokens/s", "quit")
        assert [word for word in words if word not in text] == []
        assert sum("step 300" in line for line in lines) == 2  # the axes of both rows of charts
        await pilot.press("m")
        assert "memory 500 MB" in "\n".join(screen_of(app))

    watched([source(folder)], scenario, size)


def test_each_key_shows_its_view(tmp_path):
    folder = make_run(tmp_path / "a-run", quiet_losses(30), text="a prompt")

    async def scenario(app, pilot):
        views = {"2": "nats per trained token", "3": "a prompt", "4": "step 2      warning: a prompt", "1": "tokens/s"}
        for key, word in views.items():
            await pilot.press(key)
            await pilot.pause()
            assert word in "\n".join(screen_of(app)), key
        await pilot.press("s")
        assert app._smoothing == 3

    watched([source(folder)], scenario)


def test_a_killed_run_is_shown_as_such_with_the_way_on(tmp_path):
    folder = with_info(make_run(tmp_path / "dead", quiet_losses(30)), state="running", total_steps=100)

    async def scenario(app, pilot):
        text = "\n".join(screen_of(app))
        assert "dead interrupted" in text
        assert "30/100  30%" in text
        assert "it was killed; `llmtune resume` goes on from its newest checkpoint" in text

    watched([source(folder)], scenario)


def test_a_run_that_is_killed_while_it_is_watched_is_shown_as_such(tmp_path):
    """Its end changes no file: nothing but the lock of its folder says it."""
    folder = with_info(make_run(tmp_path / "a-run", quiet_losses(30)), state="running", total_steps=100)

    async def scenario(app, pilot):
        assert "a-run running" in "\n".join(screen_of(app))
        lock.release()
        app.read()
        await pilot.pause()
        assert "a-run interrupted" in "\n".join(screen_of(app))

    lock = durable.FileLock(folder / ".lock", "the run")
    watched([source(folder)], scenario)


def test_a_growing_a_cut_and_a_missing_file_are_followed(tmp_path):
    folder = make_run(tmp_path / "a-run", quiet_losses(20))
    path = folder / "metrics.jsonl"
    first = path.read_text().splitlines(keepends=True)

    async def scenario(app, pilot):
        with path.open("a") as file:
            file.write(json.dumps({"step": 21, "train_mean_nll": 9.5, "learning_rate": 0.25}) + '\n{"step": 22, "tra')
        app.read()
        await pilot.pause()
        assert "step 21" in "\n".join(screen_of(app))
        assert "learning rate 0.25" in "\n".join(screen_of(app))
        path.write_text("".join(first[:5]))
        app.read()
        await pilot.pause()
        assert "step 5" in "\n".join(screen_of(app))
        path.unlink()
        app.read()
        await pilot.pause()
        assert "no values yet" in "\n".join(screen_of(app))

    watched([source(folder)], scenario)


def test_a_folder_that_is_not_there_is_waited_for(tmp_path):
    async def scenario(app, pilot):
        assert "later unknown" in "\n".join(screen_of(app))
        make_run(tmp_path / "later", quiet_losses(20))
        app.read()
        await pilot.pause()
        assert "later finished" in "\n".join(screen_of(app))

    watched([source(tmp_path / "later")], scenario)


def test_several_runs_lie_over_each_other(tmp_path):
    folders = [make_run(tmp_path / name, [loss] * 20) for name, loss in (("one", 5.0), ("two", 2.0))]

    async def scenario(app, pilot):
        text = "\n".join(screen_of(app))
        assert "A one finished" in text
        assert "B two finished" in text
        assert "loss A 5  B 2" in text

    watched([source(folder) for folder in folders], scenario)


def test_text_of_a_run_cannot_steer_the_terminal(tmp_path, capsys):
    folder = make_run(tmp_path / "a-run", quiet_losses(20), text=HOSTILE)

    async def scenario(app, pilot):
        for key in "1234":
            await pilot.press(key)
            await pilot.pause()
            assert "\x1b[31m" not in "".join(screen_of(app))
            assert "\u202e" not in "".join(screen_of(app))

    watched([source(folder)], scenario)
    assert run_command(["dashboard", str(folder), "--once"]) == 0
    assert "\u202e" not in capsys.readouterr().out


def test_once_prints_a_frame_with_rich_alone(tmp_path):
    folder = make_run(tmp_path / "a-run", quiet_losses(40), heldout=[(0, 3.0), (40, 2.0)])
    with_info(folder, total_steps=40)
    script = (
        "import sys; from llmtune.cli.main import run; code = run(sys.argv[1:]); "
        "assert 'textual' not in sys.modules and 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "dashboard", str(folder), "--once"]
    environ = {"COLUMNS": "80", "PATH": "", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    for word in ("a-run finished", "40/40 100%", "held-out 2", "figures", "answers", "messages", "plain"):
        assert word in done.stdout
    assert any(chr(0x2801) <= character <= chr(0x28FF) for character in done.stdout)


def test_without_a_run_the_command_says_so(tmp_path, capsys):
    assert run_command(["dashboard", "--once", "--runs", str(tmp_path)]) == 2
    assert "there is no run to show" in capsys.readouterr().err


def test_a_log_is_shown_without_a_folder(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text(
        "".join(f"{{'loss': {5 - step / 10}, 'learning_rate': 0.001, 'epoch': 0.1}}\n" for step in range(20))
    )
    assert run_command(["dashboard", "--once", "--log", str(log)]) == 0
    assert "loss 3.1" in capsys.readouterr().out.replace("loss 3.10", "loss 3.1")


def test_a_dashboard_rests_until_it_has_taken_an_eighth_of_a_percent_of_the_machine(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a-run", quiet_losses(20))

    async def scenario(app, pilot):
        clock, read = {"now": 1000.0, "busy": 5.0}, []
        monkeypatch.setattr(pace, "available_cores", lambda: 4)
        monkeypatch.setattr(dashboard.time, "monotonic", lambda: clock["now"])
        monkeypatch.setattr(dashboard.time, "process_time", lambda: clock["busy"])
        app._busy_s = 4.75
        monkeypatch.setattr(app, "read", lambda: read.append(clock["now"]))
        # A quarter of a second is 1/800 of the time of 4 cores in 50 s.
        for clock["now"] in (1000.0, 1010.0, 1049.9, 1050.1, 1051.0):
            app.read_sparingly()
        assert read == [1000.0, 1050.1, 1051.0]
        clock["busy"] = 60.0  # rests for a minute, and not for 10,000 s
        app.read_sparingly()
        for clock["now"] in (1110.9, 1111.1):
            app.read_sparingly()
        assert read[3:] == [1051.0, 1111.1]
        clock["busy"] = 120.0
        app.draw_at_once()  # as a key does: what that takes is not counted
        for clock["now"] in (1112.0, 1112.5):
            app.read_sparingly()
        assert read[5:] == [1112.0, 1112.5]
        monkeypatch.undo()

    watched([source(folder)], scenario)


@pytest.mark.parametrize("size", [(80, 24), (104, 32), (60, 20)])
def test_a_run_that_was_evaluated_and_made_no_step_yet_has_one_chart_with_values(tmp_path, size):
    """As every run is between its first evaluation and its first step."""

    async def scenario(app, pilot):
        await pilot.press("m")
        screen = "\n".join(screen_of(app))
        assert "o held-out 4" in screen or size[0] < 80
        assert "no values yet" in screen

    watched([source(make_run(tmp_path / "run", [], heldout=[(0, 4.0)]))], scenario, size)


def test_a_run_that_is_not_begun_is_found_by_its_name_once_it_is(tmp_path, monkeypatch):
    from llmtune.cli.dashboard import _sources

    monkeypatch.chdir(tmp_path)
    (later,) = _sources(["later"], [], "runs")
    later.refresh()
    assert later.data.step == 0
    make_run(tmp_path / "runs" / "later", quiet_losses(20))
    later.refresh()
    assert later.data.step == 20
