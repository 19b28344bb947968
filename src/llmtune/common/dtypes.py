"""The names of number types: in configs, in torch and in safetensors files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["SAFETENSORS_NAMES", "torch_dtype"]

SAFETENSORS_NAMES: dict[str, str] = {  # in the order in which the library lays tensors out
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's name of a type -> the name in a safetensors header."""

_TORCH_NAMES = {short: name for name, short in SAFETENSORS_NAMES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's type of a name: torch's own (`bfloat16`) or that of safetensors (`BF16`).

    Raises KeyError for any other name.
    """
    import torch  # only here: configs and file headers are read without torch

    name = _TORCH_NAMES.get(name, name)
    if name not in SAFETENSORS_NAMES:
        raise KeyError(name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype
