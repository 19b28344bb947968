"""`llmtune doctor`: versions, devices, what works on this machine and what does not, with the fix."""

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
from llmtune.errors import LlmtuneError, in_one_line
from llmtune.version import __version__

__all__ = ["doctor"]

HELD = ("torch", "transformers", "peft", "jinja2")
"""Libraries whose oldest version is looked at; the versions stand in the package's own requirements and nowhere else.
"""


def _floors() -> dict[str, str]:
    try:
        declared = [re.match(r"([\w.-]+)[^;]*?>=([\d.]+)", one) for one in requires("llmtune") or ()]
    except PackageNotFoundError:  # run from a source tree that is not installed
        return {}
    found = {one[1].lower(): one[2] for one in declared if one}
    return {name: found[name] for name in HELD}


FLOORS = _floors()
"""The oldest version of each of `HELD` that this llmtune works with, as its requirements say."""

EXTRAS = ("tensorboard", "wandb")
"""Optional modules; the extra that installs one has its name."""

LEAST_FREE_BYTES = 5 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: str
    """`ok`, `warn` (something optional is missing), or `bad` (training does not work so)."""
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
    for one in findings:
        if as_json:
            print(json.dumps(asdict(one), ensure_ascii=False))
        else:
            print(f"{one.state:<5}{one.what:<15}{one.found}")
            if one.fix:
                print(f"{'':20}fix: {one.fix}")
    return 6 if any(one.state == "bad" for one in findings) else 0


def is_older(found: str, floor: str) -> bool:
    """Whether version `found` comes before `floor`, by its numbers; what follows them (`+cpu`, `rc1`) does not count.

    >>> is_older("2.9.1+cu130", "2.10"), is_older("2.13.0", "2.10"), is_older("3.1.6", "3.1.6")
    (True, False, False)
    """

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", text)[0])]

    return numbers(found) < numbers(floor)


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
            found = version(name)
        except PackageNotFoundError:
            findings.append(Finding(name, "bad", "not installed", fix))
            continue
        old = is_older(found, floor)
        findings.append(
            Finding(name, "bad" if old else "ok", f"{found}, {floor} or newer is needed", fix if old else "")
        )
    return findings


def _devices() -> list[Finding]:
    import torch

    from llmtune.common.bytes import readable_bytes
    from llmtune.plan.hardware import attainable_bytes

    findings = [
        Finding(
            "cpu",
            "ok",
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {readable_bytes(attainable_bytes())} free",
        )
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found = f"{torch.cuda.get_device_name(index)}, {readable_bytes(free)} of {readable_bytes(total)} free"
            findings.append(Finding(f"cuda:{index}", "ok", found))
    else:
        findings.append(
            Finding(
                "cuda",
                "warn",
                "no CUDA device",
                "training runs on the CPU; for a GPU, install its driver and a CUDA build of torch",
            )
        )
    return findings


def _arithmetic() -> list[Finding]:
    import torch

    from llmtune.engine.devices import choose_device
    from llmtune.engine.precision import choose_precision

    choice = choose_precision(choose_device()[0])
    amx = "has" if torch.cpu._is_amx_tile_supported() else "has no"
    return [Finding("precision", "ok", f"auto takes {choice.value}: {choice.reason}; this CPU {amx} AMX tiles")]


def _bitsandbytes() -> list[Finding]:
    import torch

    from llmtune.models.quantization import import_bitsandbytes

    try:
        functional = import_bitsandbytes().functional
        packed, state = functional.quantize_4bit(torch.linspace(-1, 1, 4096).reshape(64, 64), quant_type="nf4")
        error = float(
            (functional.dequantize_4bit(packed, state) - torch.linspace(-1, 1, 4096).reshape(64, 64)).abs().max()
        )
    except (LlmtuneError, ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as problem:
        what = f"does not work: {in_one_line(problem)}"
        return [Finding("bitsandbytes", "warn", what, "pip install 'bitsandbytes>=0.49'; only 4/8 bit need it")]
    return [
        Finding(
            "bitsandbytes", "ok", f"{version('bitsandbytes')}, 4-bit NF4 works (largest error {error:.2f} in -1..1)"
        )
    ]


def _places() -> list[Finding]:
    from llmtune.common.bytes import readable_bytes
    from llmtune.common.folders import cache_folder
    from llmtune.runs.disk import free_bytes_at

    free = free_bytes_at(Path.cwd())
    low = free < LEAST_FREE_BYTES
    fix = "free some, or choose run.output_dir on another disk" if low else ""
    findings = [Finding("disk", "warn" if low else "ok", f"{readable_bytes(free)} free in this folder", fix)]
    cache = cache_folder()
    if cache is None:
        return [
            *findings,
            Finding(
                "cache", "warn", "there is no home folder", "set LLMTUNE_CACHE_DIR to a folder that can be written"
            ),
        ]
    nearest = next(one for one in (cache, *cache.parents) if one.exists())
    if not os.access(nearest, os.W_OK):
        return [
            *findings,
            Finding("cache", "warn", f"{nearest} cannot be written", "set LLMTUNE_CACHE_DIR to a folder that can"),
        ]
    return [*findings, Finding("cache", "ok", f"{cache} can be written")]


def _extras() -> list[Finding]:
    findings = []
    for module in EXTRAS:
        is_installed = importlib.util.find_spec(module) is not None
        fix = "" if is_installed else f"pip install 'llmtune[{module}]', if you want it"
        state, shown = ("ok", "installed") if is_installed else ("warn", "not installed")
        findings.append(Finding(module, state, shown, fix))
    return findings


def _network() -> list[Finding]:
    from llmtune.common.offline import is_offline

    return [
        Finding(
            "network",
            "ok",
            "offline: no connection is made" if is_offline() else "used only for models and data named by a hub id",
        )
    ]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _versions,
    _devices,
    _arithmetic,
    _bitsandbytes,
    _places,
    _extras,
    _network,
)
