"""The fault loop of the promises' method for whole commands: every file operation of a story killed or refused, each in
a forked child.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from disk_faults import Counting, Failing, Killing, Unsynced
from llmtune import durable
from llmtune.verify.subprocesses import run_forked

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "short write": None}
EVERY_FAULT = [(fault, for_ever) for fault in FAULTS for for_ever in (False, True)]


@contextlib.contextmanager
def in_memory(otherwise):
    """A scratch folder in memory where the machine has such a place: thousands of files are made and deleted."""
    place = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=place)) if os.access(place, os.W_OK) else otherwise / "scratch"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def count_operations(story, scratch):
    """How many file operations the story makes when nothing goes wrong."""
    answer = scratch / "count"

    def counted():
        with durable.use_backend(Counting(Unsynced())) as counting:
            story()
        answer.write_text(str(counting.count))

    end = run_forked(counted)
    assert end.code == 0, end.error
    return int(answer.read_text())


def killed_at(story, at):
    """Run the story in a child that SIGKILL ends at operation `at`."""

    def dying():
        with durable.use_backend(Killing(at, for_real=True, below=Unsynced())):
            story()

    end = run_forked(dying)
    assert end.code == -9, f"not killed at operation {at}: {end}"


def refused_at(story, at, fault, *, for_ever):
    """Run the story in a child whose operation `at` (and all later ones) the system refuses; returns how it ended."""

    def refused():
        with durable.use_backend(Failing(at, FAULTS[fault], for_ever=for_ever, below=Unsynced())):
            story()

    return run_forked(refused)


def undisturbed(story):
    """Run the story in a child, unsynced; it must end well."""

    def well():
        with durable.use_backend(Unsynced()):
            story()

    end = run_forked(well)
    assert end.code == 0, end.error


def assert_one_message(end, fault):
    """The refusal is one problem with its cause, place and fix, and exit code 6."""
    assert end.code == 6, (end.code, end.error)
    assert f"({fault})" in end.error
    assert end.error.count("fix:") == 1, end.error


def litter_in(folder):
    """What of unfinished work lies anywhere below the folder."""
    return [name for _, folders, files in os.walk(folder) for name in (*folders, *files) if name.startswith(".llmtune")]
