"""Train custom-tiny from nothing on real text, by llmtune and by the plain Trainer of transformers, and compare them.

    python benchmarks/scratch_vs_trainer.py [--model custom-tiny] [--steps 60] [--rounds 3] [--text FILE]

Both get the same initial weights, rows, order, batches, AdamW, schedule, clipping and steps, in float32 on the CPU.
llmtune runs as it does for a user: from a config, with its run folder, evaluation and checkpoint. The Trainer gets a
folder that plain transformers loads, the rows of each step as token ids, and its own loop; its held-out loss is
computed by the library's forward, with nothing of llmtune in the process.

The text is Python's own documentation: the docstrings of its standard library, a document a module, and its language
reference (`pydoc_data.topics`), a document a topic; 2.2 MB. Each contestant runs in a process of its own, in turn; a
round runs each once. Exit code 1 where held-out losses or bits per byte differ by more than 1e-3.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_contestant import in_order

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.data.dataset.batches import MicroBatch

TOLERANCE = 1e-3
"""Largest difference of held-out nats per token and of bits per byte."""

PEAK_RATE, WARMUP_STEPS, DECAY, ROW_TOKENS = 1e-3, 5, 0.1, 256
HELD_OUT_EVERY = 40
"""Every so many documents one is held out."""


def documents_of_python() -> list[str]:
    """The docstrings of every module of the standard library but its tests, then the language reference by topic."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(
            path.relative_to(library).parts
        ):
            continue
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named = [
            node
            for node in nodes
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        text = "\n\n".join(
            f"{getattr(node, 'name', path.stem)}: {docstring}"
            for node in named
            if (docstring := ast.get_docstring(node))
        )
        if len(text) > 200:
            documents.append(text)
    return [*documents, *(topics[name] for name in sorted(topics))]


def prepare(
    folder: Path, documents: list[str], *, model: str, steps: int, batch_size: int, overrides: tuple[str, ...] = ()
) -> None:
    """Write the config, the tokenizer, the model before step 1, the rows of every step and the held-out rows."""
    from llmtune.config.layers import load_config
    from llmtune.config.process_options import Options
    from llmtune.data.dataset.batches import eval_batches
    from llmtune.models.read_config import quiet_libraries
    from llmtune.models.save import write_tokenizer
    from llmtune.models.scratch import build_config, build_model
    from llmtune.prepare import prepare as prepare_run

    held_out = documents[::HELD_OUT_EVERY]
    train = [text for number, text in enumerate(documents) if number % HELD_OUT_EVERY]
    for name, part in (("train", train), ("heldout", held_out)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8"
        )
    words = [
        *(f"{key}={json.dumps(value)}" for key, value in settings(folder, model, steps, batch_size).items()),
        *overrides,
    ]
    prepared = prepare_run(load_config(None, overrides=words, environ={}), Options(no_cuda=True, offline=True))
    config, tokenizer = prepared.config, prepared.tokenizer.tokenizer
    for name in ("tokenizer", "model"):
        (folder / name).mkdir()
    write_tokenizer(tokenizer, folder / "tokenizer")
    with quiet_libraries():
        start = build_model(build_config(model, config.model.architecture, tokenizer), seed=config.run.seed)
        start.save_pretrained(folder / "model")
    batches = [batch for window in prepared.batch_plan().windows() for batch in window.micro_batches]
    assert len(batches) == steps
    write_batches(folder / "steps.npz", batches)
    tested = eval_batches(prepared.data.eval, batch_size=batch_size, layout="padded", pad_id=tokenizer.pad_token_id)
    write_batches(folder / "tested.npz", tested)
    about = {
        "overrides": [*words, f"model.tokenizer={folder / 'tokenizer'}"],
        "held_out_bytes": predicted_bytes(held_out, tokenizer),
        "steps": steps,
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def settings(folder: Path, model: str, steps: int, batch_size: int) -> dict[str, Any]:
    """The config of the run, key by key."""
    return {
        "model.name": model,
        "data.train": [str(folder / "train.jsonl")],
        "data.eval": [str(folder / "heldout.jsonl")],
        "data.format": "text",
        "data.max_length": ROW_TOKENS,
        "data.overlong": "split",
        "data.cache_dir": str(folder / "cache"),
        "run.output_dir": str(folder / "runs"),
        "training.max_steps": steps,
        "training.batch_size": batch_size,
        "training.learning_rate": PEAK_RATE,
        "training.weight_decay": DECAY,
        "training.lr_schedule": "cosine",
        "training.warmup_steps": WARMUP_STEPS,
        "training.precision": "fp32",
        "evaluation.before_training": False,
        "tracking.trackers": ["jsonl"],
    }


def write_batches(path: Path, batches: Iterable[MicroBatch]) -> None:
    """Write micro-batches as the library takes them: ids, labels (-100 where nothing is predicted), attention mask."""
    import numpy as np

    arrays = {}
    for number, batch in enumerate(batches):
        ids, weights = batch.input_ids.numpy(), batch.weights.numpy()
        arrays[f"ids-{number:05}"] = ids
        arrays[f"labels-{number:05}"] = np.where(weights > 0, ids, -100)
        arrays[f"mask-{number:05}"] = (
            np.ones_like(ids) if batch.attention_mask is None else batch.attention_mask.numpy()
        )
    np.savez(path, **arrays)


def predicted_bytes(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the predicted text: all but each document's first token; the control token at its end has none."""
    firsts = [tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in documents]
    return sum(len(text.encode()) for text in documents) - sum(len(tokenizer.decode(ids).encode()) for ids in firsts)


def train_with_llmtune(folder: Path) -> dict[str, Any]:
    """Train as a user does, and read the run's own figures."""
    from llmtune import Trainer, load_config

    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    trainer = Trainer(
        load_config(None, overrides=about["overrides"]), no_cuda=True, offline=True, print_line=lambda _: None
    )
    losses, seconds, processor = [], [], []
    last = time.process_time()
    for step in trainer.steps():
        losses.append(step.train_mean_nll)
        seconds.append(step.step_seconds)
        now = time.process_time()
        processor.append(now - last)
        last = now
    result = trainer.result()
    decisions = [str(decision) for decision in trainer.session.setup.engine.decisions]
    return {
        "losses": losses,
        "seconds": seconds,
        "processor": processor,
        "heldout": result.metrics["eval_mean_nll"],
        "bits_per_byte": result.metrics["eval_bits_per_byte"],
        "parameters": trainer.session.setup.counts.total,
        "decisions": decisions,
    }


def train_with_trainer(folder: Path) -> dict[str, Any]:
    """Train with the Trainer of transformers; nothing of llmtune is imported."""
    import torch
    import transformers

    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    losses: list[float] = []
    seconds: list[float] = []
    processor: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.last = time.perf_counter(), time.process_time()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            now = time.perf_counter(), time.process_time()
            seconds.append(now[0] - self.last[0])
            processor.append(now[1] - self.last[1])
            self.last = now

        def on_log(self, *_args: Any, logs: dict[str, float] | None = None, **_kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=1,  # an item of the data set is the whole padded batch of a step
        max_steps=about["steps"],
        learning_rate=PEAK_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_STEPS,
        optim="adamw_torch_fused",
        weight_decay=DECAY,
        max_grad_norm=1.0,
        use_cpu=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = read_batches(folder / "steps.npz")
    in_order(transformers.Trainer)(
        model=model, args=arguments, train_dataset=data, data_collator=lambda items: items[0], callbacks=[Clock()]
    ).train()
    nats, count = held_out_nats(model, read_batches(folder / "tested.npz"))
    return {
        "losses": losses,
        "seconds": seconds,
        "processor": processor,
        "heldout": nats / count,
        "bits_per_byte": nats / (math.log(2) * about["held_out_bytes"]),
        "parameters": model.num_parameters(),
        "decisions": [],
    }


def read_batches(path: Path) -> list[dict[str, Any]]:
    """Read the micro-batches that `write_batches` wrote."""
    import numpy as np
    import torch

    keys = {"input_ids": "ids", "labels": "labels", "attention_mask": "mask"}
    with np.load(path) as stored:
        count = len(stored.files) // len(keys)
        return [
            {key: torch.from_numpy(stored[f"{short}-{n:05}"]).long() for key, short in keys.items()}
            for n in range(count)
        ]


def held_out_nats(model: PreTrainedModel, batches: list[dict[str, Any]]) -> tuple[float, int]:
    """Sum of negative log-likelihoods, in float64 from the library's own logits, and the number of predicted tokens."""
    import torch

    nats, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            targets_N = batch.pop("labels")[:, 1:].flatten()
            logits_NV = model(**batch).logits[:, :-1].double().flatten(0, 1)
            nats += float(torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=-100, reduction="sum"))
            count += int((targets_N != -100).sum())
    return nats, count


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """Differences of two runs: the largest of any step, on the held-out documents, in bits per byte."""
    assert len(first["losses"]) == len(second["losses"])
    differences = [abs(loss - other) for loss, other in zip(first["losses"], second["losses"], strict=True)]
    return {
        "largest difference of a step's loss": max(differences),
        "held-out nats per token": abs(first["heldout"] - second["heldout"]),
        "bits per byte": abs(first["bits_per_byte"] - second["bits_per_byte"]),
    }


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run one contestant in a process of its own."""
    process = subprocess.run(
        [sys.executable, __file__, "--contestant", name, str(folder)], check=False, capture_output=True, text=True
    )
    if process.returncode != 0:
        raise SystemExit(f"{name}: {process.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return figures


def _without_ends(runs: list[dict[str, Any]], key: str) -> list[float]:
    """Times of all steps but the first and the last: kernels are chosen in the one, llmtune saves after the other."""
    return [seconds for figures in runs for seconds in figures[key][1:-1]]


def report(rounds: dict[str, list[dict[str, Any]]], tokens: int) -> bool:
    """Print the table and the curves; returns whether held-out losses agree."""
    print(
        "| | held-out nats per token | bits per byte | step, s | tokens/s | step, processor s |\n" + "| --- " * 6 + "|"
    )
    for name, runs in rounds.items():
        wall, processor = (statistics.median(_without_ends(runs, key)) for key in ("seconds", "processor"))
        heldout, bits = runs[0]["heldout"], runs[0]["bits_per_byte"]
        print(f"| {name} | {heldout:.6f} | {bits:.6f} | {wall:.3f} | {tokens / wall:,.0f} | {processor:.3f} |")
    print()
    for key, measure in (("seconds", "by the clock"), ("processor", "in processor seconds")):
        medians = {
            name: [statistics.median(_without_ends([run], key)) for run in runs] for name, runs in rounds.items()
        }
        ratios = [other / own for own, other in zip(medians["llmtune"], medians["trainer"], strict=True)]
        by_round = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"llmtune is {statistics.median(ratios):.2f} times as fast {measure} (by round: {by_round})")
    differences = compare(rounds["llmtune"][0], rounds["trainer"][0])
    for name, value in differences.items():
        print(f"{name}: {value:.2e}")
    print("\n| step | llmtune | trainer |\n| --- | --- | --- |")
    losses = {name: runs[0]["losses"] for name, runs in rounds.items()}
    count = len(losses["llmtune"])
    for step in sorted({1, *range(10, count + 1, 10), count}):
        print(f"| {step} | {losses['llmtune'][step - 1]:.5f} | {losses['trainer'][step - 1]:.5f} |")
    return max(differences["held-out nats per token"], differences["bits per byte"]) <= TOLERANCE


CONTESTANTS = {"llmtune": train_with_llmtune, "trainer": train_with_trainer}


def main() -> int:
    """Parse, prepare, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="custom-tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--text", type=Path, help="a text file, one document a paragraph, in place of Python's documentation"
    )
    parser.add_argument("--contestant", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the config of both")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    if options.contestant:
        name, folder = options.contestant
        print(json.dumps(CONTESTANTS[name](Path(folder))))
        return 0
    documents = options.text.read_text(encoding="utf-8").split("\n\n") if options.text else documents_of_python()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(
            folder,
            documents,
            model=options.model,
            steps=options.steps,
            batch_size=options.batch_size,
            overrides=tuple(options.overrides),
        )
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
        for number in range(options.rounds):
            for name in CONTESTANTS:
                rounds[name].append(run(name, folder))
                print(
                    f"  round {number + 1}: {name} {statistics.median(rounds[name][-1]['seconds']):.3f} s a step",
                    file=sys.stderr,
                )
    first = rounds["llmtune"][0]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "llmtune"))
    steps = f"{options.steps} steps of {options.batch_size} rows of {ROW_TOKENS} tokens"
    print(f"{options.model}, {first['parameters']:,} parameters, {steps}; float32")
    print(f"{os.cpu_count()} cores, {platform.machine()}; {versions}")
    print("; ".join(first["decisions"]) + "\n")
    return 0 if report(rounds, options.batch_size * ROW_TOKENS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
