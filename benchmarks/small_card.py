"""A model on a card that cannot hold it, counted and not measured: `python benchmarks/small_card.py [--tokens 512]`.

QLoRA (NF4, rank 16 on all linear layers) with `model.offload_weights`, and blocks' inputs on the host too. Memory is
the plan's own. The frozen weights of all blocks but one cross the bus once in the forward and once in the backward
pass. So, with n blocks of W bytes together, T tokens in a micro-batch and B bytes a second over the bus,

    tokens a second <= T / (2 (n - 1) / n W / B)

and no more than the card computes.
"""

from __future__ import annotations

import argparse

import torch
from roofline import SHAPES, build

from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.plan.activation_trace import TRACED_BLOCKS, MicroBatchShape, Peaks, extrapolate, trace
from llmtune.plan.memory import division_of, plan_memory
from llmtune.plan.meta_model import count_sizes

BUSES = {"PCIe 3.0 x16": 12e9, "PCIe 4.0 x16": 24e9}
"""Bytes a second that copies from page-locked memory reach: three quarters of the bus's own 16 and 32 GB/s."""


def main() -> None:
    """Print a row for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048], help="of a micro-batch")
    options = parser.parse_args()
    blocks = int(SHAPES[options.shape]["num_hidden_layers"])
    print(f"QLoRA of {options.shape}, weights of blocks on the host; counted, not measured\n")
    print(f"| tokens | planned on the card | of it weights | on the host | resident | {' | '.join(BUSES)} |")
    print(f"| ---: |{' ---: |' * (4 + len(BUSES))}")
    for tokens in options.tokens:
        batch = MicroBatchShape((tokens,), round(0.8 * tokens), "flat")

        def peaks(count: int, batch: MicroBatchShape = batch) -> Peaks:
            return trace(
                build(options.shape, count), batch, device_type="cuda", compute=torch.bfloat16, checkpointing="offload",
                gradients="single", attention="varlen", is_quantized=True,
            )  # fmt: skip

        found = extrapolate(peaks(TRACED_BLOCKS), peaks(TRACED_BLOCKS + 1), blocks)
        plans = []
        for offload in (True, False):
            model = ModelConfig(quantization="4bit", gradient_checkpointing="offload", offload_weights=offload)
            config = Config(model=model, adapter=AdapterConfig(method="lora", r=16, alpha=32.0))
            plans.append(
                plan_memory(
                    count_sizes(build(options.shape, blocks), config), found, batch, kind="cuda", optimizer="adamw",
                    gradients="single", thread_caches=False, process_bytes=0, file_bytes=0,
                    division=division_of(config, 1),
                )
            )  # fmt: skip
        plan, resident = plans
        moved = 2 * (blocks - 1) / blocks * plan.sizes.offloaded_bytes
        cells = [plan.peak_bytes, plan.parts["weights"], plan.host_bytes, resident.peak_bytes]
        rates = [f"{tokens / (moved / bandwidth):,.0f}" for bandwidth in BUSES.values()]
        print(
            f"| {tokens:,} | {' | '.join(f'{one / 1e9:.2f} GB' for one in cells)} | {' | '.join(rates)} |", flush=True
        )


if __name__ == "__main__":
    main()
