"""The arithmetic of a merge: one weight at a time, in float64, rounded once to the type it is written in.

Legend: O outputs and I inputs of a layer, R rank. Matrices are taken as [O, I]; a weight stored the other way round is
viewed transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MergedWeight", "merge_bias", "merge_low_rank", "round_once"]

CHUNK_ENTRIES = 2_000_000
"""Entries worked on at once: bounds what float64 costs to about 100 MB, however large the matrix."""


@dataclass(frozen=True)
class MergedWeight:
    """A merged weight, and how many of the entries that should have moved the rounding put back where they were."""

    weight: Tensor
    changed: int
    """Entries whose exact value differs from the base's."""
    unchanged_by_rounding: int
    """Those among them that are, once rounded, what the base's would be."""


def merge_low_rank(
    weight: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    *,
    scaling: float,
    dtype: torch.dtype,
    is_transposed: bool,
    magnitude_O: Tensor | None = None,
) -> MergedWeight:
    """Return W + scaling * B A in `dtype`.

    With a magnitude, each output's row of that scaled to its length (DoRA, arXiv:2402.09353).

    weight: [O, I], or [I, O] when `is_transposed`; the result has the same shape. Computed row by row in float64.
    """
    weight_OI = weight.T if is_transposed else weight
    result = torch.empty(weight.shape, dtype=dtype)
    result_OI = result.T if is_transposed else result
    a_RI = a_RI.double()
    changed = unchanged = 0
    rows = max(1, CHUNK_ENTRIES // max(weight_OI.shape[1], 1))
    for start in range(0, weight_OI.shape[0], rows):
        chosen = slice(start, start + rows)
        base = weight_OI[chosen].double()
        tuned = torch.addmm(base, b_OR[chosen].double(), a_RI, alpha=scaling)
        if magnitude_O is not None:
            tuned *= (magnitude_O[chosen].double() / torch.linalg.vector_norm(tuned, dim=1)).unsqueeze(1)
        rounded = round_once(tuned, dtype)
        moved = tuned != base
        changed += int(moved.sum())
        unchanged += int((moved & (rounded == round_once(base, dtype))).sum())
        result_OI[chosen] = rounded
    return MergedWeight(result, changed, unchanged)


def merge_bias(bias: Tensor, delta: Tensor, *, scaling: float, dtype: torch.dtype) -> MergedWeight:
    """Return b + scaling * b' in `dtype`."""
    base = bias.double()
    tuned = base + scaling * delta.double()
    rounded = round_once(tuned, dtype)
    moved = tuned != base
    return MergedWeight(rounded, int(moved.sum()), int((moved & (rounded == round_once(base, dtype))).sum()))


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` in `dtype`, each rounded to the nearest exactly once.

    torch turns float64 into a 16-bit type by way of float32, which rounds twice and can end on the wrong side. Rounding
    to *odd* on the way (Boldo and Melquiond, 2008) keeps what the second rounding needs to know.

    >>> just_above_the_middle = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    >>> just_above_the_middle.to(torch.bfloat16).item(), round_once(just_above_the_middle, torch.bfloat16).item()
    (1.0, 1.0078125)
    """
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    nearest = values.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    toward_zero = torch.where(back.abs() > values.abs(), bits - 1, bits)  # one step back where the magnitude went up
    to_odd = torch.where(back == values, bits, toward_zero | 1)
    return to_odd.view(torch.float32).to(dtype)
