"""The allocator settings are taken by this system and keep a block that is used again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from llmtune.training.memory import tune_allocator
if sys.argv[1] == "tuned":
    assert tune_allocator().value == "keeps freed memory"
assert "torch" not in sys.modules
block = bytes(1)
def touch():
    bytearray(64 << 20)[:: 4096]
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux only")
def test_a_large_block_is_made_of_fresh_pages_once_and_not_at_every_use() -> None:
    faults = {
        kind: int(subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("tuned", "plain")
    }
    assert faults["plain"] > 5 * 8_000
    assert faults["tuned"] < 1_000
