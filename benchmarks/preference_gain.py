"""What a preference method adds to a half-trained adapter: exact answers of the record task before and after, by seed.

    python benchmarks/preference_gain.py dpo-own      # also dpo, kto, grpo, and sft: the same adapter, supervised on
    python benchmarks/preference_gain.py dpo-own --seeds 1 --folder runs

The half-trained adapter is that of the quickstart after 6 of its 80 steps, at a constant rate. From it each seed trains
by a config of `examples/preferences` with the few settings of `SECOND`; `llmtune evaluate` counts the held-out
sentences of `example:records/heldout` that are answered character by character. `dpo-own` learns from pairs that
`llmtune predict --only-wrong` makes: the adapter's own wrong answers to 64 sentences, and the right ones. What is in
the folder already is kept: a command that was stopped goes on.
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
QUIET = ["evaluation.before_training=false", "evaluation.exact_match=false", "evaluation.prompts=[]"]
"""Nothing is measured on the way: `llmtune evaluate` judges the end."""

FIRST = ["training.max_steps=6", "training.lr_schedule=constant"]
COMMON = [
    "training.max_steps=8",
    "training.gradient_accumulation_steps=1",
    "training.lr_schedule=constant",
    "training.warmup_ratio=0",
    "evaluation.every_steps=null",
    "data.eval=[]",
    "checkpoint.every_steps=1000",
    "checkpoint.keep_best=false",
]
SECOND = {
    "dpo-own": ["training.batch_size=4", "training.learning_rate=3e-4", "objective.sft_weight=1"],
    "dpo": ["training.batch_size=4", "training.learning_rate=3e-4"],
    "kto": ["training.batch_size=8", "training.learning_rate=3e-4"],
    "grpo": ["training.batch_size=2", "training.learning_rate=3e-4", "objective.max_new_tokens=72"],
    "sft": ["training.batch_size=4", "training.learning_rate=3e-4"],
}
"""Settings by method: 8 steps of 4 pairs, of 8 answers, of 2 prompts with 8 answers each, of 4 rows."""


def config_of(method: str) -> str:
    """The config that is trained; supervised training goes on with the quickstart's own rows."""
    name = method.removesuffix("-own")
    return "quickstart" if method == "sft" else str(ROOT / "examples" / "preferences" / f"{name}.yaml")


def own_mistakes(folder: Path, run: Path) -> Path:
    """Pairs of the right answer and the run's own wrong one, to the rows of `ASKED`."""
    rows, pairs = folder / "asked.jsonl", folder / "own-mistakes.jsonl"
    lines = (ROOT / "example-data" / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines()[ASKED]
    rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = ["--data", str(rows), "--only-wrong", "--max-new-tokens", "72", "--offline"]
    command = [*LLMTUNE, "predict", str(run), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    with pairs.open("w", encoding="utf-8") as file:
        for one in map(json.loads, done.stdout.splitlines()):
            messages = json.loads(lines[int(one["source"].rpartition(":")[2]) - 1])["messages"]
            sides = {"chosen": one["reference"], "rejected": one["answer"]}
            answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            file.write(json.dumps({"prompt": messages[:-1], **answers}) + "\n")
    return pairs


ASKED = slice(160, 224)
"""Rows of the training file that are answered for `dpo-own`."""


def train(folder: Path, name: str, words: list[str]) -> float:
    """Train a run unless it is finished; returns its minutes."""
    run = folder / name
    if (run / "checkpoints" / "final").is_dir():
        return 0.0
    began = time.monotonic()
    command = [*LLMTUNE, "train", *words, *QUIET, "--offline", f"run.output_dir={folder}", f"run.name={name}"]
    if (run / "run.json").is_file():
        command = [*LLMTUNE, "resume", str(run)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return (time.monotonic() - began) / 60


def exact_answers(run: Path) -> tuple[int, int]:
    """Held-out sentences that the run's adapter answers exactly, of how many."""
    words = ["--data", "example:records/heldout", "--exact-match", "--max-new-tokens", "72", "--batch-size", "30"]
    command = [*LLMTUNE, "evaluate", str(run), *words, "--offline", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return int(figures["eval_exact_answers"]), int(figures["eval_num_answers"])


def main() -> int:
    """Train the half-trained adapter, then each seed; print what each answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=SECOND)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the runs are made")
    options = parser.parse_args()
    folder = options.folder.resolve()
    train(folder, "half", ["--config", "quickstart", *FIRST])
    half = folder / "half"
    right, count = exact_answers(half)
    print(f"half-trained: {right} of {count}", flush=True)
    data = [f"data.train={own_mistakes(folder, half)}"] if options.method == "dpo-own" else []
    gains = []
    for seed in options.seeds:
        name = f"{options.method}-{seed}"
        words = ["--config", config_of(options.method), "--from", str(half), *COMMON, *SECOND[options.method], *data]
        minutes = train(folder, name, [*words, f"run.seed={seed}"])
        found, _ = exact_answers(folder / name)
        gains.append(found - right)
        print(f"{name}: {found} of {count} ({found - right:+}), {minutes:.1f} minutes of training", flush=True)
    print(f"gain: {statistics.fmean(gains):+.1f}, from {min(gains):+} to {max(gains):+}")
    return 0 if min(gains) > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
