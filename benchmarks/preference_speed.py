"""Train DPO with llmtune and with TRL in turn, and supervised fine-tuning beside them: rates and memory.

    python benchmarks/preference_speed.py [--rounds 2] [--steps 4] [--pairs 2]

The pairs have the lengths of real ones: prompts about 120 tokens, answers about 200, log-normal, made of sentences of
the example stories. The model is smollm2-135m-instruct with a new LoRA adapter, which is switched off for the
reference; float32. Each contestant runs in a process of its own, a round runs each once. The first step is left out of
a rate. `trl-best` takes micro-batches of one pair. `llmtune-sft` trains both sides of the same pairs as rows of
supervised fine-tuning: its memory is what that of DPO is compared with.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MODEL, RANK, RATE, BETA = "smollm2-135m-instruct", 16, 1e-4, 0.1
CONTESTANTS = ("llmtune", "trl", "trl-best", "llmtune-sft")
WORDS_A_TOKEN = 0.8
"""Of the example stories, about."""


class Figures(NamedTuple):
    """What one contestant did."""

    seconds: list[float]
    """Of each step."""
    losses: list[float]
    peak_bytes: int
    """Largest resident memory of its process."""

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step, without the first."""
        return statistics.fmean(self.seconds[1:] or self.seconds)


def write_rows(folder: Path, count: int) -> None:
    """Write `pairs.jsonl`, and both sides of each pair as `sides.jsonl`."""
    draw = random.Random(0)
    stories = (ROOT / "example-data" / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for line in stories for word in json.loads(line)["text"].split()]

    def text(median: int, shortest: int, longest: int) -> str:
        length = min(longest, max(shortest, round(draw.lognormvariate(math.log(median), 0.5))))
        start = draw.randrange(len(words) - longest)
        return " ".join(words[start : start + max(1, round(length * WORDS_A_TOKEN))])

    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "sides.jsonl").open("w") as sides:
        for _ in range(count):
            prompt = [{"role": "user", "content": text(120, 16, 400)}]
            answers = {side: [{"role": "assistant", "content": text(200, 16, 500)}] for side in ("chosen", "rejected")}
            pairs.write(json.dumps({"prompt": prompt, **answers}) + "\n")
            sides.writelines(json.dumps({"messages": prompt + answer}) + "\n" for answer in answers.values())


def by_llmtune(folder: Path, name: str, pairs: int, steps: int) -> Figures:
    """Train by the command line, and read the steps from the run's metrics."""
    supervised = name == "llmtune-sft"
    settings = [
        f"model.name={MODEL}",
        "adapter.method=lora",
        f"adapter.r={RANK}",
        f"adapter.alpha={2 * RANK}",
        f"data.train={folder / ('sides' if supervised else 'pairs')}.jsonl",
        "data.max_length=1024",
        "data.shuffle_seed=null",
        f"objective.method={'sft' if supervised else 'dpo'}",
        f"training.batch_size={2 * pairs if supervised else pairs}",
        f"training.max_steps={steps}",
        f"training.learning_rate={RATE}",
        "training.lr_schedule=constant",
        "training.warmup_ratio=0",
        "training.precision=fp32",
        "evaluation.before_training=false",
        "evaluation.prompts=[]",
        "checkpoint.every_steps=1000",
        f"run.output_dir={folder}",
        f"run.name={name}",
        "tracking.trackers=[jsonl]",
    ]
    peak = run([sys.executable, "-m", "llmtune", "train", *settings, "--offline", "--no-cuda"])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    (folder / name).rename(folder / f"{name}-{time.monotonic_ns()}")
    made = [line for line in lines if "step_seconds" in line]
    losses = [line.get("train_loss", line.get("train_mean_nll")) for line in made]
    return Figures([line["step_seconds"] for line in made], losses, peak)


