"""`llmtune doctor`: versions and devices of this machine, and the fix for each part that does not work."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.process import check_working_folder
from llmtune.common.environment import cache_folder, is_offline
from llmtune.common.text import readable_bytes
from llmtune.errors import LlmtuneError, in_one_line
from llmtune.runs.disk import free_bytes_at
from llmtune.version import __version__

__all__ = ["doctor"]

REQUIRED = ("torch", "transformers", "peft", "jinja2")
"""Libraries whose versions are checked against the requirements of the package."""


def _floors() -> dict[str, str]:
    try:
        declared = [re.match(r"([\w.-]+)[^;]*?>=([\d.]+)", line) for line in requires("llmtune") or ()]
    except PackageNotFoundError:  # run from a source tree that is not installed
        return {}
    floors = {match[1].lower(): match[2] for match in declared if match}
    return {name: floors[name] for name in REQUIRED}


FLOORS = _floors()
"""The oldest version of each of `REQUIRED` that this llmtune works with."""

EXTRAS = ("tensorboard", "deepspeed")
"""Optional modules; the extra that installs one has its name."""

LEAST_FREE_BYTES = 5 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: str
    """`ok`, `warn` (something optional is missing), or `bad` (training does not work)."""
    found: str
    fix: str = ""


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line: what, state, found, fix.")
    ] = False,
) -> int:
    """Look at versions, devices and folders; exit code 0 when everything needed works, 6 otherwise."""
    check_working_folder()
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        if as_json:
            print(json.dumps(asdict(finding), ensure_ascii=False))
        else:
            print(f"{finding.state:<5}{finding.what:<15}{finding.found}")
            if finding.fix:
                print(f"{'':20}fix: {finding.fix}")
    return 6 if any(finding.state == "bad" for finding in findings) else 0


def is_older(installed: str, floor: str) -> bool:
    """Whether version `installed` comes before `floor`, by its numbers; endings (`+cpu`, `rc1`) do not count.

    >>> is_older("2.9.1+cu130", "2.10"), is_older("2.13.0", "2.10"), is_older("3.1.6", "3.1.6")
    (True, False, False)
    """

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", text)[0])]

    return numbers(installed) < numbers(floor)


def _python() -> list[Finding]:
    return [
        Finding(
            "llmtune",
            "ok",
            f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        )
    ]


def _versions() -> list[Finding]:
    findings = []
    for name, floor in FLOORS.items():
        fix = f"pip install '{name}>={floor}'"
        try:
            installed = version(name)
        except PackageNotFoundError:
            findings.append(Finding(name, "bad", "not installed", fix))
            continue
        state, fix = ("bad", fix) if is_older(installed, floor) else ("ok", "")
        findings.append(Finding(name, state, f"{installed}, {floor} or newer is needed", fix))
    return findings


def _devices() -> list[Finding]:
    import torch

    from llmtune.cli.doctor_gpu import gpu_findings
    from llmtune.plan.hardware import attainable_bytes

    memory = readable_bytes(attainable_bytes())
    findings = [Finding("cpu", "ok", f"cores: {os.cpu_count()}, threads: {torch.get_num_threads()}, {memory} free")]
    return [*findings, *(Finding(*finding) for finding in gpu_findings())]


def _arithmetic() -> list[Finding]:
    import torch

    from llmtune.engine.choose_device import choose_device
    from llmtune.engine.precision import choose_precision

    try:
        device, _ = choose_device()
    except LlmtuneError as error:  # said above
        return [Finding("precision", "bad", "no device is chosen", error.problems[0].fix or "")]
    choice = choose_precision(device)
    amx = "has" if torch.cpu._is_amx_tile_supported() else "has no"
    return [Finding("precision", "ok", f"auto takes {choice.value}: {choice.reason}; this CPU {amx} AMX tiles")]


def _bitsandbytes() -> list[Finding]:
    import torch

    from llmtune.models.quantization import import_bitsandbytes

    try:
        functional = import_bitsandbytes().functional
        matrix = torch.linspace(-1, 1, 4096).reshape(64, 64)
        packed, state = functional.quantize_4bit(matrix, quant_type="nf4")
        difference = float((functional.dequantize_4bit(packed, state) - matrix).abs().max())
    except (LlmtuneError, ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as error:
        problem = f"does not work: {in_one_line(error)}"
        return [Finding("bitsandbytes", "warn", problem, "pip install 'bitsandbytes>=0.49'; only 4/8 bit need it")]
    works = f"{version('bitsandbytes')}, 4-bit NF4 works (largest error {difference:.2f} in -1..1)"
    return [Finding("bitsandbytes", "ok", works)]


def _folders() -> list[Finding]:
    free = free_bytes_at(Path.cwd())
    low = free < LEAST_FREE_BYTES
    fix = "free some, or choose run.output_dir on another disk" if low else ""
    findings = [Finding("disk", "warn" if low else "ok", f"{readable_bytes(free)} free in this folder", fix)]
    return [*findings, _cache_finding(cache_folder())]


def _cache_finding(cache: Path | None) -> Finding:
    if cache is None:
        fix = "set LLMTUNE_CACHE_DIR to a folder that can be written"
        return Finding("cache", "warn", "there is no home folder", fix)
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        return Finding("cache", "warn", f"{nearest} cannot be written", "set LLMTUNE_CACHE_DIR to a folder that can")
    return Finding("cache", "ok", f"{cache} can be written")


def _extras() -> list[Finding]:
    findings = []
    for module in EXTRAS:
        is_installed = importlib.util.find_spec(module) is not None
        fix = "" if is_installed else f"pip install 'llmtune[{module}]', if you want it"
        state, shown = ("ok", "installed") if is_installed else ("warn", "not installed")
        findings.append(Finding(module, state, shown, fix))
    return findings


def _network() -> list[Finding]:
    state = "offline: no connection is made" if is_offline() else "used only for models and data named by a hub id"
    return [Finding("network", "ok", state)]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _versions,
    _devices,
    _arithmetic,
    _bitsandbytes,
    _folders,
    _extras,
    _network,
)
