"""Full tuning by optimizer: tokens a second and peak memory of each, in turn, in a process of its own; random weights of a published shape.

    python benchmarks/full_tuning.py --device cuda [--shape llama-3.2-1b] [--tokens 4096] [--steps 8]
    python benchmarks/full_tuning.py --device cpu --shape tiny --tokens 256

One micro-batch a step, blocks recomputed, bf16 arithmetic, float32 weights. Paged optimizers keep their state where the driver can move it
to the CPU's memory, so they take part on CUDA only. `+ in backward` is `training.step_in_backward`. Peaks are bytes allocated by tensors
on CUDA and resident bytes of the process on a CPU. The losses of a row are those of the row without `+ in backward`, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from workloads import SHAPES

IN_BACKWARD = " + in backward"
VARIANTS = tuple(name + way for name in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit") for way in ("", IN_BACKWARD))
TINY = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4096}
LOSS_TOLERANCE = 1e-2


def train(variant: str, shape: str, tokens: int, steps: int, device: str) -> dict[str, Any]:
    """Train one variant with the rooms that a run uses; returns its rate without the first step, its peak and its losses."""
    from llmtune.cli.process import prepare_process

    prepare_process(trains=True)  # before torch, as the commands do
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmtune.config.schema import Config, ModelConfig
    from llmtune.data.batches import BatchPlan
    from llmtune.data.example import Example, ExampleList
    from llmtune.training.devices import Devices
    from llmtune.training.engine import build_engine
    from llmtune.training.loop import train_steps
    from llmtune.training.optim import build_optimizer
    from llmtune.training.precision import Precision
    from llmtune.training.state import TrainingState
    from llmtune.training.step_in_backward import StepInBackward
    from llmtune.training.update import AfterBackward

    place, rate = torch.device(device), 1e-5
    torch.manual_seed(0)
    with place:
        model = LlamaForCausalLM(LlamaConfig(**(SHAPES | {"tiny": TINY})[shape])).train()
    precision, devices = Precision("bf16", place), Devices(place)
    engine = build_engine(model, config=Config(model=ModelConfig(gradient_checkpointing=True)), device=place, precision=precision)
    parameters = dict(model.named_parameters())
    name = variant.removesuffix(IN_BACKWARD)
    optimizer, _ = build_optimizer(name, parameters, learning_rate=rate, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, device=place)  # type: ignore[arg-type]
    weights = list(parameters.values())
    ordinary = AfterBackward(weights, optimizer, precision, devices, max_grad_norm=None)
    drawn = np.random.default_rng(0)
    rows = [drawn.integers(10, model.config.vocab_size, tokens).astype(np.int32) for _ in range(steps)]
    trained = np.concatenate([[0], np.ones(tokens - 1)]).astype(np.float32)
    examples = ExampleList([Example(f"row:{number}", ids, trained) for number, ids in enumerate(rows)])
    packs = [np.array([number]) for number in range(steps)]
    windows = BatchPlan(
        examples, packs, batch_size=1, accumulation=1, epochs=1, max_steps=None, shuffle_seed=None, layout=engine.layout
    ).windows()
    results = list(
        train_steps(
            nll_sum=engine.nll_sum,
            update=StepInBackward(weights, optimizer) if variant != name else ordinary,
            windows=windows,
            learning_rate=lambda _step: rate,
            precision=precision,
            state=TrainingState(),
            devices=devices,
            max_skipped_steps=0,
        )
    )
    seconds = sum(one.step_seconds for one in results[1:])
    return {
        "tokens_per_second": tokens * (steps - 1) / seconds,
        "peak_bytes": results[-1].memory_bytes,
        "losses": [one.train_mean_nll for one in results],
    }


def main() -> int:
    """Run each variant in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=4096, help="of the one row of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=VARIANTS, help="run this one here and print its figures as JSON")
    options = parser.parse_args()
    given = (options.shape, options.tokens, options.steps, options.device)
    if options.only:
        print(json.dumps(train(options.only, *given)))
        return 0
    print(f"full tuning of {options.shape}, {options.steps} steps of {options.tokens} tokens on {options.device}\n")
    print("| optimizer | tokens/s | peak GB | last loss |\n| --- | ---: | ---: | ---: |", flush=True)
    found: dict[str, dict[str, Any]] = {}
    failed = False
    for variant in VARIANTS:
        if options.device == "cpu" and variant.startswith("paged"):
            continue
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", variant], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"| {variant} | not run: {(done.stderr.strip().splitlines() or [f'exit {done.returncode}'])[-1]} |", flush=True)
            failed = True
            continue
        found[variant] = figures = json.loads(done.stdout.strip().splitlines()[-1])
        twin = found.get(variant.removesuffix(IN_BACKWARD), figures)
        apart = max(abs(one - other) for one, other in zip(figures["losses"], twin["losses"], strict=True))
        failed |= apart > LOSS_TOLERANCE
        last = f"{figures['losses'][-1]:.4f}" + (f" APART BY {apart:.1e}" if apart > LOSS_TOLERANCE else "")
        print(f"| {variant} | {figures['tokens_per_second']:.0f} | {figures['peak_bytes'] / 1e9:.2f} | {last} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
