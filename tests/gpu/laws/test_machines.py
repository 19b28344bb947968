"""What is said of a GPU that torch cannot use, of its arithmetic, and of what it holds."""

import os
import re
from pathlib import Path

import pytest
import torch
from pretend import machine, numbers

from llmtune.config.schema import Config, TrainingConfig
from llmtune.engine import choose_device as devices
from llmtune.engine.allocator import grow_segments, has_expandable_segments
from llmtune.engine.choose_device import CUDA_CONTEXT_BYTES, choose_device, peak_memory_bytes
from llmtune.engine.devices import Devices
from llmtune.engine.precision import choose_precision, without_tf32
from llmtune.errors import MachineError
from llmtune.plan.hardware import find_target
from llmtune.training.build import _set_up_process

DETERMINISTIC = Config(training=TrainingConfig(deterministic=True))


def test_a_card_for_which_torch_holds_no_code_is_named_with_the_fix():
    """Every operation would fail with `no kernel image is available`, told as a broken file."""
    with numbers.machine("v100"), pytest.raises(MachineError) as refused:
        choose_device()
    text = str(refused.value)
    assert "Tesla V100" in text
    assert "sm_70" in text
    assert "--no-cuda" in text


@pytest.mark.parametrize("card", ["t4", "rtx3090", "rtx4090", "a100-80", "h100"])
def test_a_card_for_which_it_holds_code_is_taken(card):
    with numbers.machine(card):
        assert choose_device()[0] == torch.device("cuda", 0)


@pytest.fixture
def gpu_out_of_reach(monkeypatch):
    """A machine with a GPU that torch does not see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_torch_without_cuda_beside_a_gpu_is_never_a_silent_run_on_the_cpu(gpu_out_of_reach, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(MachineError, match="built without CUDA") as refused:
        choose_device()
    assert "pip install" in str(refused.value)
    assert choose_device(no_cuda=True)[0].type == "cpu"


def test_a_driver_too_old_for_torch_is_named_with_the_one_it_needs(gpu_out_of_reach, monkeypatch, tmp_path):
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n")
    monkeypatch.setattr(devices, "DRIVER_FILE", file)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(MachineError, match=re.escape("driver 550.54.14 is too old")) as refused:
        choose_device()
    assert "580" in str(refused.value)


def test_a_gpu_hidden_on_purpose_is_no_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "WSL_LIBRARY", Path("/"))  # there
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device()[0].type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(MachineError):
        choose_device()


def test_a_t4_takes_fp16_for_adapters_and_nothing_takes_emulated_bf16():
    with numbers.machine("t4"):
        device = torch.device("cuda", 0)
        assert choose_precision(device, has_adapter=True).value == "fp16"
        assert choose_precision(device).value == "fp32"
        assert not find_target(None).has_bf16
    with numbers.machine("rtx3090"):
        assert choose_precision(device, has_adapter=True).value == "bf16"


def test_products_in_fp32_keep_their_bits_and_that_is_said():
    said = {}
    for card in ("t4", "rtx3090"):
        with numbers.machine(card):
            device = torch.device("cuda", 0)
            said[card] = [len(without_tf32(device, precision)) for precision in ("fp32", "bf16")]
    assert said == {"t4": [0, 0], "rtx3090": [1, 0]}, "before Ampere there is no TF32"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def settings_of_torch(monkeypatch):
    """What `training.deterministic` sets is set back afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_n13_deterministic_takes_kernels_of_a_fixed_order_and_changes_no_number(
    train_on, undisturbed, settings_of_torch
):
    on_cpu = _set_up_process(DETERMINISTIC, Devices(torch.device("cpu")), is_sharded=False)[0]
    assert (on_cpu.key, on_cpu.value) == ("training.deterministic", True)
    assert not torch.are_deterministic_algorithms_enabled(), "sums on a CPU have a fixed order in any case"
    with numbers.machine():
        on_gpu = _set_up_process(DETERMINISTIC, Devices(torch.device("cuda", 0)), is_sharded=False)[0]
    assert "fixed order" in on_gpu.reason
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_deterministic_leaves_everything_as_it_was_where_it_is_not_asked_for(settings_of_torch):
    with numbers.machine():
        decisions = _set_up_process(Config(), Devices(torch.device("cuda", 0)), is_sharded=False)
    assert "training.deterministic" not in {decision.key for decision in decisions}
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_what_a_gpu_held_is_counted_with_the_driver_s_share():
    with numbers.machine() as device:
        held = torch.zeros(1 << 20, device="cuda")
        assert peak_memory_bytes(torch.device("cuda", 0)) == device.peak + CUDA_CONTEXT_BYTES
        assert device.peak >= held.numel() * 4
        assert machine.CONTEXT_BYTES == CUDA_CONTEXT_BYTES


def test_segments_grow_but_in_windows_and_where_the_user_said_otherwise(monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

    def setting(release, **given):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("platform.release", lambda: release)
        grow_segments()
        return os.environ.get("PYTORCH_ALLOC_CONF"), has_expandable_segments()

    assert setting("6.8.0-generic") == ("expandable_segments:True", True)
    assert setting("5.15.167.4-microsoft-standard-WSL2") == (None, False)
    assert setting("6.8.0-generic", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:128") == (None, False)
    monkeypatch.undo()
