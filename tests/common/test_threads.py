"""Threads that wait sleep soon, where nobody decided otherwise and torch is not loaded yet."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from llmtune.common.environment import LIMITS, OWN_SETTINGS, spinning_in_force
from training_helpers import Forked

SHOW = "import json, os; print(json.dumps({name: os.environ.get(name) for name in %r}))" % (OWN_SETTINGS,)  # noqa: UP031
DECISIONS = "from llmtune.common.environment import spinning_in_force; print([str(row) for row in spinning_in_force()])"
SHOW_AT = """
import sys
class Show:
    def find_spec(self, name, *_):
        if name == MODULE:
            sys.meta_path.remove(self)
            SHOW
            raise SystemExit(0)
sys.meta_path.insert(0, Show())
"""
ALL_LIMITED = {**dict.fromkeys(OWN_SETTINGS), **LIMITS}


def show_before(module):
    """Code that shows what is set when `module` is about to be imported, and ends there: torch takes seconds."""
    return SHOW_AT.replace("MODULE", repr(module)).replace("SHOW", f"{SHOW}; {DECISIONS}")


def output_of(code, **environment):
    """The last two lines (environment, decisions) that a new process prints after `code`."""
    plain = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{SHOW}\n{DECISIONS}"],
        capture_output=True, text=True, check=False, env=plain | environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shown, decisions = done.stdout.splitlines()[-2:]
    return json.loads(shown), decisions


@pytest.mark.parametrize(
    "code",
    [
        show_before("torch") + "from llmtune.cli.process import prepare_process; prepare_process(trains=True)",
        "from llmtune.cli.process import prepare_process; prepare_process()",
        show_before("torch") + "from llmtune import Trainer",
        show_before("torch") + "from llmtune.api import train",
    ],
    ids=["a command that trains", "a command that computes", "the package's names", "the API"],
)
def test_threads_of_a_process_that_computes_sleep_soon(code):
    environment, decisions = output_of(code)
    assert environment == ALL_LIMITED
    assert decisions.startswith("['process.threads = sleep soon while they wait: threads that spin")


@pytest.mark.parametrize(
    ("name", "value"),
    [("GOMP_SPINCOUNT", "5"), ("OMP_WAIT_POLICY", "active"), ("KMP_BLOCKTIME", "0"), ("KMP_LIBRARY", "turnaround")],
)
def test_what_the_user_has_set_of_waiting_threads_stands(name, value):
    environment, decisions = output_of(
        "from llmtune.cli.process import prepare_process; prepare_process()", **{name: value}
    )
    assert environment == {**dict.fromkeys(OWN_SETTINGS), name: value}
    assert decisions == "[]"


def test_nothing_is_set_where_torch_has_read_it_already():
    import llmtune.api

    def load_again():
        assert "torch" in sys.modules
        for name in OWN_SETTINGS:
            os.environ.pop(name, None)
        importlib.reload(llmtune.api)
        print(json.dumps({name: os.environ.get(name) for name in OWN_SETTINGS}))
        print([str(row) for row in spinning_in_force()])

    child = Forked(load_again)
    printed, _ = child.communicate(60)
    assert (child.returncode, printed) == (0, f"{json.dumps(dict.fromkeys(OWN_SETTINGS))}\n[]\n")


def test_importing_the_package_alone_sets_nothing():
    assert output_of("import llmtune")[0] == dict.fromkeys(OWN_SETTINGS)


def test_the_openmp_of_torch_reads_the_limit():
    """GNU's runtime prints what is in force when it is loaded; another one prints its own variables."""
    code = "import os; os.environ['OMP_DISPLAY_ENV'] = 'VERBOSE'; from llmtune.common.environment import limit_spinning; limit_spinning(); import torch"  # noqa: E501
    plain = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch does not use GNU's OpenMP")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
