"""The settings of memory are taken by this system: a block is used again and again, and kernels do not pile up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options
from llmtune.engine import allocator
from llmtune.engine.allocator import KERNEL_CACHES, bound_kernel_caches
from llmtune.engine.devices import open_devices
from llmtune.prepare import prepare
from llmtune.training.build import build_setup
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import in_child, small_run

FAULTS = """
import resource, sys
from llmtune.engine.allocator import LEAN_LARGEST_BLOCK, tune_allocator
if sys.argv[1] != "plain":
    assert tune_allocator().value == "keeps freed memory"
if sys.argv[1] == "lean":
    assert tune_allocator(largest_block=LEAN_LARGEST_BLOCK).value == "keeps freed blocks up to 32 MiB"
assert "torch" not in sys.modules
block = bytes(1)
def touch():
    bytearray(int(sys.argv[2]) << 20)[:: 4096]
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kind: str, mebibytes: int) -> int:
    """Pages that five uses of a block needed anew."""
    command = [sys.executable, "-c", FAULTS, kind, str(mebibytes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux only")
def test_a_large_block_is_made_of_fresh_pages_once_and_not_at_every_use() -> None:
    assert faults("plain", 64) > 5 * 8_000
    assert faults("tuned", 64) < 1_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux only")
def test_a_run_that_recomputes_its_blocks_returns_large_blocks_and_keeps_the_others() -> None:
    assert faults("lean", 64) > 5 * 8_000
    assert faults("lean", 30) < 1_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux only")
@pytest.mark.parametrize(("recompute", "said"), [("true", ["keeps freed blocks up to 32 MiB"]), ("false", [])])
def test_a_run_whose_blocks_are_computed_again_says_which_freed_blocks_it_keeps(
    config_of: Callable[..., ResolvedConfig],  # noqa: F811
    tmp_path: Path,
    recompute: str,
    said: list[str],
) -> None:
    """Q8. In a child, because the setting stays with the process."""
    options = Options(no_cuda=True, offline=True)
    given = (f"model.gradient_checkpointing={recompute}", "training.weight_decay=0")
    prepared = prepare(config_of(*given), options)

    def write_what_is_said() -> None:
        allocator._tuned.clear()  # another test may have run a command in this process
        decisions = build_setup(prepared, options, open_devices(prepared.config, options)[0]).decisions
        (tmp_path / "said").write_text(json.dumps([one.value for one in decisions if one.key == "process.allocator"]))

    assert in_child(write_what_is_said) == 0
    assert json.loads((tmp_path / "said").read_text()) == said


KERNELS = """
import ctypes, os, sys
import torch

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "a", "b", "c", "mapped", "d", "e", "used", "free", "top")]

read = ctypes.CDLL(None).mallinfo2
read.restype = Heap
native = torch.cpu.get_capabilities().get("avx512_bf16")
outputs, inputs = (1536, 576) if native else (96, 64)  # products of that size take minutes where bf16 is emulated

def set_up(kind, words):
    if kind == "bounded":
        from llmtune.engine.allocator import bound_kernel_caches
        bound_kernel_caches()
    if kind == "api":
        from llmtune.api import Trainer
        from llmtune.config.layers import load_config
        run = load_config(None, overrides=words, environ={})
        trainer = Trainer(run, no_cuda=True, print_line=lambda line: None)
        assert trainer.session.state.step == 0
        return trainer

def used_after(lengths, weight):
    for length in lengths:
        torch.nn.functional.linear(torch.ones(length, inputs, dtype=torch.bfloat16), weight)
    return read().used + read().mapped

kinds, *words = sys.argv[1:]
for kind in kinds.split(","):  # each in a process of its own, since a cache reads its limit with the first kernel
    if os.fork() == 0:
        kept = set_up(kind, words)
        weight = torch.ones(outputs, inputs, dtype=torch.bfloat16)
        before = used_after(range(100, 240), weight)
        print(kind, used_after(range(240, 340), weight) - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, kind
"""


@pytest.mark.skipif(sys.platform != "linux", reason="read from glibc's allocator")
def test_ever_new_lengths_of_rows_use_no_more_memory(tiny_model_folder: Path, rows_file: Path, tmp_path: Path) -> None:  # noqa: F811
    """Q7: a longer run needs no more memory, by the command or the API.

    100 new lengths of one product keep 61 MB without the bound, and 1 MB with it (measured with avx512_bf16).
    """
    import torch

    native = torch.cpu.get_capabilities().get("avx512_bf16")  # elsewhere the kernels may be others, and smaller
    unbounded = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    run = small_run(tiny_model_folder, rows_file, tmp_path)
    kinds = ("bounded", "api", *(["free"] if native else []))
    command = [sys.executable, "-c", KERNELS, ",".join(kinds), *run]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=unbounded).stdout
    grown = {kind: int(number) for kind, number in map(str.split, printed.splitlines())}
    assert grown["bounded"] < 10e6
    assert grown["api"] < 10e6
    if native:
        assert grown["free"] > 4 * max(grown["bounded"], 5e6)


def test_a_limit_that_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    bound_kernel_caches()
    assert {name: os.environ[name] for name in KERNEL_CACHES} == KERNEL_CACHES
    first = next(iter(KERNEL_CACHES))
    monkeypatch.setenv(first, "7")
    bound_kernel_caches()
    assert os.environ[first] == "7"