def by_trl(folder: Path, name: str, pairs: int, steps: int) -> Figures:
    """Train in a process of its own (`--trl`), which writes its steps."""
    micro_batch = 1 if name == "trl-best" else pairs
    words = ["--trl", str(folder), "--pairs", str(pairs), "--steps", str(steps), "--micro-batch", str(micro_batch)]
    peak = run([sys.executable, __file__, *words])
    made = json.loads((folder / "trl.json").read_text(encoding="utf-8"))
    return Figures(made["seconds"], made["losses"], peak)


def run(command: list[str]) -> int:
    """Run a command; returns the largest resident memory of its process, in bytes."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"a contestant failed: {' '.join(command)}")
    return usage.ru_maxrss * 1024


def trl_steps(folder: Path, pairs: int, steps: int, micro_batch: int) -> None:
    """Train by TRL's DPOTrainer, and write `trl.json`."""
    import datasets
    import starting_point
    import transformers
    import trl
    from trainer_contestant import in_order
    from workloads import WORKLOADS

    from llmtune.config.schema import ModelConfig
    from llmtune.models.catalog import resolve
    from llmtune.models.tokenizer import load_tokenizer

    made: dict[str, list[float]] = {"seconds": [], "losses": []}

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_args: object, **_kwargs: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_args: object, **_kwargs: object) -> None:
            made["seconds"].append(time.perf_counter() - self.began)

        def on_log(self, *_args: object, logs: dict[str, float] | None = None, **_kwargs: object) -> None:
            if logs and "loss" in logs:
                made["losses"].append(float(logs["loss"]))

    datasets.disable_progress_bars()
    model = starting_point.load_model(WORKLOADS["lora"], "cpu", "float32")
    tokenizer = load_tokenizer(resolve(MODEL, offline=True), ModelConfig(name=MODEL)).tokenizer
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "unused"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": pairs // micro_batch,
        "max_steps": steps,
        "learning_rate": RATE,
        "beta": BETA,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_length": 1024,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    trainer = in_order(trl.DPOTrainer)(
        model=model,
        args=trl.DPOConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    (folder / "trl.json").write_text(json.dumps(made), encoding="utf-8")


def table(rounds: dict[str, list[Figures]]) -> str:
    """The medians over the rounds, as Markdown."""
    base = statistics.median(one.peak_bytes for one in rounds["llmtune-sft"])
    lines = ["| | s a step | times llmtune's | peak MB | of SFT's | losses |", "| --- " * 6 + "|"]
    for name, all_rounds in rounds.items():
        seconds = [one.step_seconds for one in all_rounds]
        ratios = [
            theirs.step_seconds / ours.step_seconds for theirs, ours in zip(all_rounds, rounds["llmtune"], strict=True)
        ]
        peak = statistics.median(one.peak_bytes for one in all_rounds)
        losses = ", ".join(f"{loss:.4f}" for loss in all_rounds[0].losses[:4])
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = f"{peak / 1e6:.0f} | {peak / base:.2f}"
        lines.append(f"| {name} | {statistics.median(seconds):.2f} | {spread} | {memory} | {losses} |")
    return "\n".join(lines)


def main() -> int:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2, help="of a step")
    parser.add_argument("--only", nargs="*", default=CONTESTANTS)
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: pip install --no-deps trl==1.16.0", file=sys.stderr)
        return 2
    if options.trl:
        trl_steps(options.trl, options.pairs, options.steps, options.micro_batch)
        return 0
    names = ("torch", "transformers", "trl", "llmtune")
    print(f"{options.pairs} pairs a step; {', '.join(f'{name} {version(name)}' for name in names)}")
    rounds: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder, options.pairs * options.steps)
        for number in range(options.rounds):
            for name in options.only:
                train = by_trl if name.startswith("trl") else by_llmtune
                figures = train(folder, name, options.pairs, options.steps)
                rounds.setdefault(name, []).append(figures)
                print(f"  round {number + 1}: {name} {figures.step_seconds:.2f} s a step", file=sys.stderr, flush=True)
    print(table(rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
