"""The arithmetic of a merge: one weight at a time, in float64, rounded once to the type it is written in.

Legend: O outputs and I inputs of a layer, R rank. Matrices are [O, I]; a weight stored as [I, O] is viewed transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MergedWeight", "count_changes", "merge_bias", "merge_low_rank", "round_once"]

CHUNK_ENTRIES = 2_000_000
"""Entries computed at once: keeps the float64 copies at about 100 MB, however large the matrix."""


@dataclass(frozen=True)
class MergedWeight:
    """A merged weight with counts of changed entries."""

    weight: Tensor
    changed: int
    """Entries whose exact value differs from the base's."""
    unchanged_by_rounding: int
    """Changed entries that are, once rounded, equal to the base's rounded value."""


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
    """Return W' = W + scaling * B A in `dtype` (LoRA, arXiv:2106.09685).

    With a magnitude m, the row o of W' is m_o * W'_o / ||W'_o|| (DoRA, arXiv:2402.09353). scaling is alpha / r, or
    alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).

    weight: [O, I], or [I, O] when `is_transposed`; the result has the same shape. Computed row by row in float64.
    """
    weight_OI = weight.T if is_transposed else weight
    merged = torch.empty(weight.shape, dtype=dtype)
    merged_OI = merged.T if is_transposed else merged
    a_RI = a_RI.double()
    changed = unchanged = 0
    rows_at_once = max(1, CHUNK_ENTRIES // max(weight_OI.shape[1], 1))
    for start in range(0, weight_OI.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        base = weight_OI[rows].double()
        # In float64 the product is exact enough that the rounding below is the only one that is seen.
        tuned = torch.addmm(base, b_OR[rows].double(), a_RI, alpha=scaling)
        if magnitude_O is not None:
            tuned *= (magnitude_O[rows].double() / torch.linalg.vector_norm(tuned, dim=1)).unsqueeze(1)
        rounded = round_once(tuned, dtype)
        chunk_changed, chunk_unchanged = count_changes(base, tuned, rounded)
        changed += chunk_changed
        unchanged += chunk_unchanged
        merged_OI[rows] = rounded
    return MergedWeight(merged, changed, unchanged)


def merge_bias(bias: Tensor, delta: Tensor, *, scaling: float, dtype: torch.dtype) -> MergedWeight:
    """Return merged = b + scaling * delta in `dtype`, all [O], computed in float64."""
    base = bias.double()
    tuned = base + scaling * delta.double()
    rounded = round_once(tuned, dtype)
    return MergedWeight(rounded, *count_changes(base, tuned, rounded))


def count_changes(base: Tensor, tuned: Tensor, rounded: Tensor) -> tuple[int, int]:
    """Return (entries that differ from the base, those of them that rounding puts back); tensors of one shape.

    With r the rounding to the written type: changed = #(tuned != base), of these unchanged = #(r(tuned) == r(base)).
    """
    moved = tuned != base
    return int(moved.sum()), int((moved & (rounded == round_once(base, rounded.dtype))).sum())


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values`, of any shape, in `dtype`, each rounded to the nearest exactly once.

    torch turns float64 into a 16-bit type by way of float32, which rounds twice and can end on the wrong side. Rounding
    to *odd* on the way keeps the bit that the second rounding needs (Boldo and Melquiond 2008, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd", https://doi.org/10.1109/TC.2007.70819).

    >>> just_above_the_middle = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    >>> just_above_the_middle.to(torch.bfloat16).item(), round_once(just_above_the_middle, torch.bfloat16).item()
    (1.0, 1.0078125)
    """
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    nearest = values.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    # As whole numbers, the bits of floats of one sign are in the order of their magnitudes: one less is the next float
    # toward zero, which is the value cut off where rounding to nearest went up.
    toward_zero = torch.where(back.abs() > values.abs(), bits - 1, bits)
    to_odd = torch.where(back == values, bits, toward_zero | 1)  # inexact: the last bit says that more follows
    return to_odd.view(torch.float32).to(dtype)
