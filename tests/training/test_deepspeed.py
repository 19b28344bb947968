"""Runs whose weights DeepSpeed holds, through the real commands: the run is that of one process (N2, P9)."""

import importlib.util
import json
import math
import re
import shutil
import signal

import pytest

from rank_helpers import LONG, TwoRanks, wait_for_lines
from sharded_runs import FULL, LORA, has_the_state_of, is_one_run, is_the_run_never_stopped, trained
from training_helpers import lines_of, small_run

MISSING = [
    *(
        ["the package `deepspeed` (pip install 'llmtune[deepspeed]')"]
        if not importlib.util.find_spec("deepspeed")
        else []
    ),
    *(name for name in ("g++", "ninja") if shutil.which(name) is None),
]
pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}"),
]

CASES = {
    "full": FULL,
    "lora": LORA,
    "recomputed": (*LORA, "model.gradient_checkpointing=true"),
    "packed": (*FULL, "data.packing=best_fit", "data.max_length=64"),
}
TINY = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}}
"""DeepSpeed keeps small weights whole, so that of a tiny model it would divide nothing."""

OWN = ("-m", "llmtune")
"""An interpreter of its own: in a forked one a warning of the package's imports would be an error."""


@pytest.fixture(autouse=True, scope="module")
def _planned_bytes():
    """Several processes plan in earnest here."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "ds.json"
    path.write_text(json.dumps(TINY))
    return path


def words_of(stage, file):
    return ("distributed.strategy=deepspeed", f"distributed.zero_stage={stage}", f"distributed.deepspeed_config={file}")


def is_divided(held, stage, *, fused):
    """The engine is on in every process, with the fast paths; with stage 3 each holds a part of every weight."""
    for rank in held:
        decisions = rank["decisions"]
        assert decisions["distributed.strategy"] == "deepspeed"
        assert f"ZeRO stage {stage}" in rank["reasons"]["distributed.strategy"]
        assert decisions["training.engine"] == "flat"
        assert decisions.get("adapter.engine") == ("fused" if fused else None)
        total = sum(whole for _, whole in rank["shares"].values())
        own = sum(part for part, _ in rank["shares"].values())
        assert rank["here"] == (0 if stage == 3 else total)  # outside of a step no weight is there
        assert own == total if stage < 3 else own <= 1.05 * total / len(held)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_run_with_deepspeed_is_the_run_of_one_process(
    ranks_of, tiny_model_folder, untied_model_folder, file, kind, stage
):
    """30 steps; evaluated and asked for answers between them; windows in which a process has no row."""
    ranks = ranks_of(tiny_model_folder if kind == "tied" else untied_model_folder)
    cases = CASES if stage == 3 else {name: CASES[name] for name in ("full", "lora")}
    held = trained(ranks, 2, cases, "training.max_steps=30", together=words_of(stage, file))
    for name, words in cases.items():
        is_one_run(ranks.folder / f"{name}-1", ranks.folder / f"{name}-2")
        is_divided(held[name], stage, fused="adapter.method=none" not in words)


def test_tiles_with_deepspeed_are_the_run_of_one_process(ranks_of, untied_model_folder, file):
    ranks = ranks_of(untied_model_folder)
    tiled = (*LORA, "model.gradient_checkpointing=offload")
    held = trained(ranks, 2, {"tiled": tiled}, "training.max_steps=9", together=words_of(3, file))
    is_one_run(ranks.folder / "tiled-1", ranks.folder / "tiled-2")
    is_divided(held["tiled"], 3, fused=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_processes_with_deepspeed_are_one(ranks_of, untied_model_folder, file, stage):
    ranks = ranks_of(untied_model_folder)
    cases = {name: CASES[name] for name in ("full", "lora")}
    held = trained(ranks, 4, cases, "training.max_steps=30", together=words_of(stage, file))
    for name in cases:
        is_one_run(ranks.folder / f"{name}-1", ranks.folder / f"{name}-4")
        is_divided(held[name], stage, fused=name == "lora")


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_state_that_waits_on_the_host_changes_nothing(ranks_of, untied_model_folder, file, offload):
    ranks = ranks_of(untied_model_folder)
    words = (*words_of(3, file), f"distributed.offload={offload}")
    trained(ranks, 2, {"full": FULL}, "training.max_steps=12", together=words)
    is_one_run(ranks.folder / "full-1", ranks.folder / "full-2")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("words", [FULL, LORA], ids=["full", "lora"])
def test_p2_stopped_and_gone_on_with_it_is_the_same_bit_for_bit(ranks_of, untied_model_folder, file, words, stage):
    """Weights, both moments, random states, and every logged loss."""
    more = (*words_of(stage, file), "checkpoint.every_steps=6", "checkpoint.keep_last=0")
    ranks = ranks_of(untied_model_folder, *more, *words)
    ranks.run(
        2,
        ("train", "whole", ["training.max_steps=14"]),
        ("train", "cut", ["training.max_steps=14", "training.max_minutes=0.000001"]),
        ("resume", "cut", ["training.max_minutes=null"]),
        strategy="deepspeed",
    )
    is_the_run_never_stopped(ranks.folder / "cut", ranks.folder / "whole", 14)


@pytest.mark.parametrize("words", [FULL, LORA], ids=["full", "lora"])
def test_p9_a_run_goes_on_from_one_strategy_to_the_next(ranks_of, untied_model_folder, file, words):
    """2 whole -> 2 sharded -> 2 with each stage of ZeRO -> 1, four steps each; the same files in all."""
    constant = ("training.lr_schedule=constant", "training.warmup_steps=0")
    ranks = ranks_of(untied_model_folder, "checkpoint.every_steps=4", "checkpoint.keep_last=0", *constant, *words)
    strategies = [
        ("ddp", ()),
        ("fsdp", ()),
        *(("deepspeed", words_of(stage, file)) for stage in (3, 1, 2)),
        ("auto", ()),
    ]
    steps = [4 * (number + 1) for number in range(len(strategies))]
    ranks.run(1, ("train", "straight", [f"training.max_steps={steps[-1]}"]), strategy="auto")
    for number, (strategy, more) in enumerate(strategies):
        verb, allow = ("resume", ["--allow-changes"]) if number else ("train", [])
        clear = ["distributed.zero_stage=null", "distributed.deepspeed_config=null"] if number and not more else []
        given = [*allow, f"training.max_steps={steps[number]}", *clear, *more]
        ranks.run(1 if strategy == "auto" else 2, (verb, "moved", given), strategy=strategy)
    ours, theirs = ranks.folder / "moved", ranks.folder / "straight"
    for step in steps:
        has_the_state_of(ours, theirs, step, atol=1e-6)


def test_windows_that_are_not_finite_are_skipped_as_by_one_process(ranks_of, untied_model_folder, file):
    """The first step throws the weights far away; no window after it has a finite loss, and the run ends (exit 7)."""
    far = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.max_skipped_steps=2", *FULL)
    ranks = ranks_of(untied_model_folder, *far)
    ranks.run(1, ("train", "alone", []), strategy="auto", code=7)
    for stage in (1, 2, 3):
        ranks.run(2, ("train", f"stage-{stage}", [*words_of(stage, file)]), strategy="deepspeed", code=7)
    names = ("alone", "stage-1", "stage-2", "stage-3")
    alone, *others = ([line for line in lines_of(ranks.folder / name) if "train_mean_nll" in line] for name in names)
    assert [line.get("skipped", False) for line in alone] == [False, True, True]
    for together in others:
        for key in ("step", "skipped", "rows_digest"):
            assert [line.get(key) for line in together] == [line.get(key) for line in alone]
        for key in ("train_mean_nll", "grad_norm"):  # a skipped window has no number there
            expected = [math.nan if line.get(key) is None else line[key] for line in alone]
            found = [math.nan if line.get(key) is None else line[key] for line in together]
            assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.fixture(scope="module")
def long_words(tiny_model_folder, rows_file, file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    more = ("training.learning_rate=0.01", "distributed.timeout_s=60", "checkpoint.every_steps=50", LONG)
    return folder, small_run(tiny_model_folder, rows_file, folder, *more, *words_of(3, file))


def test_p8_a_signal_to_one_process_saves_once(long_words):
    folder, given = long_words
    both = TwoRanks("train", *given, "run.name=stopped", program=OWN)
    wait_for_lines(folder / "stopped", 4)
    both.processes[1].send_signal(signal.SIGTERM)
    codes, said = both.end()
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert len(re.findall(r"stopped by SIGTERM: saved after step", "".join(said))) == 1, said
    assert json.loads((folder / "stopped" / "run.json").read_text())["state"] == "stopped"


def test_p7_a_disk_that_refuses_the_main_process_ends_all(long_words):
    folder, given = long_words
    both = TwoRanks("train", *given, "run.name=refused", program=OWN)
    wait_for_lines(folder / "refused", 4)
    (folder / "refused" / "checkpoints").rename(folder / "away")
    (folder / "refused" / "checkpoints").write_text("")
    codes, said = both.end()
    assert codes == [6, 6], said
    assert "".join(said).count("error: ") == 1, said
