"""What the machine does now: its GPUs by NVIDIA's management library, its processors and memory, and this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import pynvml

__all__ = ["GPU", "Figures", "Machine"]


@dataclass(frozen=True)
class GPU:
    """The figures of one GPU; None for what it does not tell."""

    index: int
    name: str
    use: float | None
    """Share of the time in which it computed anything, in [0, 1]."""
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_celsius: float | None
    power_watts: float | None
    power_limit_watts: float | None


@dataclass(frozen=True)
class Figures:
    """The machine at one moment."""

    time: float
    """Seconds since 1970, UTC."""
    cpu_use: float
    """Share of all processors' time in use since the figures before, in [0, 1]."""
    cpu_count: int
    memory_used_bytes: int
    memory_total_bytes: int
    process_cpus: float
    """Processors that this process kept busy since the figures before."""
    process_memory_bytes: int
    gpus: tuple[GPU, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {**asdict(self), "gpus": [asdict(gpu) for gpu in self.gpus]}


class Machine:
    """Reads figures. `nvml` is the library; `no_gpu` says why none is shown."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self.no_gpu: str | None = None
        self._handles: list[Any] = []
        try:
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            self.no_gpu = f"no NVIDIA GPU can be asked: {error}"
        if not self._handles and self.no_gpu is None:
            self.no_gpu = "no NVIDIA GPU is in this machine"
        self._process = psutil.Process()
        # The first call only sets the moment that the next one measures from.
        psutil.cpu_percent()
        self._process.cpu_percent()

    def figures(self) -> Figures:
        """Return the figures of now."""
        memory = psutil.virtual_memory()
        return Figures(
            time=time.time(),
            cpu_use=psutil.cpu_percent() / 100,
            cpu_count=psutil.cpu_count() or 1,
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            process_cpus=self._process.cpu_percent() / 100,
            process_memory_bytes=self._process.memory_info().rss,
            gpus=tuple(self._gpu(index, handle) for index, handle in enumerate(self._handles)),
        )

    def close(self) -> None:
        """Let the library go."""
        if self._handles:
            self._handles = []
            self._nvml.nvmlShutdown()

    def _gpu(self, index: int, handle: Any) -> GPU:
        nvml = self._nvml
        name = self._asked(lambda: nvml.nvmlDeviceGetName(handle))
        use = self._asked(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        memory = self._asked(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        return GPU(
            index=index,
            # Earlier versions of the library return bytes.
            name=name.decode() if isinstance(name, bytes) else str(name or "GPU"),
            use=use,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            temperature_celsius=self._asked(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            power_watts=self._asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            power_limit_watts=self._asked(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
        )

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The answer; None where this GPU has none (laptops tell no power, parts of a GPU no use)."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None
