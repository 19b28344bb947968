"""A process that has one NVIDIA GPU, as far as `torch.cuda` can tell: its card, memory, streams, and waits of the host.

Import this module before torch. `numbers.py` makes the tensors of that device.
"""

from __future__ import annotations

import os
import traceback
import weakref
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # dispatch modes do not reach into the threads that would load weights
from pretend import library

LIBRARY = library.load()
import torch  # noqa: E402 - only now
import torch.utils._device  # noqa: E402
from pretend.card import CARDS, Card  # noqa: E402
from torch.overrides import _get_current_function_mode_stack  # noqa: E402
from torch.utils._device import DeviceContext  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

CONTEXT_BYTES = 600 << 20
"""Memory that the driver takes before the first tensor."""
BLOCK_BYTES = 512
"""What the allocator rounds up to."""
CUDA_VERSION = "13.0"
BUILT_FOR = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
"""Architectures of the wheel on PyPI."""
OWN_FOLDER = f"{os.sep}gpu{os.sep}pretend{os.sep}"

outside_modes = _disable_current_modes
"""Context in which tensors of the host are computed as ever."""


class Device:
    """What happened on the device since `reset`."""

    def __init__(self) -> None:
        self.reset(CARDS["rtx4090"])

    def reset(self, card: Card) -> None:
        """Begin anew as another card."""
        self.card = card
        self.place = torch.device("cpu")
        """Where the numbers of its tensors are: the host, or nowhere (`meta`)."""
        self.waits: Counter[str] = Counter()
        """Where the host waited for the device, with how it did."""
        self.pageable: Counter[str] = Counter()
        """Where an asynchronous copy read or wrote memory that is not page-locked: on a GPU it waits, unseen."""
        self.is_recording = True
        self.now = self.peak = 0
        """Bytes of tensors on the device."""
        self._sizes: dict[int, int] = {}
        self.default_stream = self.stream = Stream()

    def wait(self, how: str) -> None:
        """Note that the host waits."""
        if self.is_recording:
            self.waits[f"{how} at {where()}"] += 1

    def copy_of_pageable(self, num_bytes: int) -> None:
        """Note an asynchronous copy of memory that is not page-locked."""
        if self.is_recording and num_bytes:
            self.pageable[f"{num_bytes} bytes at {where()}"] += 1

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is released. Raises OutOfMemoryError where the card has no room for it."""
        key = storage._cdata  # views share a storage
        if key in self._sizes:
            return
        num_bytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        if self.now + num_bytes + CONTEXT_BYTES > self.card.total_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {num_bytes / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.card.total_bytes / 2**30:.2f} GiB of which {self.free_bytes / 2**20:.2f} MiB is free."
            )
        self._sizes[key] = num_bytes
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    @property
    def free_bytes(self) -> int:
        """Bytes free for the driver."""
        return self.card.total_bytes - self.now - CONTEXT_BYTES


class Event:
    """An event of a stream."""

    def __init__(self, *args: object, **options: object) -> None:
        self.stream: Stream | None = None
        self.position = 0

    def record(self, stream: Stream | None = None) -> None:
        (stream or DEVICE.stream).record_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        DEVICE.wait("Event.synchronize")

    def elapsed_time(self, _other: Event) -> float:
        return 1.0


class Stream:
    """A stream on which everything happens at once."""

    def __init__(self, *args: object, **options: object) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        DEVICE.wait("Stream.synchronize")

    def query(self) -> bool:
        return True


def where() -> str:
    """The innermost line of the package, after that of whoever called torch there."""
    frames = [
        frame
        for frame in traceback.extract_stack()[:-2]
        if "/torch/" not in frame.filename and OWN_FOLDER not in frame.filename
    ]
    own = [frame for frame in frames if "/llmtune/" in frame.filename and "site-packages" not in frame.filename]
    shown = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-1:] + own[-1:]]
    return " <- ".join(dict.fromkeys(shown))


@contextmanager
def patched(changes: list[tuple[object, str, object]]) -> Iterator[None]:
    """Set attributes, and set them back."""
    before = []
    try:
        for owner, name, value in changes:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


@contextmanager
def cuda_of(card: str, stream: Callable[..., Stream] = Stream, pinned_limit: int = 2**63) -> Iterator[Device]:
    """Let `torch.cuda` describe that card. `pinned_limit`: bytes of page-locked memory that the system gives."""
    DEVICE.reset(CARDS[card])
    LIBRARY.pretend_limit_pinned(pinned_limit)
    # Cached with the real functions in it, or `with torch.device(...)` would forget those that are replaced below.
    torch.utils._device._device_constructors()
    bf16 = DEVICE.card.capability >= (8, 0)

    @contextmanager
    def on_stream(other: Stream) -> Iterator[None]:
        before, DEVICE.stream = DEVICE.stream, other
        try:
            yield
        finally:
            DEVICE.stream = before

    answers: dict[str, Callable[..., object]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "set_device": lambda _device: None,
        "get_device_name": lambda _device=None: DEVICE.card.title,
        "get_device_capability": lambda _device=None: DEVICE.card.capability,
        "get_arch_list": lambda: list(BUILT_FOR),
        "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
        "get_device_properties": lambda _device=None: PROPERTIES(
            DEVICE.card.title, *DEVICE.card.capability, DEVICE.card.total_bytes, 132
        ),
        "mem_get_info": lambda _device=None: (DEVICE.free_bytes, DEVICE.card.total_bytes),
        "memory_allocated": lambda _device=None: DEVICE.now,
        "memory_reserved": lambda _device=None: DEVICE.now,
        "max_memory_allocated": lambda _device=None: DEVICE.peak,
        "max_memory_reserved": lambda _device=None: DEVICE.peak,
        "reset_peak_memory_stats": lambda _device=None: setattr(DEVICE, "peak", DEVICE.now),
        "empty_cache": lambda: None,
        "synchronize": lambda _device=None: DEVICE.wait("torch.cuda.synchronize"),
        "_exchange_device": lambda _device: 0,
        "_maybe_exchange_device": lambda _device: 0,
        "Stream": stream,
        "Event": Event,
        "current_stream": lambda _device=None: DEVICE.stream,
        "default_stream": lambda _device=None: DEVICE.default_stream,
        "stream": on_stream,
        "get_rng_state": lambda _device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda _state, _device=None: None,
        "manual_seed": lambda _seed: None,
        "manual_seed_all": lambda _seed: None,
    }
    changes = [(torch.cuda, name, answer) for name, answer in answers.items()]
    changes += [(torch.version, "cuda", CUDA_VERSION), (torch, "tensor", _tensor(torch.tensor))]
    try:
        with patched(changes):
            yield DEVICE
    finally:
        LIBRARY.pretend_limit_pinned(2**63)


def _tensor(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor`, which makes its numbers on the host and copies them; modes do not see how it would."""

    def tensor(
        data: object,
        *,
        dtype: torch.dtype | None = None,
        device: object = None,
        requires_grad: bool = False,
        **options: object,
    ) -> torch.Tensor:
        if device is None:  # `with torch.device(...)` names it
            modes = _get_current_function_mode_stack()
            device = next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), "cpu")
        if torch.device(device).type != "cuda":
            return real(data, dtype=dtype, device=device, requires_grad=requires_grad, **options)
        with outside_modes():
            host = real(data, dtype=dtype, device="cpu")
        return host.to(device).requires_grad_(requires_grad)

    return tensor


PROPERTIES = namedtuple("PROPERTIES", "name major minor total_memory multi_processor_count")
DEVICE = Device()
