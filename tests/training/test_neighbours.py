"""Processes of one machine share its memory and cores in plan and computation, and no GPU, whatever started them."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llmtune.cli.main import run as command
from llmtune.common.environment import available_cores
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.engine.choose_device import choose_device
from llmtune.engine.devices import Devices, open_devices
from llmtune.errors import MachineError
from llmtune.evaluation import inference_model
from llmtune.plan.hardware import find_target
from rank_helpers import in_two_ranks
from training_helpers import small_run

several_cores = pytest.mark.skipif(available_cores() < 2, reason="one core has one share")


@pytest.mark.parametrize(("said", "shared"), [(None, 2), ("4", 4)])
def test_the_plan_counts_the_processes_of_a_machine_where_the_launcher_does_not(
    tiny_model_folder, rows_file, tmp_path, said, shared
):
    words = small_run(tiny_model_folder, rows_file, tmp_path, "training.max_steps=2", "distributed.timeout_s=20")

    def plan():
        if said is not None:
            os.environ["LOCAL_WORLD_SIZE"] = said
        return command(["train", "--dry-run", *words])

    codes, printed = in_two_ranks(plan)
    assert codes == [0, 0], "\n".join(printed)
    assert f"on this CPU, shared by {shared} processes" in printed[0], printed[0]


@several_cores
@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("said", [None, "7"])
def test_processes_that_run_on_the_same_cores_share_them(is_bound, said):
    """Those that a scheduler has bound to cores of their own keep them all, and OMP_NUM_THREADS stands."""

    def meet():
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        if is_bound:
            os.sched_setaffinity(0, cores[:half] if os.environ["RANK"] == "0" else cores[half : 2 * half])
        os.environ.pop("OMP_NUM_THREADS")  # which the launchers of these tests set
        if said is not None:
            os.environ["OMP_NUM_THREADS"] = said
        torch.set_num_threads(int(said or available_cores()))
        config = load_config(None, overrides=["distributed.timeout_s=20"], environ={}).config
        devices, decisions = open_devices(config, Options(no_cuda=True))
        assert torch.get_num_threads() == int(said or half)
        divided = [str(one) for one in decisions if one.key == "process.num_threads"]
        expected = f"process.num_threads = {half}: 2 processes run on the same {len(cores)} cores"
        assert [one.startswith(expected) for one in divided] == ([] if is_bound or said else [True])
        devices.close(wait_for_main=True)

    codes, printed = in_two_ranks(meet)
    assert codes == [0, 0], "\n".join(printed)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as torch shows them; `gpus(1)`: one."""

    def show(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    for name, answer in {
        "is_available": lambda: True,
        "get_arch_list": list,
        "get_device_capability": lambda _device: (9, 0),
        "get_device_name": lambda _device: "a card",
        "set_device": lambda _device: None,
        "is_bf16_supported": lambda **_: True,
        "memory_reserved": lambda _device: 0,
        "get_device_properties": lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    show(2)
    return show


def test_every_part_of_a_process_takes_the_gpu_of_its_local_rank(gpus, monkeypatch):
    """A model that is loaded to give rewards, and the plan, which would open a context on the first GPU."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    asked = []

    def load(_name, device, **_):
        asked.append(str(device))
        raise MachineError("enough")

    monkeypatch.setattr(inference_model, "_load_published", load)
    with pytest.raises(MachineError, match="enough"):
        inference_model.load_inference_model("custom-nano")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(str(device)) or (1, 2))
    find_target(None)
    assert asked == ["cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("count", "local_rank", "device"), [(2, None, 0), (2, "1", 1), (2, "2", None), (1, "0", 0), (1, "3", 0)]
)
def test_a_process_takes_the_only_gpu_that_it_sees(gpus, count, local_rank, device):
    """A scheduler shows each process its own, which is the first for it; one beyond several is refused."""
    gpus(count)
    environ = {} if local_rank is None else {"LOCAL_RANK": local_rank}
    if device is None:
        with pytest.raises(MachineError, match=f"process {local_rank} of this machine has no GPU: there are {count}"):
            choose_device(environ=environ)
    else:
        assert choose_device(environ=environ)[0].index == device


def test_two_processes_that_see_the_same_gpu_are_refused_once_and_others_are_not(gpus):
    def meet():
        dist.init_process_group("gloo")  # nccl is not there
        devices = Devices.from_environment(timeout_s=20)
        devices.close(wait_for_main=True)

    codes, printed = in_two_ranks(meet)
    assert codes == [0, 0], "\n".join(printed)
    gpus(1)

    def train():
        dist.init_process_group("gloo")
        return command(["train", "--config", "test", "distributed.timeout_s=20"])

    codes, printed = in_two_ranks(train)
    assert codes == [MachineError.exit_code] * 2, "\n".join(printed)
    assert "\n".join(printed).count("2 processes of") == 1, "\n".join(printed)
    assert "have the same GPU" in printed[0]
