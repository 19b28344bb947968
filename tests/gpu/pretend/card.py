"""The cards that can be pretended, with what the memory and the roofline of each need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU as its driver describes it, and the rates that good kernels reach on it."""

    title: str
    capability: tuple[int, int]
    mebibytes: int
    matmul: float = 1e14
    """Operations a second of a large bf16 product, a part of the data sheet's."""
    bandwidth: float = 1e12
    """Bytes a second from and to its memory, a part of the data sheet's."""

    @property
    def total_bytes(self) -> int:
        """Memory of the card."""
        return self.mebibytes << 20


CARDS = {
    "v100": Card("Tesla V100-SXM2-16GB", (7, 0), 16160, 112e12 * 0.8, 900e9 * 0.8),
    "t4": Card("Tesla T4", (7, 5), 15360, 65e12 * 0.6, 320e9 * 0.8),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 24576, 71e12 * 0.9, 936e9 * 0.85),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 24564, 165e12 * 0.9, 1008e9 * 0.88),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", (8, 0), 81920, 312e12 * 0.85, 2039e9 * 0.85),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 81559, 700e12, 3350e9 * 0.85),
    "h200": Card("NVIDIA H200", (9, 0), 143771, 790e12, 4800e9 * 0.85),
    "small": Card("a card of 0.7 GB", (8, 9), 700),
}
