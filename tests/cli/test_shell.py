"""Q8: the command line answers fast, with one message of what, where and the fix, and the documented exit code."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune import errors
from llmtune.cli import failure
from llmtune.cli import main as shell
from llmtune.cli.main import COMMANDS, GROUPS, PANELS, run
from llmtune.errors import ConfigError, DataError, LlmtuneError, Problem
from training_helpers import Forked

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "pyarrow",
    "numpy",
    "peft",
    "accelerate",
    "bitsandbytes",
    "wandb",
    "tensorboard",
    "rich.traceback",
)


def llmtune(*arguments, **keywords):
    """Run the real program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "llmtune", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **keywords,
    )


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_every_command_under_its_heading(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for row in COMMANDS:
        assert f"  {row.words.split()[0]} " in out
    assert [out.index(f"{row.panel}:") for row in COMMANDS]


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.words)
def test_every_row_of_the_table_leads_to_a_command_with_help(row, capsys):
    assert row.panel in PANELS
    assert row.help.endswith(".")
    assert len(row.help) <= 90
    assert run([*row.words.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: llmtune {row.words}")
    assert "--offline" in out
    assert "--debug" in out


def test_every_group_has_a_line_and_commands():
    groups = {row.words.split()[0] for row in COMMANDS if " " in row.words}
    assert groups <= set(GROUPS)


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_a_bare_group_shows_its_help(arguments, capsys):
    assert run(arguments) == 0
    assert capsys.readouterr().out.startswith("Usage: llmtune")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["confg"], ["unknown command `confg`", "did you mean `llmtune config`?"]),
        (["config", "shwo"], ["unknown command `config shwo`", "did you mean `llmtune config show`?"]),
        (["validate"], ["unknown command `validate`", "did you mean `llmtune config validate`?"]),
        (["xyzzy"], ["unknown command `xyzzy`", "`llmtune --help` lists the commands"]),
        (["config", "show", "--bogus"], ["--bogus", "`llmtune config show --help`"]),
        (["config", "diff", "a"], ["'B'", "`llmtune config diff --help`"]),
        (["config", "show", "--config"], ["--config"]),
        (["--bogus"], ["--bogus", "`llmtune --help`"]),
    ],
)
def test_bad_usage_is_refused_with_the_nearest_command_and_exit_2(arguments, words, capsys):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in words:
        assert word in captured.err
    assert captured.err.startswith("error: ")


def test_one_problem_is_what_where_and_fix_on_their_own_lines():
    assert (
        failure.message(ConfigError("what", where="a.yaml:3", fix="do this"))
        == "error: what\n  where: a.yaml:3\n  fix: do this"
    )
    assert failure.message(ConfigError("what")) == "error: what"


def test_several_problems_stand_in_one_message():
    error = DataError.all([Problem("one", "a:1", "fix it"), Problem("two")])
    assert failure.message(error) == "error: 2 problems\n  a:1: one\n    fix: fix it\n  two"


def kinds_of(cls):
    return [cls, *(kind for child in cls.__subclasses__() for kind in kinds_of(child))]


@pytest.mark.parametrize(
    "kind",
    [kind for kind in kinds_of(LlmtuneError) if kind is not errors.StoppedBySignal],
    ids=lambda kind: kind.__name__,
)
def test_every_kind_of_error_ends_with_its_own_exit_code(kind, broken, capsys):
    broken(kind("the problem", where="here", fix="this way"))
    assert run(["broken"]) == kind.exit_code
    assert capsys.readouterr().err == "error: the problem\n  where: here\n  fix: this way\n"


def test_a_stop_by_signal_ends_with_128_and_its_number(broken, capsys):
    broken(errors.StoppedBySignal(15, "stopped after step 3"))
    assert run(["broken"]) == 143
    assert "stopped after step 3" in capsys.readouterr().err


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """`broken(error)` adds a command `broken` that raises it; crash files go to this test's folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def add(error, value=None):
        def command() -> object:
            if error is not None:
                raise error
            return value

        module = type(sys)("llmtune.cli.broken_for_a_test")
        module.command = command
        monkeypatch.setitem(sys.modules, module.__name__, module)
        row = shell.Command("broken", "broken_for_a_test:command", "Fail.", PANELS[0], ("llmtune broken",))
        build = shell.build
        monkeypatch.setattr(shell, "build", lambda: build((*COMMANDS, row)))

    return add


def test_what_a_command_returns_is_its_exit_code(broken):
    broken(None, value=5)
    assert run(["broken"]) == 5


def test_a_crash_goes_to_a_file_without_secrets_and_exits_1(broken, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "CANARY-0123456789")
    broken(RuntimeError("lost CANARY-0123456789 and hf_" + "c" * 30))
    assert run(["broken"]) == 1
    err = capsys.readouterr().err
    (file,) = (tmp_path / "state" / "llmtune").glob("crash-*.txt")
    text = file.read_text()
    assert str(file) in err
    assert "Traceback" in text
    assert "RuntimeError: lost *** and ***" in text
    assert "Traceback" not in err
    for shown in (text, err):
        assert "CANARY" not in shown
        assert "hf_c" not in shown


def test_a_crash_without_any_place_for_its_file_still_says_so(broken, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/no")
    monkeypatch.setattr(failure.tempfile, "gettempdir", lambda: "/dev/null/no")
    broken(RuntimeError("lost"))
    assert run(["broken"]) == 1
    assert "no folder could take a crash file" in capsys.readouterr().err


def test_debug_shows_the_traceback(broken, capsys):
    broken(ConfigError("wrong"))
    assert run(["broken", "--debug"], debug=True) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: wrong\n")


def test_an_interrupt_is_one_line_and_exit_130(broken, capsys):
    broken(KeyboardInterrupt())
    assert run(["broken"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_nothing_heavy_is_imported_for_help_a_config_error_or_a_config():
    """Q1: every answer that needs no model is given without torch."""
    code = (
        "import sys\nfrom llmtune.cli.main import run\n"
        "run(['--help']); run(['config', 'show', 'training.lerning_rate=1']); run(['config', 'show', '--config', 'test', '--origin'])\n"  # noqa: E501
        "run(['config', 'schema']); run(['confg'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_no_command_module_imports_anything_heavy_by_itself():
    names = sorted({f"llmtune.cli.{row.target.partition(':')[0]}" for row in COMMANDS})
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    code += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["config", "show", "training.lerning_rate=1"]], ids=["help", "config error"]
)
def test_an_answer_takes_less_than_half_a_second_of_processor_time(arguments, empty):
    """Q1, as the median of five."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        llmtune(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(times) < 0.5


