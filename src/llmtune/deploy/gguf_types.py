"""The number types of a GGUF file: plain and quantized, encoded by the gguf package's own quantizers.

A quantized type stores each block of 32 neighbouring numbers of a row as small integers with a scale of their own. The
layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.

Legend: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["GGUF_TYPES", "GgufType", "gguf_type_of"]


@dataclass(frozen=True)
class GgufType:
    """A number type of GGUF."""

    name: str
    """As the gguf package spells it."""
    torch_dtype: torch.dtype
    """Type that a weight is rounded to before it is encoded; float32 for quantized types, which round it themselves."""
    file_type: int
    """`general.file_type` of a file whose matrices are mostly of this type, as llama.cpp numbers them."""
    block: int = 1
    """Numbers of a row that are encoded together."""
    block_bytes: int = 4

    @property
    def is_quantized(self) -> bool:
        """Whether its numbers share a scale, so that a matrix must fit its blocks."""
        return self.block > 1

    def size(self, shape: Sequence[int]) -> int:
        """Return the bytes of a weight of this shape.

        >>> GGUF_TYPES["q8_0"].size((2, 64)), GGUF_TYPES["f16"].size((2, 64))
        (136, 256)
        """
        return math.prod(shape) // self.block * self.block_bytes

    def encode(self, weight: Tensor) -> npt.NDArray[np.generic]:
        """Return the bytes of a weight [O, I] or [I], as numbers of one, two or four bytes.

        The layouts of blocks are ggml's: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
        """
        values = weight.to(torch.float32).contiguous().numpy()
        encoded: npt.NDArray[np.generic] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[self.name])
        return encoded

    def round(self, weight: Tensor) -> Tensor:
        """Return the numbers that a program reads from the encoded weight, float32 in its shape.

        rounded = decode(encode(weight)), by the rules of ggml that the gguf package has in Python.
        """
        values = gguf.quants.dequantize(self.encode(weight), gguf.GGMLQuantizationType[self.name])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(weight.shape)


def gguf_type_of(shape: Sequence[int], requested: GgufType) -> GgufType:
    """Return the type that a weight of this shape is written in.

    Vectors stay in float32, which llama.cpp requires. A matrix whose rows are no whole number of blocks stays in
    float16, as `llama-quantize` keeps it.

    >>> [gguf_type_of(shape, GGUF_TYPES["q4_0"]).name for shape in ((64,), (8, 64), (8, 48))]
    ['F32', 'Q4_0', 'F16']
    """
    if len(shape) == 1:
        return GGUF_TYPES["f32"]
    return GGUF_TYPES["f16"] if shape[-1] % requested.block else requested


GGUF_TYPES: dict[str, GgufType] = {
    "f32": GgufType("F32", torch.float32, 0, 1, 4),
    "f16": GgufType("F16", torch.float16, 1, 1, 2),
    "bf16": GgufType("BF16", torch.bfloat16, 32, 1, 2),
    "q8_0": GgufType("Q8_0", torch.float32, 7, 32, 34),
    "q5_1": GgufType("Q5_1", torch.float32, 9, 32, 24),
    "q5_0": GgufType("Q5_0", torch.float32, 8, 32, 22),
    "q4_1": GgufType("Q4_1", torch.float32, 3, 32, 20),
    "q4_0": GgufType("Q4_0", torch.float32, 2, 32, 18),
    "mxfp4": GgufType("MXFP4", torch.float32, 38, 32, 17),
}
"""Value of `--type` -> the number type."""
