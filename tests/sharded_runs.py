"""What the tests of runs whose weights are held in parts share: commands in several processes, and the run of one."""

import itertools
import json
import socket
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from llmtune.cli.main import run as command
from rank_helpers import end_of
from sharded_worker import run_commands
from training_helpers import Forked, lines_of, small_run, weights_of

ROWS = ("training.batch_size=1", "training.gradient_accumulation_steps=3", "training.learning_rate=0.001")
"""20 training rows in windows of 3 micro-batches: of two processes one has a row less, of four one has none, and in the
last window, of 2 rows, two have none.
"""
LOOKS = ("evaluation.every_steps=7", "evaluation.prompts=[the user asks]", "evaluation.max_new_tokens=4")
FULL = ("adapter.method=none",)
LORA = ("adapter.dropout=0",)


class Ranks:
    """Runs commands in several processes, in `folder`."""

    def __init__(self, folder, base):
        self.folder, self.base = folder, base
        self.numbers = itertools.count()

    def run(self, count, *commands, strategy="fsdp", code=0):
        """Run commands, (verb, name, words) each, in `count` processes; returns what each printed.

        The same processes run all of them, but for DeepSpeed, which takes one training a process.
        """
        if strategy == "deepspeed" and len(commands) > 1:
            held, said = {}, []
            for one in commands:
                said += self.run(count, one, strategy=strategy, code=code)
                held |= self.held
            self.held = held
            return said
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
        processes = [
            Forked(partial(run_commands, file, str(rank), str(count)), environ={"LLMTUNE_OFFLINE": "1"})
            for rank in range(count)
        ]
        codes, said = end_of(processes, longest_s=900)
        assert codes == [code] * count, "\n".join(said)
        self.held = {
            name: [json.loads((jobs / f"{name}-{rank}.json").read_text()) for rank in range(count)]
            for _, name, _ in commands
            if not code
        }
        return said


@pytest.fixture(scope="session")
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


def trained(ranks, count, cases, *more, together=()):
    """Run these cases in this process alone and in `count`, with `together` on top there.

    Returns what each of those held, by case.
    """
    for name, words in cases.items():
        assert command(["train", *ranks.base, f"run.name={name}-1", *words, *more]) == 0
    strategy = "deepspeed" if "distributed.strategy=deepspeed" in together else "fsdp"
    ranks.run(
        count,
        *(("train", f"{name}-{count}", [*words, *more, *together]) for name, words in cases.items()),
        strategy=strategy,
    )
    return {name: ranks.held[f"{name}-{count}"] for name in cases}


STATE = ("optimizer.safetensors", "rng.safetensors", "model.safetensors", "adapter_model.safetensors")


def state_of(run, step):
    folder = run / "checkpoints" / f"step-{step:06}"
    return {name: load_file(folder / name) for name in STATE if (folder / name).exists()}


def has_the_state_of(ours, theirs, step, *, atol=0.0):
    """The tensors of a checkpoint of two runs: weights, moments, and random states where all is the same to a bit."""
    expected, found = state_of(theirs, step), state_of(ours, step)
    assert len(expected) > 1
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        if atol == 0.0:
            assert all(torch.equal(found[name][key], tensor) for key, tensor in tensors.items()), name
        elif name != "rng.safetensors":
            for key, tensor in tensors.items():
                torch.testing.assert_close(found[name][key], tensor, rtol=0, atol=atol)


def is_the_run_never_stopped(cut, whole, step):
    """Every logged loss, the result, and the state of a checkpoint, bit for bit."""
    assert lines_of(cut) == lines_of(whole)
    assert weights_of(cut) == weights_of(whole)
    has_the_state_of(cut, whole, step)
