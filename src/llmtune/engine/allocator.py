"""Memory that goes back to the program, not to the system: settings made once at the start of a process that computes.

A step allocates and frees the same large blocks over and over. glibc gives blocks above 32 MB back to the system at
once, so each is made of fresh pages that the kernel must clear when they are first touched: about 2 GB/s, against 20
GB/s for memory already held.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache

from llmtune.common.decisions import Decision

__all__ = [
    "FULL_KERNEL_CACHES_BYTES",
    "LEAN_LARGEST_BLOCK",
    "SHARDED_LARGEST_BLOCK",
    "allocator_in_force",
    "bound_kernel_caches",
    "has_thread_caches",
    "release_free_memory",
    "tune_allocator",
]

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
"""Names and numbers of mallopt(3)."""

LARGEST_BLOCK = 1 << 30
"""Bytes up to which blocks come from memory already held; larger ones are rare and still go straight to the system."""

LEAN_LARGEST_BLOCK = 1 << 25
"""The same for a run that recomputes its blocks to save memory. Where all weights are trained, an embedding's gradient
and a head's logits (50 to 110 MB) leave gaps in the heap that grew by 350 MB a step; such blocks returned to the
system, it stays flat. Without recomputing that made a step 18 % longer, with it no difference was seen."""

SHARDED_LARGEST_BLOCK = 1 << 22
"""The same for a process that holds a part of every weight. A decoder block's weights are gathered and dropped again
and again, and what lives on between them left 1.4 to 1.8 GB of gaps around 0.9 GB in use (SmolLM2-135M, three
processes).
"""

KEPT = (1 << 31) - 1
"""Bytes of free memory that are kept at the end of the heap."""

_tuned: list[int] = []
"""The largest blocks asked for of glibc's allocator so far; empty where it was not tuned."""

CUDA_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of torch's CUDA allocator, the newer name first."""

KERNEL_CACHES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "96"}
"""Kernels that torch's CPU library keeps, for each of its two caches. Each shape of a product has a kernel of its own,
and a micro-batch's are used in every layer, so these hold them. More (1,024 of each, as found) grow with every new
length; and each kernel kept from an earlier micro-batch lies amid the blocks of a later one, which then need new room:
with 256 in the second cache LoRA on conversations took 3.18 GB where it takes 2.78 now, custom-small 2.85 after 60
steps where it takes 2.34 now."""

FULL_KERNEL_CACHES_BYTES = 119 << 20
"""What both caches hold once they are full: measured with products of 128 by 128 at 1,200 lengths, where it stays after
400.
"""


def bound_kernel_caches() -> None:
    """Bound the number of CPU kernels that are kept, one for each length of a row: a longer run needs no more memory.

    Each cache reads its limit once, with the first kernel it keeps: after torch is imported is early enough, after the
    first product of its kind is too late. A limit that the environment sets already is left alone. Values never change:
    a kernel is made again.
    """
    for name, value in KERNEL_CACHES.items():
        # Through the environment, because torch has no function for them.
        os.environ.setdefault(name, value)


def grow_segments() -> None:
    """Have torch's CUDA allocator grow its segments in place of adding others; before torch is imported.

    A setting of the environment is left alone, and WSL, whose driver refuses it (pytorch issue 192330).
    """
    if not is_wsl() and not any(name in os.environ for name in CUDA_ALLOCATOR_SETTINGS):
        os.environ[CUDA_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def has_expandable_segments() -> bool:
    """Whether the CUDA allocator of this process grows its segments, or would where `grow_segments` is called."""
    settings = [os.environ[name] for name in CUDA_ALLOCATOR_SETTINGS if name in os.environ]
    return any("expandable_segments:True" in setting for setting in settings) if settings else not is_wsl()


def is_wsl() -> bool:
    """Whether this is Linux inside Windows."""
    return "microsoft" in platform.release().lower()


def tune_allocator(*, largest_block: int = LARGEST_BLOCK) -> Decision:
    """Make glibc's allocator keep freed memory for the next step, blocks up to `largest_block` bytes.

    Best before torch is imported.

    Safe: it changes when memory returns to the system, never what a program computes. Elsewhere than on glibc nothing
    is done, and said.
    """
    key = "process.allocator"
    if platform.libc_ver()[0] != "glibc":
        return Decision(key, "unchanged", "only glibc's allocator is known to need it")
    if not _set(M_MMAP_THRESHOLD, largest_block) and not _set(M_MMAP_MAX, 0):  # the first is refused before glibc 2.35
        return Decision(key, "unchanged", "this allocator takes no settings")
    _tuned.append(largest_block)
    # Or the end of the heap would go back to the system after each step, and be cleared again in the next.
    _set(M_TRIM_THRESHOLD, KEPT)
    return allocator_in_force()[0]


def allocator_in_force() -> list[Decision]:
    """What `tune_allocator` has set in this process; empty where it was not called, or could not."""
    if not _tuned:
        return []
    value, reason = "keeps freed memory", "memory already held is ten times faster to reuse than fresh pages"
    if _tuned[-1] < LARGEST_BLOCK:
        value, reason = (
            f"keeps freed blocks up to {_tuned[-1] >> 20} MiB",
            "larger ones would leave gaps that grow, and memory is short",
        )
    return [Decision("process.allocator", value, reason)]


def has_thread_caches() -> bool:
    """Whether glibc's threads keep freed small blocks: not by the user's own tunable, or under another allocator.

    Each thread keeps seven of every size; they lie among the large blocks of a step, and no gap grows past them.
    QLoRA on rows of 2,400 tokens took 2.98 GB with them and 2.67 with `GLIBC_TUNABLES=glibc.malloc.tcache_count=0`.
    """
    is_other = "tcache" in os.environ.get("GLIBC_TUNABLES", "") or "malloc" in os.environ.get("LD_PRELOAD", "")
    return platform.libc_ver()[0] == "glibc" and not is_other


def _set(setting: int, value: int) -> bool:
    return bool(_mallopt()(setting, value))


@cache
def _mallopt() -> Callable[[int, int], int]:
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return mallopt


def release_free_memory() -> None:
    """Give the gaps that glibc's heap keeps between live tensors back to the system; nothing elsewhere.

    For the moment before work of another shape (evaluation, generation), which cannot use those gaps and would add its
    own memory on top. It costs about a third of a training step, so it is not done at each.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
