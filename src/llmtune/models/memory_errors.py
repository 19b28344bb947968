"""What Python, torch and safetensors raise when memory is refused, told from their other errors."""

from __future__ import annotations

import errno
import re

import torch
from safetensors import SafetensorError

__all__ = ["MEMORY_ERRORS", "is_out_of_memory"]

MEMORY_ERRORS = (MemoryError, RuntimeError, OSError, SafetensorError)
"""What is raised when memory is refused, among other things: ask `is_out_of_memory`."""

_CPU_REFUSAL = re.compile(
    r"can't allocate memory|not enough memory|std::bad_alloc|Cannot allocate memory|could not create a memory object"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that this machine or its device had no memory to give."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, SafetensorError)) and bool(_CPU_REFUSAL.search(str(error)))
