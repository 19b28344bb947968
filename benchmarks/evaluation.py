"""Held-out loss of the same rows by llmtune, the Trainer and TRL; and answers one by one beside answers in batches.

    python benchmarks/evaluation.py [--rows 64] [--rounds 3] [--conversations FILE] [--answers 16]

All evaluate one model with one adapter in one process, in turn, at a batch size of 8 and in bf16; medians of the
rounds. Answers are made in float32 and must be the same in a batch and alone, or the exit code is 1. llmtune's loss is
that of all tokens, the others' a mean of the batches' means.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from starting_point import Rows, example_list, load_model
from trainer_contestant import make_trainer
from workloads import WORKLOADS, find_conversations, prepare, read, scaled

from llmtune.cli.process import prepare_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 8
PROMPTS = (
    "Name three colours.",
    "What is the capital of France?",
    "Write one sentence about rain.",
    "Count from one to five.",
)


def llmtune_evaluation(model: PreTrainedModel, rows: Rows) -> Callable[[], float]:
    """Evaluate as a run does: the run's own engine, longest rows first."""
    import torch

    from llmtune.config.schema import Config, ModelConfig, TrainingConfig
    from llmtune.data.dataset.batches import eval_batches
    from llmtune.engine.forward import build_engine
    from llmtune.engine.precision import Precision
    from llmtune.evaluation.heldout import evaluate

    device = torch.device("cpu")
    precision = Precision("bf16", device)
    engine = build_engine(
        model, config=Config(training=TrainingConfig(), model=ModelConfig()), device=device, precision=precision
    )
    examples = example_list(rows)

    def evaluate_once() -> float:
        batches = eval_batches(
            examples, batch_size=BATCH_SIZE, layout=engine.layout, pad_id=0, max_group_tokens=engine.max_group_tokens
        )
        with precision.autocast():
            return evaluate(engine.nll_sum, batches, model=model)["eval_mean_nll"]

    return evaluate_once


def trainer_evaluation(model: PreTrainedModel, rows: Rows, *, sft: bool) -> Callable[[], float]:
    """Evaluate with the Trainer of transformers or with TRL's, rows in their order.

    Their loss is a mean of the batches' means.
    """
    runner = make_trainer(scaled(WORKLOADS["lora"], BATCH_SIZE), model, rows, "cpu", BATCH_SIZE, sft=sft)
    return lambda: float(runner.evaluate(runner.train_dataset)["eval_loss"])


def answers(model: PreTrainedModel, count: int) -> tuple[float, float, bool]:
    """Seconds for `count` answers one after the other and in batches, and whether they are the same."""
    from llmtune.config.schema import ModelConfig
    from llmtune.data.rendering.renderer import Renderer
    from llmtune.evaluation.generate import generate
    from llmtune.models.catalog import resolve
    from llmtune.models.tokenizer import load_tokenizer

    source = resolve("smollm2-135m-instruct", offline=True)
    loaded = load_tokenizer(source, ModelConfig(name="smollm2-135m-instruct"))
    renderer = Renderer(loaded.tokenizer, train_on="all_assistant_messages")
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(count)]

    def timed(groups: list[list[str]]) -> tuple[float, list[str]]:
        began = time.perf_counter()
        texts = [
            answer.text
            for group in groups
            for answer in generate(model, loaded.tokenizer, renderer, group, max_new_tokens=32)
        ]
        return time.perf_counter() - began, texts

    alone, together = timed([[prompt] for prompt in prompts]), timed([prompts])
    return alone[0], together[0], alone[1] == together[1]


def main() -> int:
    """Parse, evaluate in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--conversations", type=Path, default=find_conversations())
    options = parser.parse_args()
    prepare_process(trains=True)  # before torch, as the commands do
    workload = scaled(WORKLOADS["lora"], options.rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        prepare(workload, folder, 1, options.conversations)
        _, rows = read(folder)
        models = {
            name: load_model(workload, "cpu", dtype) for name, dtype in (("llmtune", "auto"), ("trainer", "float32"))
        }
        runs = {
            "llmtune": llmtune_evaluation(models["llmtune"], rows),
            "trainer": trainer_evaluation(models["trainer"], rows, sft=False),
        }
        if importlib.util.find_spec("trl") is not None:
            runs["trl"] = trainer_evaluation(load_model(workload, "cpu", "float32"), rows, sft=True)
        results: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for name, run in runs.items():
                began = time.perf_counter()
                loss = run()
                results.setdefault(name, []).append((time.perf_counter() - began, loss))
        alone, together, same = answers(models["trainer"], options.answers)
    tokens = int(sum(len(ids) for ids, _ in rows))
    print(f"{len(rows)} held-out rows, {tokens} tokens")
    baseline = statistics.median(seconds for seconds, _ in results["llmtune"])
    for name, rounds in results.items():
        seconds = statistics.median(round_seconds for round_seconds, _ in rounds)
        ratio = f"{seconds / baseline:5.2f} x llmtune's time"
        print(f"{name:8} {seconds:7.2f} s {tokens / seconds:7.0f} tokens/s  {ratio}  loss {rounds[0][1]:.4f}")
    gain = f"{alone / together:.1f} x; the same: {same}"
    print(f"{options.answers} answers: {alone:.1f} s one by one, {together:.1f} s in batches of 8, {gain}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
