"""N2: two processes are one process, whatever falls to each of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune.engine.devices import Devices, choose_device, peak_memory_bytes
from llmtune.errors import MachineError

WORKER = Path(__file__).with_name("rank_worker.py")


def start(output, **environment):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(output)], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Trains as one process and, at the same time, as two."""
    output = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [start(output), *(start(output, **together, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2))]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(errors)
    return output


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_two_processes_are_one(bench, outputs, packing):
    """N2: losses, norms and weights within 1e-6, with unequal tokens on the ranks and windows in which a rank has no
    row.
    """
    alone = json.loads((outputs / f"{packing}-1-0.json").read_text())
    ranks = [json.loads((outputs / f"{packing}-2-{rank}.json").read_text()) for rank in range(2)]
    shares = list(zip(ranks[0]["shares"], ranks[1]["shares"], strict=True))
    assert [sum(share) for share in shares] == alone["shares"]
    assert packing != "none" or any(0 in share for share in shares)
    assert ranks[0]["lines"] == ranks[1]["lines"]
    for ours, theirs in zip(ranks[0]["lines"], alone["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
        assert [ours[key] for key in ("tokens", "weight", "rows")] == [
            theirs[key] for key in ("tokens", "weight", "rows")
        ]
    weights = [load_file(outputs / f"{packing}-2-{rank}.safetensors") for rank in range(2)]
    whole = load_file(outputs / f"{packing}-1-0.safetensors")
    assert bench.same_bits(weights[0], weights[1])
    assert bench.relative_difference(weights[0], whole) < 1e-6
    assert (whole["unused"] == 1).all()
    assert (weights[0]["unused"] == 1).all()


def test_a_launcher_that_sets_half_the_environment_is_refused():
    with pytest.raises(MachineError, match="WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is not set"):
        Devices.from_environment(no_cuda=True, timeout_s=1, environ={"WORLD_SIZE": "2", "RANK": "0"})


def test_a_single_process_sums_nothing():
    devices = Devices.from_environment(no_cuda=True, timeout_s=1, environ={})
    assert (devices.rank, devices.world_size, devices.is_main) == (0, 1, True)
    assert devices.sum(0.1, 3) == (0.1, 3)
    value = torch.tensor([0.5])
    assert devices.sum_tensor(value) is value
    assert devices.gather_rows(value).tolist() == [[0.5]]


def test_the_device_is_chosen_with_a_reason():
    device, decision = choose_device(no_cuda=True)
    assert (device.type, decision.value, decision.reason) == ("cpu", "cpu", "--no-cuda was given")


def test_a_process_without_a_gpu_beside_others_that_have_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MachineError, match="process 2 of this machine has no GPU: there are 2"):
        choose_device(local_rank=2)


def test_peak_memory_never_falls():
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(50_000_000 // 4)
    assert peak_memory_bytes(torch.device("cpu")) >= before >= block.numel()
