"""Memory that was refused, told from other errors; and copies to a device from page-locked memory.

Only such a copy runs beside the work of a GPU; from pageable memory the program waits for it.
"""

from __future__ import annotations

import errno
import re

import torch
from safetensors import SafetensorError

__all__ = ["MEMORY_ERRORS", "copy_to", "is_out_of_memory", "page_locked"]

MEMORY_ERRORS = (MemoryError, RuntimeError, OSError, SafetensorError)
"""Types of the errors that refused memory raises; `is_out_of_memory` tells those from others of the same type."""

# Beside torch.OutOfMemoryError there are RuntimeErrors that only their text tells: of the CPU's allocator, of
# page-locked memory, and of CUDA's libraries, which allocate by themselves.
_REFUSAL = re.compile(
    r"can't allocate memory|not enough memory|std::bad_alloc|Cannot allocate memory|could not create a memory object"
    r"|CUDA error: out of memory|cudaErrorMemoryAllocation|CUDA driver error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the machine or its device had no memory left.

    >>> is_out_of_memory(OSError(errno.ENOMEM, "")), is_out_of_memory(RuntimeError("shape mismatch"))
    (True, False)
    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, SafetensorError)) and bool(_REFUSAL.search(str(error)))


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
