"""Q8, N13: a real training in odd surroundings ends with exit code 0 and, byte for byte, the run of plain ones; or in
one clear line.

Each oddity stands once in `ODDITIES`; the default suite trains under several at a time (`TOGETHER`), the campaign under
each alone.
"""

import contextlib
import ctypes
import functools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from llmtune.cli.main import run as command
from training_helpers import Forked, lines_of, weights_of

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="what a process may not do is taken from it in Linux's way")
NAME = "-a b'\"\n😀 $(touch fired)`;&*?[x]{y}~%s,=:#"
"""A folder's name with a leading dash, spaces, quotes, a line's end, an emoji, and what a shell, a glob or a config
reads as its own.
"""


def let_modes_count():
    """Take from a child of root what lets root pass over the modes of files; for anyone else they count anyway."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; 24 is PR_CAPBSET_DROP
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


class Odd(NamedTuple):
    """What is odd: variables (None takes one away), the working folder, the data file and the runs folder in it, and
    the process itself.
    """

    environ: dict = {}  # noqa: RUF012 - never changed
    folder: str = "here"
    data: str = "rows.jsonl"
    runs: str = "runs"
    before: Callable = None
    """Called in the new process, before the program starts."""
    wrap: tuple = ()
    """Words before the command."""


ODDITIES = {
    "umask 077": Odd(before=lambda: os.umask(0o077)),
    "umask 002": Odd(before=lambda: os.umask(0o002)),
    "no HOME": Odd({"HOME": None}),
    "HOME that is not there": Odd({"HOME": "/nonexistent"}),
    "HOME that is a file": Odd({"HOME": "{here}/rows.jsonl"}),
    "HOME that takes nothing": Odd({"HOME": "/proc"}),
    "HOME without write permission": Odd({"HOME": "{readonly}"}, before=let_modes_count),
    "HOME on a read-only file system": Odd(
        wrap=("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro tmpfs "$HOME" && exec "$@"', "sh")
    ),
    "cache without write permission": Odd({"XDG_CACHE_HOME": "{readonly}"}, before=let_modes_count),
    "cache that may not be entered": Odd({"XDG_CACHE_HOME": "{locked}"}, before=let_modes_count),
    "user without a name": Odd(
        {"HOME": None, "USER": None, "LOGNAME": None}, wrap=("unshare", "--map-user=54321", "--map-group=54321")
    ),
    "TMPDIR that is not there": Odd({"TMPDIR": "/nonexistent"}),
    "TMPDIR without write permission": Odd({"TMPDIR": "{readonly}"}, before=let_modes_count),
    "locale C": Odd({"LC_ALL": "C", "LANG": None}, data="Größe 日本/rows.jsonl", runs="läufe"),
    "locale C without UTF-8": Odd({"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "output in ASCII": Odd({"PYTHONIOENCODING": "ascii"}),
    "PYTHONUTF8=0": Odd({"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"}, data="Größe 日本/rows.jsonl", runs="läufe"),
    "dumb terminal of 20 columns": Odd({"TERM": "dumb", "COLUMNS": "20"}),
    "no terminal's name": Odd({"TERM": None, "COLUMNS": "0"}),
    "closed stdin": Odd(before=lambda: os.close(0)),
    "closed stdout": Odd(before=lambda: os.close(1)),
    "closed stdin, stdout, stderr": Odd(before=lambda: os.closerange(0, 3)),
    "odd working folder": Odd(folder=NAME),
    "odd data and runs folders": Odd(data=f"{NAME}/rows.jsonl", runs=f"{NAME} too"),
    "path of 3,000 characters": Odd(folder="/".join(["d" * 230] * 13)),
    "unknown time zone": Odd({"TZ": "Nowhere/At_All"}),
    "time zone half a day ahead": Odd({"TZ": "XYZ-14:59"}),
    "no bytecode": Odd({"PYTHONDONTWRITEBYTECODE": "1"}),
    "no assertions": Odd({"PYTHONOPTIMIZE": "1"}),
    "warnings as errors": Odd({"PYTHONWARNINGS": "error"}),
    "another hash seed": Odd({"PYTHONHASHSEED": "4711"}),
    "no PATH": Odd({"PATH": None}),
    "64 open files": Odd(wrap=("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh")),
}
TOGETHER = {
    "private": (
        "umask 077",
        "odd working folder",
        "odd data and runs folders",
        "TMPDIR that is not there",
        "unknown time zone",
        "locale C",
        "closed stdin",
        "dumb terminal of 20 columns",
        "no bytecode",
    ),
    "bare": (
        "no HOME",
        "cache that may not be entered",
        "closed stdout",
        "umask 002",
        "path of 3,000 characters",
        "output in ASCII",
    ),
}


def together(*names):
    """One oddity of several; each says something that no other does."""
    odds = [ODDITIES[name] for name in names]
    steps = [odd.before for odd in odds if odd.before]
    chosen = {
        field: next((getattr(odd, field) for odd in odds if getattr(odd, field) != default), default)
        for field, default in Odd._field_defaults.items()
        if field in ("folder", "data", "runs", "wrap")
    }
    environ = {key: value for odd in odds for key, value in odd.environ.items()}
    return Odd(environ, before=lambda: [step() for step in steps], **chosen)


class Place:
    """A working folder of one oddity, with rows that no ASCII holds, beside a home of its own."""

    def __init__(self, top, odd):
        self.odd, self.top = odd, top
        self.here, self.home = top / "w" / odd.folder, top / "home"
        self.run = self.here / odd.runs / "r"
        for folder in (self.here, self.home):
            folder.mkdir(parents=True)
        for name, mode in (("readonly", 0o555), ("locked", 0o000)):
            (top / name).mkdir(mode=mode)
        for data in {self.here / odd.data, self.here / "rows.jsonl"}:
            data.parent.mkdir(parents=True, exist_ok=True)
            data.write_text(ROWS, encoding="utf-8")

    def environ(self):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLMTUNE_", "WANDB_", "XDG_"))}
        odd = {key: value and value.replace("{here}", str(self.here)) for key, value in self.odd.environ.items()}
        odd = {
            key: value and value.format(**{name: self.top / name for name in ("readonly", "locked")})
            for key, value in odd.items()
        }
        together = {**kept, "HOME": str(self.home), **odd}
        return {key: value for key, value in together.items() if value is not None}

    def start(self, *words):
        command = [*self.odd.wrap, sys.executable, "-m", "llmtune", *words]
        done = subprocess.run(
            command, cwd=self.here, env=self.environ(), stdin=subprocess.DEVNULL, capture_output=True, timeout=300,
            preexec_fn=self.odd.before, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")

    def works(self, *words):
        code, out, err = self.start(*words)
        assert code == 0, err
        assert "Traceback" not in out + err
        return out

    def training(self, *more):
        """The words of a short training."""
        keys = {
            "model.name": "custom-nano", "model.architecture.n_layers": 1, "training.max_steps": 2, "evaluation.every_steps": 1, "evaluation.max_new_tokens": 2,  # noqa: E501
            "data.test_size": 2, "data.train": self.odd.data, "run.output_dir": self.odd.runs, "run.name": "r",
        }  # fmt: skip
        return ("train", "--config", "test", *(f"{key}={value}" for key, value in keys.items()), *more)

    def train(self, *more):
        return self.works(*self.training(*more))


ROWS = "".join(
    json.dumps(
        {"prompt": f"Wie heißt {number}? 日本語 😀", "completion": f"«{number * number}» ça va 🚀"}, ensure_ascii=False
    )
    + "\n"
    for number in range(12)
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the others are compared with; nothing is odd here, so no new process is needed."""
    place = Place(tmp_path_factory.mktemp("plain"), Odd())

    def train():
        environ = place.environ()
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(place.here)
        return command(list(place.training()))

    child = Forked(train)
    said, _ = child.communicate(300)
    assert child.returncode == 0, said
    return place


