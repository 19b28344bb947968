"""What a process that computes sets up first."""

import gc
import subprocess
import sys

import pytest

from llmtune.cli.main import main
from llmtune.cli.process import prepare_process
from training_helpers import Forked


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
    import transformers.modeling_layers  # noqa: F401

    def prepare():
        assert "transformers.modeling_layers" in sys.modules
        gc.unfreeze()  # what the tests have frozen
        prepare_process(trains=True)
        assert gc.get_freeze_count() == 0

    child = Forked(prepare)
    printed, _ = child.communicate(60)
    assert (child.returncode, printed) == (0, "")


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


@pytest.mark.parametrize("words", [["list-models"], ["runs"], ["doctor"], ["gpu-monitor", "--once"], ["docs"]])
def test_a_command_whose_streams_the_shell_has_closed_does_its_work(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        main(words)
    opened = [sys.stdin, sys.stdout, sys.stderr]
    monkeypatch.undo()
    assert end.value.code == 0
    for stream in opened:
        stream.close()
