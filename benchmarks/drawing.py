"""Draw 8 answers to each of 8 prompts by llmtune and by `generate` of transformers, in turn, and print the ratios.

    python benchmarks/drawing.py [--rounds 3] [--answers 8] [--max-new-tokens 64] [--adapter FOLDER] [--plain]

The prompts are held-out ones of the record task, the model is smollm2-135m-instruct with a LoRA adapter, as GRPO draws
through it: a new one, or that of FOLDER. llmtune draws with the kernels that it trains with (`--plain`: without them),
`generate` with the modules of transformers and peft. At temperature 0 both must give the same tokens, or the exit code
is 1; at temperature 1 they draw others, so the rate counts the tokens up to each answer's end. `generate` gets each
prompt as often as it has answers, in one padded batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import starting_point  # noqa: F401 - the environment of the libraries, before they are imported

from llmtune.cli.process import prepare_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "smollm2-135m-instruct"
PROMPTS = 8


class Task(NamedTuple):
    """The model and what it answers."""

    model: PreTrainedModel
    prompts: list[list[int]]
    stops: tuple[int, ...]
    pad_id: int


def load(adapter: Path | None) -> Task:
    """Load the model with its adapter, and the prompts as ids."""
    import torch

    from llmtune.adapters.attach import attach_adapter
    from llmtune.config.schema import AdapterConfig, ModelConfig
    from llmtune.data.example import Message
    from llmtune.data.rendering.renderer import Renderer
    from llmtune.models.catalog import resolve
    from llmtune.models.load import load_model
    from llmtune.models.tokenizer import load_tokenizer

    source, config = resolve(MODEL, offline=True), ModelConfig(name=MODEL, dtype="float32")
    tokenizer = load_tokenizer(source, config).tokenizer
    model = load_model(
        source,
        config,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        trained="adapter",
        precision="fp32",
        seed=0,
    ).model
    if adapter is None:
        tuned, _ = attach_adapter(model, AdapterConfig(method="lora", r=16, alpha=32), seed=0)
    else:
        from peft import PeftModel

        tuned = PeftModel.from_pretrained(model, str(adapter))
    renderer = Renderer(tokenizer, train_on="all_assistant_messages")
    prompts = [
        renderer.prompt_ids([Message(one["role"], one["content"]) for one in row["messages"][:-1]])
        for row in records()[:PROMPTS]
    ]
    return Task(tuned.eval(), prompts, renderer.stop_token_ids, int(tokenizer.pad_token_id or 0))  # type: ignore[arg-type]


def records() -> list[dict[str, list[dict[str, str]]]]:
    """The held-out rows of the record task."""
    path = Path(__file__).resolve().parents[1] / "example-data" / "records" / "heldout.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_llmtune(task: Task, answers: int, max_new_tokens: int, temperature: float, round_number: int) -> list[list[int]]:
    """The answers one after the other, each with its stop token."""
    from llmtune.evaluation.draw import answer_seed, draw_answers

    seeds = [[answer_seed(round_number, prompt, number) for number in range(answers)] for prompt in range(PROMPTS)]
    drawn = draw_answers(
        task.model,
        task.prompts,
        seeds,
        stop_token_ids=task.stops,
        pad_id=task.pad_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=PROMPTS * answers,
    )
    return [answer for group in drawn for answer in group]


def by_generate(
    task: Task, answers: int, max_new_tokens: int, temperature: float, round_number: int
) -> list[list[int]]:
    """The same by `generate`, which gets every prompt once for each answer."""
    import torch

    from llmtune.evaluation.generate import contiguous_rows_for_head
    from llmtune.models.parameters import base_model_of

    longest = max(map(len, task.prompts))
    rows = [([task.pad_id] * (longest - len(ids)) + ids, [0] * (longest - len(ids)) + [1] * len(ids))
            for ids in task.prompts for _ in range(answers)]  # fmt: skip
    torch.manual_seed(round_number)
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    # The same help that llmtune's own answers get: without it, the head copies its weight for each row.
    with torch.no_grad(), contiguous_rows_for_head(base_model_of(task.model)):
        output = task.model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([ids for ids, _ in rows]),
            attention_mask=torch.tensor([mask for _, mask in rows]),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(task.stops),
            pad_token_id=task.pad_id,
            **chosen,
        )
    return [_until_stop(ids, set(task.stops)) for ids in output[:, longest:].tolist()]


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def main() -> int:
    """Draw in turn, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=8, help="to each of the 8 prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--plain", action="store_true", help="draw without the kernels that training uses")
    options = parser.parse_args()
    prepare_process(trains=True)  # before torch, as the commands do
    from llmtune.kernels.patch_model import patch_model, undo_patches

    task = load(options.adapter)
    print(f"prompts of {min(map(len, task.prompts))} to {max(map(len, task.prompts))} tokens")
    are_same = True
    for temperature in options.temperature:
        rates: dict[str, list[float]] = {"llmtune": [], "generate": []}
        drawn: dict[str, list[list[int]]] = {}
        for number in range(options.rounds):
            for name, draw in (("llmtune", by_llmtune), ("generate", by_generate)):
                if name == "llmtune" and not options.plain:
                    patch_model(task.model, "cpu")
                else:
                    undo_patches(task.model)
                began = time.perf_counter()
                drawn[name] = draw(task, options.answers, options.max_new_tokens, temperature, number)
                rates[name].append(sum(map(len, drawn[name])) / (time.perf_counter() - began))
            print(f"  round {number + 1}: {rates['llmtune'][-1]:.0f}, {rates['generate'][-1]:.0f}", file=sys.stderr)
        ratios = [ours / theirs for ours, theirs in zip(rates["llmtune"], rates["generate"], strict=True)]
        same = drawn["llmtune"] == drawn["generate"]
        are_same = are_same and (same or temperature > 0)
        verdict = f"; the same tokens: {same}" if temperature == 0 else ""
        lengths = sorted(map(len, drawn["llmtune"]))
        print(
            f"temperature {temperature:g}: llmtune {statistics.median(rates['llmtune']):.0f} tokens/s, generate "
            f"{statistics.median(rates['generate']):.0f}; median ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}); answers of {lengths[0]} to {lengths[-1]} tokens{verdict}"
        )
    return 0 if are_same else 1


if __name__ == "__main__":
    raise SystemExit(main())