def possible(place):
    """Skip where this machine does not let a process be so odd."""
    if (
        place.odd.wrap[:1] == ("unshare",)
        and subprocess.run([*place.odd.wrap[:2], "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this system lets no process have a view of its own")
    for name in ("readonly", "locked"):
        done = subprocess.run(
            ["touch", place.top / name / "x"], preexec_fn=let_modes_count, check=False, capture_output=True
        )
        if done.returncode == 0:
            pytest.skip("the modes of files do not count on this machine")


def assert_as_plain(place, plain, out):
    """The finished run is that of plain surroundings, what was asked of modes holds, and nothing lies where nothing
    may.
    """
    assert weights_of(place.run) == weights_of(plain.run)
    assert lines_of(place.run) == lines_of(plain.run)
    assert json.loads((place.run / "run.json").read_text())["state"] == "finished"
    assert place.odd.before or out.rstrip("\n").endswith(f"{place.odd.runs}/r"), out  # where a reader was
    for name in ("readonly", "locked"):
        assert list((place.top / name).iterdir()) == []
    assert not (place.here / "fired").exists()
    made = {one.name for one in place.here.iterdir()} - {"rows.jsonl", Path(place.odd.data).parts[0], place.odd.runs}
    assert made == set(), "something lies in the working folder"


def modes_below(*folders):
    found = {False: set(), True: set()}
    for folder in folders:
        for one in (folder, *folder.rglob("*")):
            if not one.is_symlink():
                found[one.is_dir()].add(stat.S_IMODE(one.stat().st_mode))
    return found


@LINUX
@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_q8_a_training_in_odd_surroundings_is_the_training_in_plain_ones(names, plain, tmp_path):
    place = Place(tmp_path, together(*names))
    possible(place)
    assert_as_plain(place, plain, place.train())
    mask = next((int(name.removeprefix("umask "), 8) for name in names if name.startswith("umask")), None)
    if mask is not None:  # P1: the folder of the runs, and what the user's cache got
        kept = [one for one in (place.home / ".cache",) if one.exists()]
        assert modes_below(place.run.parent, *kept) == {False: {0o666 & ~mask}, True: {0o777 & ~mask}}


@LINUX
@pytest.mark.campaign
@pytest.mark.parametrize("name", ODDITIES)
def test_q8_each_oddity_alone_changes_nothing_of_a_training_its_resume_and_its_answers(name, plain, tmp_path):
    place = Place(tmp_path, ODDITIES[name])
    possible(place)
    place.train("training.max_minutes=1e-6")
    assert json.loads((place.run / "run.json").read_text())["state"] == "stopped"
    run = f"./{place.odd.runs}/r"
    out = place.works("resume", run, "training.max_minutes=null", "--allow-changes")
    assert_as_plain(place, plain, out)
    answer = place.works("generate", run, *ASKED)
    if not any(word in name for word in ("stdout", "ASCII", "without UTF-8")):  # there it is not shown, or in escapes
        assert answer == asked(plain)


ASKED = ("How much is it?", "--max-new-tokens", "4", "--seed", "1")


@functools.cache
def asked(plain):
    return plain.works("generate", "runs/r", *ASKED)


def refused(*words, code, folder="here", top, before=None, environ=None, says):
    place = Place(top, Odd(environ or {}, folder=folder, before=before))
    ended, out, err = place.start(*words)
    assert ended == code, err
    assert err.count("error: ") == 1
    assert "Traceback" not in out + err
    for one in says:
        assert one in " ".join(err.split()), err
    with contextlib.suppress(FileNotFoundError):
        assert [one.name for one in place.here.iterdir()] == ["rows.jsonl"]


def leave_no_folder():
    os.mkdir("gone")  # noqa: PTH102
    os.chdir("gone")
    os.rmdir("../gone")  # noqa: PTH106


TRAIN = ("train", "--config", "test", "model.name=custom-nano")
ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "words",
    [
        TRAIN,
        ("resume",),
        ("data", "report", *TRAIN[1:]),
        ("data", "preview", *TRAIN[1:]),
        ("tokenizer", "train"),
        ("plan",),
        ("doctor",),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_q8_a_working_folder_that_was_deleted_is_one_line(words, tmp_path):
    """torch cannot be loaded there, and ends the process with words of its own."""
    says = ("the working folder cannot be entered: No such file or directory", "fix: go to a folder that exists")
    refused(*words, code=6, top=tmp_path, before=leave_no_folder, says=says)


def test_what_needs_no_folder_works_in_one_that_was_deleted(tmp_path):
    place = Place(tmp_path, Odd(before=leave_no_folder))
    assert "Usage" in place.works("--help")
    assert "learning_rate" in place.works("config", "show", "--config", "test")


def test_q8_words_that_are_no_text_are_refused_before_anything_is_read(tmp_path):
    """A file's name in Latin-1 would end up in config.yaml as something else, and no resume would find it."""
    says = (r"`data.train=gr\udcf6sse.jsonl` holds bytes that are not UTF-8", "where: command line")
    refused(
        *TRAIN,
        os.fsdecode(b"data.train=gr\xf6sse.jsonl"),
        code=2,
        top=tmp_path,
        environ={"LC_ALL": "C.UTF-8"},
        says=says,
    )


def test_q8_words_beyond_ascii_where_python_reads_only_ascii_name_the_switch(tmp_path):
    refused(
        *TRAIN,
        "data.train=größe.jsonl",
        code=2,
        top=tmp_path,
        environ=ASCII_ONLY,
        says=("bytes that are not ASCII", "PYTHONUTF8=1"),
    )


def test_q8_a_folder_beyond_ascii_where_python_reads_only_ascii_names_the_switch(tmp_path):
    says = ("the name of the working folder holds bytes that are not ASCII", "PYTHONUTF8=1")
    refused(*TRAIN, code=6, top=tmp_path, folder="größe", environ=ASCII_ONLY, says=says)


def test_q8_python_without_docstrings_is_refused_because_transformers_needs_its_own(tmp_path):
    refused(
        *TRAIN,
        code=6,
        top=tmp_path,
        environ={"PYTHONOPTIMIZE": "2"},
        says=("(-OO, PYTHONOPTIMIZE=2)", "PYTHONOPTIMIZE=1 are fine"),
    )
