"""Train the same rows with llmtune and with the other toolkits installed, in turn, and print a table of ratios.

    python benchmarks/compare.py --workload lora|full|qlora|scratch|short|long [--steps 12] [--rounds 1]
    python benchmarks/compare.py --device cuda --workload gpu-8b|gpu-1b|gpu-8b-qlora

Each contestant runs in a process of its own; a round runs each once. The first step of a run is left out of its rate
(it is the time to first step). Losses must agree with the first contestant's within 1e-2, or the table says so and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workloads import WORKLOADS, find_conversations, prepare, scaled

HERE = Path(__file__).resolve().parent
LOSS_TOLERANCE = 1e-2
WITH_ALLOCATOR = "+allocator"
"""Ending of llmtune's contestant that gets the preloaded allocator too; the others get it whenever there is one."""


def contestants(workload: str, allocator: str | None) -> list[str]:
    """The contestants of this workload whose packages are installed."""
    names = ["llmtune", "trainer-best", "trainer-best-bf16", "trainer", "llmtune-plain"]
    if allocator:
        names.insert(1, f"llmtune{WITH_ALLOCATOR}")
    if importlib.util.find_spec("trl") is not None:
        names += ["trl-best", "trl"]
    if importlib.util.find_spec("litgpt") is not None and workload in ("lora", "full", "short", "long"):
        names += ["litgpt-best", "litgpt"]
    if workload in ("full", "scratch"):
        names.remove("trainer-best-bf16")  # weights that are trained stay in float32
    if workload == "long":
        # A micro-batch of one row is all there is, so these are the same as their `-best`.
        names = [name for name in names if name not in ("trainer", "trl", "litgpt")]
    return names


def run(name: str, folder: Path, device: str, allocator: str | None) -> dict[str, Any] | str:
    """Run one contestant; returns its figures, or why there are none."""
    preloads = not name.startswith("llmtune") or name.endswith(WITH_ALLOCATOR)
    environment = {**os.environ, **({"LD_PRELOAD": allocator} if allocator and preloads else {})}
    command = [sys.executable, str(HERE / "contestant.py"), name.removesuffix(WITH_ALLOCATOR), str(folder), device]
    process = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        return (process.stderr.strip().splitlines() or [f"exit {process.returncode}"])[-1]
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def summary(figures: dict[str, Any]) -> dict[str, float]:
    """Rates of one run over all steps but the first.

    `fastest`: its best step, the one that other work on the machine disturbs least.
    """
    seconds, tokens = (figures[key][1:] or figures[key] for key in ("seconds", "step_tokens"))
    rate = sum(tokens) / sum(seconds)
    return {
        "tokens": rate,
        "trained": rate * figures["trained_tokens"] / figures["tokens"],
        "fastest": max(count / duration for count, duration in zip(tokens, seconds, strict=True)),
        "peak": figures["peak_bytes"] / 1e6,
        "first": figures["first_step_s"],
        "waiting": figures["data_seconds"] / sum(figures["seconds"]),
        "rate": figures["matrix_rate"] / 1e9,
        "mfu": rate * figures["needed_operations"] / figures["tokens"] / figures["matrix_rate"],
        "loss": statistics.fmean(figures["losses"]),
    }


def table(rounds: dict[str, list[dict[str, Any]]], failures: dict[str, str]) -> tuple[str, bool]:
    """Write the table (Markdown); the second answer says whether all losses agree."""
    columns = ("", "useful tokens/s", "best step", "of llmtune", "trained tokens/s", "peak MB", "first step s")
    columns += ("needed / matrix rate", "mean loss")
    head = f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|\n"
    best = {name: max(map(summary, runs), key=lambda figures: figures["tokens"]) for name, runs in rounds.items()}
    baseline = best.get("llmtune") or next(iter(best.values()))
    lines, agree = [], True
    for name, figures in best.items():
        rates = [summary(run)["tokens"] for run in rounds[name]]
        spread = f" ({min(rates):.0f}-{max(rates):.0f})" if len(rates) > 1 else ""
        own, first = rounds[name][0], next(iter(rounds.values()))[0]
        losses = zip(own["losses"], first["losses"], strict=False)
        # Where rows are packed, llmtune's steps hold other rows than the peers', and so other losses.
        is_same = own["step_tokens"] == first["step_tokens"]
        apart = max(abs(loss - expected) for loss, expected in losses) if is_same else 0.0
        agree = agree and apart <= LOSS_TOLERANCE
        verdict = f"{'within' if apart <= LOSS_TOLERANCE else 'APART BY'} {apart:.1e}" if is_same else "other steps"
        lines.append(
            f"| {name} | {figures['tokens']:.0f}{spread} | {figures['fastest']:.0f} "
            f"| {figures['tokens'] / baseline['tokens']:.2f} "
            f"| {figures['trained']:.0f} | {figures['peak']:.0f} | {figures['first']:.1f} "
            f"| {figures['mfu']:.0%} of {figures['rate']:.0f} GFLOP/s "
            f"| {figures['loss']:.4f} ({verdict}) |"
        )
    lines += [f"| {name} | not run: {why} |" for name, why in failures.items()]
    lines += [f"\nllmtune waited for data {baseline['waiting']:.2%} of its step time."] if "llmtune" in best else []
    return head + "\n".join(lines), agree


def main() -> int:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="lora")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", help="run these contestants only")
    parser.add_argument("--rows-a-step", type=int)
    parser.add_argument(
        "--conversations",
        type=Path,
        default=find_conversations(),
        help="a ShareGPT file; lengths are drawn without one",
    )
    parser.add_argument("--allocator", help="library preloaded for all but `llmtune`, for example libtcmalloc.so")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    workload = scaled(WORKLOADS[options.workload], options.rows_a_step)
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("torch", "transformers", "peft", "trl", "litgpt", "llmtune")
        if importlib.util.find_spec(name)
    )
    machine = f"{options.device}, {os.cpu_count()} cores, {platform.machine()}"
    print(f"{workload.name}: {options.steps} steps of {workload.rows_a_step} rows; {machine}; {versions}")
    rounds: dict[str, list[dict[str, Any]]] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(workload, folder, options.steps, options.conversations)
        for number in range(options.rounds):
            for name in options.only or contestants(workload.name, options.allocator):
                figures = run(name, folder, options.device, options.allocator)
                if isinstance(figures, str):
                    failures[name] = figures
                    continue
                rounds.setdefault(name, []).append(figures)
                print(
                    f"  round {number + 1}: {name} {summary(figures)['tokens']:.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1), encoding="utf-8")
    text, agree = table(rounds, failures)
    print(text)
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
