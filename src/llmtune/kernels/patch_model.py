"""The fast forms of a model's modules in one table: the engine and the plan's trace of it patch the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import nn

from llmtune.kernels.liger import LIGER, is_installed
from llmtune.kernels.lora import FusedLora, group_shared_inputs, is_plain_lora
from llmtune.kernels.patching import patch, unpatch
from llmtune.kernels.rms_norm import FusedRmsNorm, KernelRmsNorm, is_rms_norm, mark_norms_before_products
from llmtune.kernels.rotary import KernelRotary, is_rotary_attention
from llmtune.kernels.swiglu import FusedSwiglu, KernelSwiglu, is_swiglu

__all__ = ["NO_LIBRARIES", "PATCHES", "Patch", "kernel_libraries", "patch_model", "undo_patches"]

NO_LIBRARIES: frozenset[str] = frozenset()

TORCH = "torch"


def kernel_libraries(device_type: str) -> frozenset[str]:
    """Name the libraries whose kernels a device has: those that may be missing or wrong there, so that a probe asks.

    >>> sorted(kernel_libraries("cpu"))
    []
    """
    if device_type != "cuda":
        return NO_LIBRARIES
    return frozenset((TORCH, LIGER) if is_installed() else (TORCH,))


class Patch(NamedTuple):
    """One kind of module and its fast form."""

    name: str
    matches: Callable[[nn.Module], bool]
    """Whether a module of the library does exactly this arithmetic."""
    mixin: type
    """Put before the module's class; its forward is the fast form."""
    only_on: str | None = None
    """The device type on which it is faster; None for all."""
    connect: Callable[[nn.Module], None] | None = None
    """Called with every module of the model: sets on its patched children what depends on their parent."""
    attribute: str | None = None
    """The attribute that `connect` sets on patched modules."""
    library: str | None = None
    """Whose kernel of the device it calls; the engine tries without it where that is missing or wrong."""


def patch_model(model: nn.Module, device_type: str, libraries: Collection[str] | None = None) -> Counter[str]:
    """Give the modules of the table their fast form; returns how many of each kind. Undo with `undo_patches`.

    libraries: whose kernels may be called, of `kernel_libraries`; all of them when None.
    """
    counts: Counter[str] = Counter()
    libraries = kernel_libraries(device_type) if libraries is None else libraries
    for row in PATCHES:
        if row.only_on not in (None, device_type) or not (row.library is None or row.library in libraries):
            continue
        # A module that an earlier row has taken has another class already.
        modules = [module for module in model.modules() if row.matches(module)]
        for module in modules:
            patch(module, row.mixin, "Fused")
        counts[row.name] += len(modules)
        if row.connect is not None:
            for parent in model.modules():
                row.connect(parent)
    return counts


def undo_patches(model: nn.Module) -> None:
    """Give every module its library's class back, and remove the attributes that `connect` set."""
    for module in model.modules():
        for row in PATCHES:
            if unpatch(module, row.mixin) and row.attribute is not None:
                module.__dict__.pop(row.attribute, None)


PATCHES = (
    Patch("SwiGLU by Liger", is_swiglu, KernelSwiglu, "cuda", library=LIGER),
    Patch("SwiGLU", is_swiglu, FusedSwiglu),
    Patch("rotary positions by Liger", is_rotary_attention, KernelRotary, "cuda", library=LIGER),
    Patch("RMS norm", is_rms_norm, FusedRmsNorm, "cpu", mark_norms_before_products, "rounds_output"),
    Patch("RMS norm", is_rms_norm, KernelRmsNorm, "cuda", mark_norms_before_products, "rounds_output", TORCH),
    Patch("LoRA", is_plain_lora, FusedLora, None, group_shared_inputs, "group"),
)
