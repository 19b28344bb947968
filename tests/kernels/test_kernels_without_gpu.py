"""A GPU's kernels without a GPU: their numbers by Triton's interpreter, and that they compile for every card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.kernels.liger import is_installed

SCRIPT = Path(__file__).with_name("kernels_trial.py")
MISSING = "liger-kernel and triton are not installed here: pip install 'llmtune[gpu]' (on Linux) and run this again"
pytestmark = [pytest.mark.campaign, pytest.mark.skipif(not is_installed(), reason=MISSING)]


def trial(what, folder):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), what],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_n15_each_kernel_computes_what_torch_does(tmp_path):
    found = trial("interpret", tmp_path)
    assert len(found) == 4
    assert {name: apart for name, apart in found.items() if not apart < 2e-6} == {}


def test_n15_a_model_has_the_library_s_loss_and_gradients_with_each_kernel_and_with_all(tmp_path):
    found = trial("model", tmp_path)
    assert len(found) == 9
    assert {name: apart for name, apart in found.items() if not (apart[0] < 1e-6 and apart[1] < 1e-5)} == {}


def test_each_kernel_compiles_for_every_card_within_its_shared_memory(tmp_path):
    found = trial("compile", tmp_path)
    assert len(found) == 7 * 7
    assert {name: both for name, both in found.items() if both[0] > both[1]} == {}
