"""What preferences and rewards add to a half-trained adapter: exact answers of the record task before and after.

    python benchmarks/preference_gain.py dpo            # also kto, grpo; three seeds
    python benchmarks/preference_gain.py sft            # beside them: supervised training on the same right answers
    python benchmarks/preference_gain.py dpo --seeds 1 --folder runs

The half-trained adapter is that of the quickstart after 6 of its 80 steps, at a constant rate; each seed has one of its
own, with its own order of the rows. It answers 128 training
sentences (`llmtune predict --as pairs`, for kto `--as labels`; grpo draws its own answers), and learns from them by the
config of `examples/preferences`, as that stands there. `made-up` learns from the example's own pairs. `llmtune predict`
counts the sentences of `example:records/heldout` that are answered character by character, before and after. What the
folder holds already is kept: a command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LLMTUNE = [sys.executable, "-m", "llmtune"]
SENTENCES = '{path: example:records/train, split: "train[:128]"}'
HELD_OUT = "example:records/heldout"
ANSWER = ["--max-new-tokens", "72", "--batch-size", "64"]
"""No record has more tokens."""
UNWATCHED = [
    "evaluation.before_training=false",
    "evaluation.exact_match=false",
    "evaluation.every_steps=null",
    "evaluation.prompts=[]",
    "data.eval=[]",
    "checkpoint.every_steps=1000",
    "checkpoint.keep_best=false",
]
"""Nothing is measured on the way: `llmtune predict` judges the end."""
HALF = ["--config", "quickstart", "training.max_steps=6", "training.lr_schedule=constant"]
ROWS = {"dpo": "pairs", "made-up": None, "kto": "labels", "grpo": None, "sft": "pairs"}
"""What each method learns from, as `llmtune predict --as` names it."""


def output_of(words: list[str]) -> str:
    """Run a command of llmtune to its end; returns what it prints."""
    return subprocess.run([*LLMTUNE, *words, "--offline"], check=True, stdout=subprocess.PIPE, text=True).stdout


def train(run: Path, words: list[str]) -> float:
    """Train a run unless it is finished; returns its minutes, 0 for one that was."""
    if (run / "checkpoints" / "final").is_dir():
        return 0.0
    began = time.monotonic()
    command = ["train", *words, *UNWATCHED, f"run.output_dir={run.parent}", f"run.name={run.name}"]
    output_of(["resume", str(run)] if (run / "checkpoints").is_dir() else command)
    return (time.monotonic() - began) / 60


def answers_of(run: Path, name: str, data: str, *more: str) -> list[dict[str, object]]:
    """What `llmtune predict` prints of the run's answers to these rows, kept as a file of the run."""
    path = run / f"{name}.jsonl"
    if not path.is_file():
        output_of(["predict", str(run), "--data", data, *ANSWER, *more, "--output", str(path)])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exact_answers(run: Path) -> tuple[int, int]:
    """Held-out sentences that the run's adapter answers exactly, of how many."""
    answers = answers_of(run, "heldout", HELD_OUT)
    return sum(bool(answer["exact"]) for answer in answers), len(answers)


def seeds(seed: int) -> list[str]:
    """The settings of a seed: what is drawn, and the order of the rows."""
    return [f"run.seed={seed}", f"data.shuffle_seed={seed}"]


def words_of(method: str, half: Path, seed: int) -> list[str]:
    """The command line of the second training, after `llmtune train`."""
    config = ROOT / "examples" / "preferences" / f"{'dpo' if method == 'made-up' else method}.yaml"
    words = ["--config", "quickstart" if method == "sft" else str(config), "--from", str(half)]
    words += seeds(seed)
    kind = ROWS[method]
    if kind is None:
        return words
    answers_of(half, f"own-{kind}", SENTENCES, "--as", kind)
    rows = half / f"own-{kind}.jsonl"
    if method == "sft":  # the right sides of the pairs, as often as dpo reads them, at the quickstart's own rate
        rows_of_pairs = f"data.train=[{{path: {rows}, columns: {{completion: chosen}}}}]"
        return [*words, rows_of_pairs, "training.epochs=1", "training.batch_size=4"]
    return [*words, f"data.train={rows}"]


def main() -> int:
    """Train the half-trained adapter, and each seed from it; print what each answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the runs are made")
    options = parser.parse_args()
    folder, gains = options.folder.resolve(), []
    for seed in options.seeds:
        half = folder / f"half-{seed}"
        train(half, [*HALF, *seeds(seed)])
        before, count = exact_answers(half)
        print(f"seed {seed}, half-trained: {before} of {count}", flush=True)
        run = folder / f"{options.method}-{seed}"
        minutes = train(run, words_of(options.method, half, seed))
        after, _ = exact_answers(run)
        gains.append(after - before)
        print(f"seed {seed}: {after} of {count} ({after - before:+}), {minutes:.1f} minutes of training", flush=True)
    print(f"gain: {statistics.fmean(gains):+.1f}, from {min(gains):+} to {max(gains):+}")
    return 0 if min(gains) > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