def test_a_reader_that_leaves_early_is_no_error(empty):
    """`llmtune ... | head -1` prints no traceback; the reader has gone before the first byte here."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "llmtune", "config", "schema"],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stderr == ""
    assert done.returncode == 128 + 13


def test_offline_is_set_before_anything_is_imported(broken, empty):
    code = (
        "import os, sys\nsys.argv = ['llmtune', 'config', 'show', '--offline']\nfrom llmtune.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, os.environ['HF_HUB_OFFLINE'], os.environ['WANDB_MODE'])"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environ
    )
    assert done.stdout.splitlines()[-1] == "0 1 offline"


@pytest.mark.parametrize(
    "environ",
    [
        {"TERM": "dumb"},
        {"COLUMNS": "20"},
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"HOME": ""},
        {"NO_COLOR": "1"},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_a_poor_terminal_gets_the_same_plain_message(environ, empty):
    done = llmtune("config", "show", "training.lerning_rate=é😀", env={**os.environ, **environ})
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key `training.lerning_rate` (`")
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "encoding", "words"),
    [
        (("config", "show", "-c", "mine.yaml"), "ascii", ("name: ", "\\u65e5")),
        (("config", "show", "--origin", "-c", "mine.yaml"), "latin-1", ("run.name", "\\u65e5")),
        (("config", "diff", "mine.yaml", "test"), "ascii", ("run.name", "\\u65e5")),
        (("data", "preview", "-c", "mine.yaml"), "ascii", ("\\u21b5", "\\U0001f642")),
        (("config", "show", "-c", "mine.yaml"), "cp1252", ("name: ", "\\u65e5")),
        (("runs", "läufe"), "ascii", ("\\u65e5",)),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else value,
)
def test_characters_outside_the_encoding_of_the_output_are_escapes(arguments, encoding, words, empty):
    (empty / "rows.jsonl").write_text(
        '{"messages":[{"role":"user","content":"Où? 🙂"},{"role":"assistant","content":"Là — é"}]}\n', encoding="utf-8"
    )
    (empty / "mine.yaml").write_text(
        "run: {name: été 日}\nmodel: {name: custom-nano}\ndata: {train: [rows.jsonl]}\n", encoding="utf-8"
    )
    run_folder = empty / "läufe" / "été 日"
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text('{"run_id": "a", "state": "finished"}', encoding="utf-8")
    # The preview needs the libraries, which a new process would import for seconds; the others start as a user's do.
    code, shown, said = (printed_by_fork if arguments[0] == "data" else printed_by_program)(arguments, encoding)
    assert code == 0, said
    assert [word for word in words if word.encode() not in shown] == [], shown


def printed_by_program(arguments, encoding):
    """Exit code, stdout and stderr of the real program, with that encoding of its output."""
    environ = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "llmtune", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environ)
    return done.returncode, done.stdout, done.stderr


def printed_by_fork(arguments, encoding):
    """The same of a fork of this process."""
    shown = Path("shown")

    def print_it():
        with shown.open("w", encoding=encoding) as sys.stdout, pytest.raises(SystemExit) as ended:
            shell.main(arguments)
        return ended.value.code

    child = Forked(print_it)
    said, _ = child.communicate(60)
    return child.returncode, shown.read_bytes(), said


@pytest.mark.parametrize(
    ("redirect", "code"), [("<&-", 0), (">&-", 0), ("2>&-", 0), (">/dev/full", 6), ("2>/dev/full", 0)]
)
def test_closed_and_full_streams_are_no_crash(redirect, code, empty):
    command = f"{sys.executable} -m llmtune config show {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert done.stderr in ("", "error: the machine refuses: No space left on device\n" + done.stderr.partition("\n")[2])
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error", [EOFError(), OSError(28, "No space left on device", "x.txt"), MemoryError()], ids=["eof", "disk", "memory"]
)
def test_what_the_machine_refuses_is_told_from_what_we_did_wrong(error, broken, capsys):
    broken(error)
    assert run(["broken"]) == (1 if isinstance(error, EOFError) else 6)
    assert capsys.readouterr().err.startswith("error: ")
