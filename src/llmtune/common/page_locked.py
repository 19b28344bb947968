"""Copies from the host to a device, from page-locked memory where the system gives any.

Only such a copy runs beside the work of a GPU; from pageable memory the program waits for it.
"""

from __future__ import annotations

import torch

from llmtune.common.memory_errors import is_out_of_memory

__all__ = ["copy_to", "page_locked"]


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers in page-locked memory, of the tensor's shape.

    The tensor itself where the system refuses such memory: WSL2 gives 1 to 2 GB to all programs together.
    """
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return tensor


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to `device`, in its shape, without waiting for it; itself where it is there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = page_locked(tensor)
    return tensor.to(device, non_blocking=True)
