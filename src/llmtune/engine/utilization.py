"""Model FLOPs utilization (MFU, arXiv:2204.02311, appendix B): the used share of a device's peak arithmetic rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmtune.engine.devices import Devices
from llmtune.engine.precision import PrecisionName

__all__ = ["PEAK_TFLOPS", "flops_per_token", "peak_flops_per_second", "utilization"]

PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 6000 Ada": 364,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
}
"""Dense bf16/fp16 matrix rate with fp32 accumulation, 10^12 operations per second, by a part of the device's name; the
first match counts. From the makers' data sheets, without sparsity."""


def flops_per_token(total: int, trained: int) -> float:
    """Give the floating-point operations of one token: 4 per parameter, and 2 more per trained one.

    A multiply-add counts as 2: one forward and one backward for each parameter, one more for each trained parameter.
    `total`: parameters that take part in matrix multiplications (an embedding that is only looked up does not).
    Attention between tokens is left out.

    >>> flops_per_token(1000, 1000), flops_per_token(1000, 10)
    (6000.0, 4020.0)
    """
    return 4.0 * total + 2.0 * trained


def peak_flops_per_second(device_name: str) -> float | None:
    """Give a GPU's peak rate by its name, or None where it is not known.

    >>> peak_flops_per_second("NVIDIA H200"), peak_flops_per_second("AMD EPYC")
    (989000000000000.0, None)
    """
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def utilization(
    devices: Devices, precision: PrecisionName, *, total: int, trained: int
) -> Callable[[float], float] | None:
    """Give the function from tokens per second (over all devices) to MFU.

    None where no peak is known: a CPU, an unlisted GPU, fp32.
    """
    if devices.device.type != "cuda" or precision == "fp32":
        return None
    peak = peak_flops_per_second(torch.cuda.get_device_name(devices.device))
    if peak is None:
        return None
    per_token = flops_per_token(total, trained)
    # The rate is that of all devices together, so their peaks add up.
    return lambda tokens_per_second: tokens_per_second * per_token / (peak * devices.world_size)
