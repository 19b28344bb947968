"""Rows that several processes share, through the real commands: the run is that of one process (N2, P9)."""

import json

import pytest

from llmtune.cli.main import run as command
from llmtune.config.schema import Config, DistributedConfig
from llmtune.errors import UsageError
from llmtune.training import objectives
from rank_helpers import TwoRanks
from sharded_runs import FULL, LORA, is_one_run, is_the_run_never_stopped
from training_helpers import lines_of, small_run

SHARED = "distributed.sequence_parallel=2"


def decisions_of(run):
    decisions = json.loads((run / "run.json").read_text())["decisions"]
    return {one["key"]: (str(one["value"]), one["reason"]) for one in decisions}


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    """KEY=VALUE words of a packed run of 4 steps; `folder / NAME` is where it lies."""
    folder = tmp_path_factory.mktemp("shared-rows")
    packed = ("data.packing=best_fit", "data.max_length=64", "training.max_steps=4", "adapter.dropout=0")
    return folder, small_run(tiny_model_folder, rows_file, folder, *packed, "distributed.timeout_s=60")


def test_two_processes_that_share_every_row_are_one(words):
    """Packed rows, LoRA: the same rows, tokens and losses at every step, and the fast paths stay on."""
    folder, given = words
    assert command(["train", *given, "run.name=alone"]) == 0
    codes, said = TwoRanks("train", *given, "run.name=shared", SHARED).end()
    assert codes == [0, 0], "\n".join(said)
    alone, shared = lines_of(folder / "alone"), lines_of(folder / "shared")
    assert len(alone) == len(shared) > 4
    for here, there in zip(shared, alone, strict=True):
        assert here.keys() == there.keys()
        for key, value in there.items():
            close = 1e-5 if key == "grad_norm" else 1e-6
            is_measured = key.endswith(("mean_nll", "grad_norm", "perplexity", "bits_per_byte"))
            assert here[key] == (pytest.approx(value, rel=close) if is_measured else value), key
    decisions = decisions_of(folder / "shared")
    assert decisions["training.engine"][0] == "flat"
    assert decisions["adapter.engine"][0] == "fused"
    assert decisions["distributed.sequence_parallel"][0] == "2"
    assert "each has 1/2 of its positions, and 2 of 4 heads" in decisions["distributed.sequence_parallel"][1]
    assert said[0].count("shared by 1 group of 2 processes") == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("objective.method=dpo", "answers are drawn and compared only where a process computes the whole row"),
        ("training.engine=plain", "the plain engine computes whole rows"),
        ("training.neftune_alpha=5", "noise is drawn for whole rows"),
    ],
)
def test_what_needs_whole_rows_is_refused_by_name(words, capsys, given, text):
    assert command(["train", *words[1], SHARED, given]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert "distributed.sequence_parallel" in said


def test_one_process_shares_its_rows_with_nobody(words, capsys):
    assert command(["train", *words[1], SHARED]) == 2
    assert "1 process was started, and 2 share each row" in capsys.readouterr().err


def test_a_loss_of_ones_own_is_refused_by_name():
    with pytest.raises(UsageError, match="log-probabilities of whole rows"):
        objectives.own_objectives(None, None, Config(distributed=DistributedConfig(sequence_parallel=2)))


GROUPS = {
    "one group of two": (2, 2, "ddp"),
    "one group of two, sharded": (2, 2, "fsdp"),
    "two groups of two": (4, 2, "ddp"),
    "two groups of two, sharded": (4, 2, "fsdp"),
    "one group of four, sharded": (4, 4, "fsdp"),  # more than there are key heads
}


@pytest.mark.campaign
@pytest.mark.parametrize("groups", GROUPS)
def test_a_run_whose_rows_are_shared_is_the_run_of_one_process(ranks_of, untied_model_folder, groups):
    """Windows of 3 rows, so of two groups one has a row less; evaluated and asked for answers between steps."""
    count, sharing, strategy = GROUPS[groups]
    ranks = ranks_of(untied_model_folder, "training.max_steps=30")
    packed = ("data.packing=best_fit", "data.max_length=64")
    cases = {
        "full": FULL,
        "lora": LORA,
        "4bit": (*LORA, "model.quantization=4bit"),
        "recomputed": (*LORA, "model.gradient_checkpointing=true"),
        "packed": (*FULL, *packed),
        "packed-lora": (*LORA, *packed),
    }
    for name, words in cases.items():
        assert command(["train", *ranks.base, f"run.name={name}-1", *words]) == 0
    shared = f"distributed.sequence_parallel={sharing}"
    runs = [("train", f"{name}-{count}", [*words, shared]) for name, words in cases.items()]
    ranks.run(count, *runs, strategy=strategy)
    for name in cases:
        is_one_run(ranks.folder / f"{name}-1", ranks.folder / f"{name}-{count}")
        held = ranks.held[f"{name}-{count}"]
        assert all(rank["decisions"]["training.engine"] == "flat" for rank in held)
        assert all(rank["decisions"]["distributed.sequence_parallel"] == str(sharing) for rank in held)
        assert all(rank["decisions"]["distributed.strategy"] == strategy for rank in held if strategy == "fsdp")


@pytest.mark.campaign
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("words", [FULL, LORA], ids=["full", "lora"])
def test_p2_stopped_and_gone_on_with_shared_rows_is_the_same_bit_for_bit(
    ranks_of, untied_model_folder, words, strategy
):
    """Weights, both moments, random states, and every logged loss."""
    more = ("checkpoint.every_steps=6", "checkpoint.keep_last=0", "training.max_steps=14")
    ranks = ranks_of(untied_model_folder, *more, *words)
    ranks.run(
        2,
        ("train", "whole", [SHARED]),
        ("train", "cut", [SHARED, "training.max_minutes=0.000001"]),
        ("resume", "cut", ["training.max_minutes=null"]),
        strategy=strategy,
    )
    is_the_run_never_stopped(ranks.folder / "cut", ranks.folder / "whole", 14)
