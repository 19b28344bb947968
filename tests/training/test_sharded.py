"""Sharded runs through the real commands: the run is that of one process, whatever is trained (N2, P9)."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune.cli.main import run as command
from training_helpers import lines_of, small_run, weights_of

WORKER = Path(__file__).with_name("sharded_worker.py")
LONGEST_S = 240

ROWS = ("training.batch_size=1", "training.gradient_accumulation_steps=3", "training.learning_rate=0.001")
"""20 training rows in windows of 3 micro-batches: of two processes one has a row less, of four one has none, and in the
last window, of 2 rows, two have none.
"""
LOOKS = ("evaluation.every_steps=7", "evaluation.prompts=[the user asks]", "evaluation.max_new_tokens=4")
FULL = ("adapter.method=none",)
LORA = ("adapter.dropout=0",)
CASES = {
    "full": FULL,
    "lora": LORA,
    "4bit": (*LORA, "model.quantization=4bit"),
    "dora": (*LORA, "adapter.dora=true"),
    "saved": (*LORA, "adapter.modules_to_save=[lm_head]"),
    "tokens": (*LORA, 'adapter.train_tokens=["<|im_start|>"]'),
    "recomputed": (*LORA, "model.gradient_checkpointing=true"),
    "tiled": (*LORA, "model.gradient_checkpointing=offload"),
    "packed": (*FULL, "data.packing=best_fit", "data.max_length=64"),
    "plain": (*LORA, "training.engine=plain"),
}


class Ranks:
    """Runs commands in several processes, in `folder`."""

    def __init__(self, folder, base):
        self.folder, self.base = folder, base
        self.numbers = itertools.count()

    def run(self, count, *commands, strategy="fsdp", code=0):
        """Run commands, (verb, name, words) each, in `count` processes; returns what each printed."""
        jobs = self.folder / f"commands-{next(self.numbers)}"
        jobs.mkdir()
        file, written = jobs / "commands.json", []
        for verb, name, words in commands:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            given = [str(self.folder / name)] if verb == "resume" else [*self.base, f"run.name={name}"]
            given += [f"distributed.strategy={strategy}", *words]
            written.append({"name": name, "port": port, "words": [verb, *given]})
        file.write_text(json.dumps(written))
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LLMTUNE_OFFLINE": "1", "PYTHONPATH": paths}
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(file), str(rank), str(count)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            said = [process.communicate(timeout=LONGEST_S)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [code] * count, "\n".join(said)
        self.held = {
            name: [json.loads((jobs / f"{name}-{rank}.json").read_text()) for rank in range(count)]
            for _, name, _ in commands
            if not code
        }
        return said


@pytest.fixture(scope="module")
def untied_model_folder(tiny_model_folder, tmp_path_factory):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_model_folder)
    config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("untied-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranks_of(rows_file, tmp_path_factory):
    """Make `Ranks` over a model's folder."""

    def make(model, *words):
        folder = tmp_path_factory.mktemp("sharded")
        return Ranks(folder, small_run(model, rows_file, folder, *ROWS, *LOOKS, "distributed.timeout_s=60", *words))

    return make


