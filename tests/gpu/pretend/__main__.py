"""Run a script or a module as on a machine with a GPU: `python -m pretend [--card t4] [-m] SCRIPT ...`."""

from __future__ import annotations

import argparse
import runpy
import sys
from contextlib import nullcontext


def main() -> None:
    """Read the command line and run what it names."""
    parser = argparse.ArgumentParser(prog="pretend", description=__doc__)
    parser.add_argument("--card", default="rtx4090", help="`none` loads the device and leaves the choice to the script")
    parser.add_argument("--pinned-limit", type=int, default=2**63, help="bytes of page-locked memory")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    from pretend import numbers

    from llmtune.models.quantization import import_bitsandbytes

    import_bitsandbytes()  # looks at the device when it is imported
    sys.argv = [options.script, *options.arguments]
    machine = nullcontext() if options.card == "none" else numbers.machine(options.card, options.pinned_limit)
    with machine:
        if options.module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(options.script, run_name="__main__")


main()
