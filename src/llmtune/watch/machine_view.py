"""The figures of a machine as bars."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llmtune.common.text import printable, readable_bytes
from llmtune.tracking.machine import GPU, Figures

__all__ = ["machine_view"]

HOT_CELSIUS = 85
"""From about here on, cards of NVIDIA slow themselves down."""


def machine_view(figures: Figures, no_gpu: str | None, columns: int) -> Group:
    """Return a block for each GPU, and one for processors and memory; says why no GPU is shown, if so."""
    bar_columns = max(min(columns - 46, 40), 8)
    blocks: list[Text | Table] = []
    if no_gpu is not None:
        blocks.append(Text(f"{printable(no_gpu)}. These are the figures of this machine's processors."))
    for gpu in figures.gpus:
        blocks.append(Text.assemble((f"GPU {gpu.index} ", "bold cyan"), (printable(gpu.name), "bold")))
        blocks.append(_gpu(gpu, bar_columns))
    blocks.append(Text(f"CPU, {figures.cpu_count} processors", "bold cyan"))
    grid = _grid()
    _row(grid, "use", figures.cpu_use, f"{figures.cpu_use:.0%}", bar_columns)
    used, total = figures.memory_used_bytes, figures.memory_total_bytes
    _row(grid, "memory", used / total, _of(used, total), bar_columns)
    blocks.append(grid)
    return Group(*blocks)


def _gpu(gpu: GPU, columns: int) -> Table:
    grid = _grid()
    if gpu.use is not None:
        _row(grid, "use", gpu.use, f"{gpu.use:.0%}", columns)
    if gpu.memory_used_bytes is not None and gpu.memory_total_bytes:
        share = gpu.memory_used_bytes / gpu.memory_total_bytes
        _row(grid, "memory", share, _of(gpu.memory_used_bytes, gpu.memory_total_bytes), columns)
    if gpu.power_watts is not None:
        limit = gpu.power_limit_watts
        text = f"{gpu.power_watts:.0f} W" + (f" of {limit:.0f} W" if limit else "")
        _row(grid, "power", gpu.power_watts / limit if limit else None, text, columns)
    if gpu.temperature_celsius is not None:
        hot = "  hot: it may slow down" if gpu.temperature_celsius >= HOT_CELSIUS else ""
        _row(grid, "heat", gpu.temperature_celsius / 100, f"{gpu.temperature_celsius:.0f} °C{hot}", columns)
    return grid


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=8, justify="right")
    return grid


def _row(grid: Table, name: str, share: float | None, text: str, columns: int) -> None:
    filled = round(min(max(share or 0.0, 0.0), 1.0) * columns)
    bar = Text.assemble(("█" * filled, "green"), ("░" * (columns - filled), "dim")) if share is not None else Text()
    grid.add_row(Text(name, "cyan"), bar, Text(text))


def _of(used: int, total: int) -> str:
    return f"{readable_bytes(used)} of {readable_bytes(total)}"