def is_one_run(alone, together):
    """The same rows at every step, every loss within 1e-6, the same answers, files with the same tensors."""
    ours, theirs = lines_of(together), lines_of(alone)
    assert len(ours) == len(theirs) > 5
    for here, there in zip(ours, theirs, strict=True):
        assert here.keys() == there.keys()
        for key in ("step", "rows_digest", "num_tokens", "num_loss_tokens", "eval_num_loss_tokens"):
            assert here.get(key) == there.get(key)
        for key, close in (("train_mean_nll", 1e-6), ("eval_mean_nll", 1e-6), ("grad_norm", 1e-5)):
            assert here.get(key) == (pytest.approx(there[key], rel=close) if key in there else None), here["step"]
    tensors = [
        {name: load_file(run / "checkpoints" / "final" / name) for name in weights_of(run)} for run in (alone, together)
    ]
    for name, whole in tensors[0].items():
        assert tensors[1][name].keys() == whole.keys()
        for key, weight in whole.items():
            assert torch.allclose(tensors[1][name][key], weight, rtol=0, atol=2e-6), key
    assert (together / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()


def is_sharded(held, *, engine="flat", fused=True):
    """Every weight is in parts in every process, equal as far as its rows divide, and the fast paths are on."""
    for rank in held:
        assert rank["decisions"]["distributed.strategy"] == "fsdp"
        assert rank["decisions"]["training.engine"] == engine
        assert rank["decisions"].get("adapter.engine") == ("fused" if fused else None)
    shares = [rank["shares"] for rank in held]
    for name, (_, whole) in shares[0].items():
        parts = [share[name][0] for share in shares]
        assert None not in parts, name
        assert sum(parts) == whole
    total = sum(whole for _, whole in shares[0].values())
    for share in shares:
        assert sum(part for part, _ in share.values()) <= 1.1 * total / len(held)


def trained(ranks, count, cases, *more):
    """Run these cases in this process alone and in `count`; returns what each of those held, by case."""
    for name, words in cases.items():
        assert command(["train", *ranks.base, f"run.name={name}-1", *words, *more]) == 0
    ranks.run(count, *(("train", f"{name}-{count}", [*words, *more]) for name, words in cases.items()))
    return {name: ranks.held[f"{name}-{count}"] for name in cases}


@pytest.fixture(scope="module")
def two(ranks_of, untied_model_folder):
    ranks = ranks_of(untied_model_folder)
    return ranks, trained(ranks, 2, {case: CASES[case] for case in ("full", "4bit")}, "training.max_steps=9")


@pytest.mark.parametrize("case", ["full", "4bit"])
def test_two_processes_with_a_half_of_every_weight_are_one(two, case):
    """Evaluated and asked for answers between steps; a window has more rows for one process than for the other."""
    ranks, held = two
    is_one_run(ranks.folder / f"{case}-1", ranks.folder / f"{case}-2")
    is_sharded(held[case], fused=case == "4bit")


@pytest.mark.campaign
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_sharded_run_is_the_run_of_one_process(ranks_of, tiny_model_folder, untied_model_folder, kind, count):
    ranks = ranks_of(tiny_model_folder if kind == "tied" else untied_model_folder)
    held = trained(ranks, count, CASES, "training.max_steps=30")
    for name, words in CASES.items():
        is_one_run(ranks.folder / f"{name}-1", ranks.folder / f"{name}-{count}")
        fused = "adapter.method=none" not in words and name not in ("dora", "plain")
        is_sharded(held[name], engine="plain" if name == "plain" else "flat", fused=fused)
    assert "2 feed-forward modules" in held["tiled"][0]["reasons"]["training.tiles"]


STATE = ("optimizer.safetensors", "rng.safetensors", "model.safetensors", "adapter_model.safetensors")


def state_of(run, step):
    folder = run / "checkpoints" / f"step-{step:06}"
    return {name: load_file(folder / name) for name in STATE if (folder / name).exists()}


@pytest.mark.campaign
@pytest.mark.parametrize("words", [FULL, LORA, CASES["4bit"]], ids=["full", "lora", "4bit"])
def test_p2_a_sharded_run_stopped_and_gone_on_with_is_the_same_bit_for_bit(ranks_of, untied_model_folder, words):
    """Weights, both moments, random states, and every logged loss."""
    ranks = ranks_of(untied_model_folder, "checkpoint.every_steps=6", "checkpoint.keep_last=0", *words)
    ranks.run(
        2,
        ("train", "whole", ["training.max_steps=14"]),
        ("train", "cut", ["training.max_steps=14", "training.max_minutes=0.000001"]),
        ("resume", "cut", ["training.max_minutes=null"]),
    )
    whole, cut = ranks.folder / "whole", ranks.folder / "cut"
    assert lines_of(cut) == lines_of(whole)
    assert weights_of(cut) == weights_of(whole)
    assert len(list((cut / "checkpoints").glob("step-*"))) == 4  # the first by the clock, then 6, 12 and 14
    for name, tensors in state_of(whole, 14).items():
        here = state_of(cut, 14)[name]
        assert here.keys() == tensors.keys()
        assert all(torch.equal(tensor, here[key]) for key, tensor in tensors.items())


@pytest.mark.campaign
@pytest.mark.parametrize("words", [FULL, LORA], ids=["full", "lora"])
def test_p9_a_run_goes_on_with_other_processes_and_another_strategy(ranks_of, untied_model_folder, words):
    """1 -> 2 sharded -> 4 sharded -> 2 whole -> 1, four steps each; a checkpoint has the same files in all."""
    constant = ("training.lr_schedule=constant", "training.warmup_steps=0")
    ranks = ranks_of(untied_model_folder, "checkpoint.every_steps=4", "checkpoint.keep_last=0", *constant, *words)
    length = [f"training.max_steps={steps}" for steps in (4, 8, 12, 16, 20)]
    ranks.run(1, ("train", "moved", [length[0]]), ("train", "straight", [length[4]]))
    for count, strategy, steps in ((2, "fsdp", 1), (4, "fsdp", 2), (2, "ddp", 3), (1, "auto", 4)):
        ranks.run(count, ("resume", "moved", ["--allow-changes", length[steps]]), strategy=strategy)
    ours, theirs = ranks.folder / "moved", ranks.folder / "straight"
    for step in (4, 8, 12, 16, 20):
        for name, tensors in state_of(theirs, step).items():
            here = state_of(ours, step)[name]
            assert here.keys() == tensors.keys()
            if name != "rng.safetensors":
                assert all(torch.allclose(here[key], tensor, rtol=0, atol=1e-6) for key, tensor in tensors.items())
