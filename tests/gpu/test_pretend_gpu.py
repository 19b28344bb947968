"""The CUDA path on a pretend GPU: what has to be loaded before torch runs as tests of a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(FOLDER))
from pretend.library import compiler  # noqa: E402 - its folder has just been added

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the pretend GPU with")


def run(*arguments: str, card: str = "none", timeout_s: int = 900, **environment: str) -> subprocess.CompletedProcess:
    """Run Python's `arguments` in a process that has a GPU, as far as torch can tell."""
    paths = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "pretend", "--card", card, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def passed(*arguments: str, card: str = "none") -> int:
    """Run pytest there; returns how many tests passed, and fails with its report where one did not."""
    done = run("-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", *arguments, card=card)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout + " 0 passed")[1])


def test_the_laws_of_the_gpu_path_hold_on_the_pretend_gpu():
    assert passed("tests/gpu/laws", "-o", "addopts=", "-m", "not campaign") >= 12


@pytest.mark.campaign
def test_they_hold_for_every_family_card_and_variant():
    assert passed("tests/gpu/laws", "-o", "addopts=", "-m", "campaign") >= 20
