"""What a process that computes sets up first."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.engine.allocator import NO_THREAD_CACHES, TUNABLES

WATCH = """
import json, os, sys
with open(os.environ["STARTS"], "a") as file:
    print(json.dumps([os.getpid(), sys.orig_argv[1:], os.environ.get("GLIBC_TUNABLES", "")]), file=file)
if "FORGET" in os.environ:
    os.environ.pop("GLIBC_TUNABLES", None)
"""
"""A `sitecustomize` that writes down each start of Python."""

with_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these caches")


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_libraries_objects_are_out_of_the_collectors_sight_and_all_made_later_are_not():
    in_a_new_process("""
import gc, sys
from llmtune.cli.process import prepare_process
prepare_process(trains=True)
assert "transformers.modeling_layers" in sys.modules and "torch" in sys.modules
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 200_000, frozen
class Circle: pass
made = [Circle() for _ in range(9)]
for one in made: one.itself = one
del made, one
prepare_process(trains=True)
assert gc.get_freeze_count() == frozen, "garbage of a process that goes on would stay for good"
assert gc.collect() >= 9
""")


def test_libraries_that_are_there_already_are_left_to_the_collector():
    in_a_new_process("""
import gc, transformers.modeling_layers
from llmtune.cli.process import prepare_process
prepare_process(trains=True)
assert gc.get_freeze_count() == 0
""")


def test_a_command_that_trains_nothing_imports_what_it_needs_itself():
    """A merge is refused without waiting for libraries that it may not come to need, and its promised peak has no part
    for them.
    """
    in_a_new_process("""
import gc, sys
from llmtune.cli.process import prepare_process
prepare_process()
assert "transformers" not in sys.modules and gc.get_freeze_count() == 0
""")


@pytest.fixture
def starts_of(tmp_path):
    """Run a command; returns what it printed, and pid, arguments and tunables of each start of Python that it took."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)

    def run(command, **more):
        said = tmp_path / "starts"
        said.write_text("")
        without = {name: value for name, value in os.environ.items() if name not in (TUNABLES, "LD_PRELOAD")}
        path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
        environment = {**without, "PYTHONPATH": path, "STARTS": str(said), **more}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout, [json.loads(line) for line in said.read_text().splitlines()]

    return run


def as_module(*words):
    return [sys.executable, "-m", "llmtune", *words]


@with_glibc
@pytest.mark.parametrize("command", ["train", "resume", "plan"])
@pytest.mark.parametrize("program", ["module", "script"])
def test_a_command_that_trains_or_plans_starts_once_more_without_the_allocators_thread_caches(
    starts_of, program, command
):
    script = shutil.which("llmtune", path=str(Path(sys.executable).parent))
    words = ["--debug", command, "--help"]
    out, starts = starts_of(as_module(*words) if program == "module" else [script, *words])
    assert out.count("Usage: ") == 1, "the first start says nothing"
    (pid, arguments, before), (same_pid, same_arguments, after) = starts
    assert (same_pid, same_arguments) == (pid, arguments)
    assert arguments[-3:] == words
    assert (before, after) == ("", NO_THREAD_CACHES)


@with_glibc
@pytest.mark.parametrize(
    ("given", "starts", "in_force"),
    [
        ({TUNABLES: "glibc.malloc.arena_max=2"}, 2, f"glibc.malloc.arena_max=2:{NO_THREAD_CACHES}"),
        ({TUNABLES: "glibc.malloc.tcache_count=3"}, 1, "glibc.malloc.tcache_count=3"),
        ({TUNABLES: NO_THREAD_CACHES}, 1, NO_THREAD_CACHES),
        ({"LD_PRELOAD": "libtcmalloc_that_is_not_there.so"}, 1, ""),
    ],
    ids=["another tunable", "caches the user wants", "done already", "another allocator"],
)
def test_what_the_user_has_set_of_the_allocator_stands(starts_of, tmp_path, given, starts, in_force):
    if "LD_PRELOAD" in given:  # a name that is not found is a message of the loader's
        (tmp_path / "tcmalloc.so").symlink_to(the_c_library())
        given = {"LD_PRELOAD": str(tmp_path / "tcmalloc.so")}
    _, found = starts_of(as_module("train", "--help"), **given)
    assert len(found) == starts
    assert found[-1][2] == in_force


@with_glibc
def test_a_system_that_takes_the_setting_away_is_not_asked_again_and_again(starts_of):
    """As the loader does for a Python with capabilities of its own."""
    _, starts = starts_of(as_module("train", "--help"), FORGET="1")
    assert [in_force for _, _, in_force in starts] == ["", NO_THREAD_CACHES]


def the_c_library():
    return next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/libc." in line or "/libc-" in line
    )


@with_glibc
@pytest.mark.parametrize(
    "command",
    [
        as_module("list-models", "--help"),
        as_module("verify", "resume", "--help"),
        [sys.executable, "-c", "from llmtune.cli.main import main; main(['train', '--help'])"],
    ],
    ids=["list-models", "verify resume", "another program"],
)
def test_what_trains_nothing_itself_or_is_another_program_is_not_started_again(starts_of, command):
    out, starts = starts_of(command)
    assert "Usage: " in out
    assert len(starts) == 1


@with_glibc
@pytest.mark.parametrize(
    ("tunables", "expected"), [("", "apart"), (NO_THREAD_CACHES, "one gap")], ids=["as found", "without caches"]
)
def test_neighbours_that_are_freed_are_one_gap_only_without_thread_caches(tunables, expected):
    """What the restart is for.

    Before a block of glibc's stand the size of a gap that ends there, and its own with a bit that denies it.
    """
    code = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
blocks = [libc.malloc(1000) for _ in range(300)]
first, second, third = next(three for three in zip(blocks[200:], blocks[201:], blocks[202:]) if three[2] - three[1] == three[1] - three[0])
before_third = (ctypes.c_size_t * 2).from_address(third - 16)
libc.free(first)
libc.free(second)
gap, own = before_third
print("one gap" if not own & 1 and gap >= 2 * 1008 else "apart")
"""  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, TUNABLES: tunables}
    )
    assert done.stdout.strip() == expected
