"""MFU is reported where the peak is known, and nowhere else."""

import pytest
import torch

from llmtune.engine.devices import Devices
from llmtune.plan.hardware import PEAK_TFLOPS, flops_per_token, peak_flops_per_second, utilization


def test_every_listed_device_finds_its_own_rate():
    """No name hides behind a shorter one that comes first (H100 PCIe, L40S, A10G)."""
    assert {name: peak_flops_per_second(f"NVIDIA {name} 80GB") for name in PEAK_TFLOPS} == {
        name: peak * 1e12 for name, peak in PEAK_TFLOPS.items()
    }
    assert peak_flops_per_second("NVIDIA A100-SXM4-80GB") == 312e12


def test_a_cpu_has_no_mfu(bench):
    assert utilization(Devices(torch.device("cpu")), "bf16", total=10, trained=10) is None
    assert "mfu" not in bench.training(bench.model(), bench.plan(bench.examples(4), batch_size=4)).run()[0].metrics()


def test_frozen_weights_cost_no_gradient():
    assert flops_per_token(100, 100) == 600
    assert flops_per_token(100, 0) == 400


def test_a_known_peak_puts_mfu_into_the_line(bench):
    training = bench.training(
        bench.model(),
        bench.plan(bench.examples(4), batch_size=4),
        mfu=lambda tokens_per_second: tokens_per_second / 1e9,
    )
    line = training.run()[0].metrics()
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] / 1e9)
