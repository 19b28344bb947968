"""`llmtune gpu-monitor`: what the devices of this machine do now."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

__all__ = ["gpu_monitor"]


def gpu_monitor(
    once: Annotated[bool, typer.Option("--once", help="Print the figures of now and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    seconds: Annotated[
        float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Time between two looks.")
    ] = 1.0,
) -> None:
    """Show memory, use, heat and power of each GPU, and the processors and memory of the machine."""
    from rich.console import Console
    from rich.live import Live

    from llmtune.tracking.machine import Machine
    from llmtune.watch.machine_view import machine_view

    machine = Machine()
    try:
        time.sleep(min(seconds, 1.0))  # use is measured between two looks
        if as_json:
            while True:
                print(json.dumps(machine.figures().as_dict()), flush=True)
                if once:
                    return
                time.sleep(seconds)
        console = Console(highlight=False, markup=False, emoji=False)
        if once or not sys.stdout.isatty():
            console.print(machine_view(machine.figures(), machine.no_gpu, console.width))
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(machine_view(machine.figures(), machine.no_gpu, console.width), refresh=True)
                time.sleep(seconds)
    finally:
        machine.close()
