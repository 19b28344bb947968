"""Take custom-nano from nothing to an exported model by the commands, killed on the way, and print what each took.

    python benchmarks/from_nothing.py [FOLDER]

Tokenizer and training on the shipped stories, SIGKILL in the middle, resume, evaluate, generate until the model stops
by itself, export as a folder and as a GGUF file. No network. Prints seconds by the clock and of processor time, by
command; exit code 1 where a step fails or the generated text does not end by itself. On a busy machine only the
processor time means something.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPOCHS, KILL_AFTER = 3, 25
TRAINING = [
    "data.train=[example:stories]",
    "data.format=text",
    "data.test_size=0.05",
    "data.max_samples=null",
    "data.max_length=256",
    "data.packing=greedy",
    f"training.epochs={EPOCHS}",
    "training.batch_size=4",
    "checkpoint.every_steps=10",
    "evaluation.before_training=false",
    "evaluation.prompts=[]",
    "tracking.trackers=[jsonl]",
]


def spent() -> tuple[float, float]:
    """Seconds by the clock, and processor seconds of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def run(words: list[str], folder: Path, *, kill_after: int | None = None) -> str:
    """Run one command and return its output; with `kill_after` it is killed with SIGKILL after so many steps."""
    before = spent()
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtune", "--offline", *words], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    if kill_after is not None:
        metrics = folder / "runs" / "nano" / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= kill_after):
            time.sleep(0.01)
        process.kill()
    out, _ = process.communicate()
    expected = 0 if kill_after is None else -signal.SIGKILL
    if process.returncode != expected:
        raise SystemExit(f"`{' '.join(words)}` ended with {process.returncode}, not {expected}")
    after = spent()
    killed = "" if kill_after is None else f", killed after step {kill_after}"
    print(f"{words[0]:9} {after[0] - before[0]:7.1f} s {after[1] - before[1]:7.1f} processor s{killed}", flush=True)
    return out


def main() -> int:
    """Run the commands in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="for the run and the exports; a new temporary one if not given"
    )
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp())
    os.environ["HF_HUB_OFFLINE"] = "1"
    begin = spent()
    train = ["train", "--config", "test", "--model", "custom-nano", "--name", "nano", "--no-cuda", *TRAINING]
    run(train, folder, kill_after=KILL_AFTER)
    run(["resume", "nano", "--no-cuda"], folder)
    run(["evaluate", "nano", "--no-cuda"], folder)
    generate = ["generate", "nano", "An old", "--max-new-tokens", "400", "--json", "--no-cuda"]
    answer = json.loads(run(generate, folder).splitlines()[-1])
    run(["export", "nano", "--output", "exported"], folder)
    run(["export", "nano", "--output", "exported.gguf"], folder)
    end = spent()
    print(f"{'in all':9} {end[0] - begin[0]:7.1f} s {end[1] - begin[1]:7.1f} processor s")
    print(f"the text ended by {answer['stopped_by']}: {answer['text'][:200]!r}")
    return 0 if answer["stopped_by"] == "stop_token" else 1


if __name__ == "__main__":
    raise SystemExit(main())
