"""Sharded runs through the real commands: the run is that of one process, whatever is trained (N2, P9)."""

import errno
import json
import os
import platform
import shutil

import pytest
from safetensors.torch import load_file, save_file

from llmtune import durable
from llmtune.cli.main import run as command
from rank_helpers import in_two_ranks
from sharded_runs import FULL, LORA, has_the_state_of, is_one_run, is_the_run_never_stopped, trained
from training_helpers import small_run

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


@pytest.fixture(autouse=True, scope="module")
def _planned_bytes():
    """Several processes plan in earnest here."""


def is_sharded(held, *, engine="flat", fused=True):
    """Every weight is in parts in every process, equal as far as its rows divide, and the fast paths are on."""
    for rank in held:
        assert rank["decisions"]["distributed.strategy"] == "fsdp"
        assert rank["decisions"]["training.engine"] == engine
        assert rank["decisions"].get("adapter.engine") == ("fused" if fused else None)
        assert all("DTensor" in kind for kind in rank["kinds"]), rank["kinds"]
        # Larger ones, gathered and dropped again and again, would leave gaps.
        assert platform.libc_ver()[0] != "glibc" or rank["decisions"]["process.allocator"].endswith(" up to 4 MiB")
    shares = [rank["shares"] for rank in held]
    for name, (_, whole) in shares[0].items():
        parts = [share[name][0] for share in shares]
        assert sum(parts) == whole
    total = sum(whole for _, whole in shares[0].values())
    for share in shares:
        assert sum(part for part, _ in share.values()) <= 1.1 * total / len(held)


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
    infos = [json.loads((ranks.folder / f"{case}-{count}" / "run.json").read_text()) for count in (1, 2)]
    for part, alone in infos[0]["measured_bytes"].items():
        assert infos[1]["measured_bytes"][part] == pytest.approx(alone / 2, rel=0.1), part


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


@pytest.mark.campaign
def test_files_in_another_type_are_converted_block_by_block(ranks_of, untied_model_folder, tmp_path):
    shutil.copytree(untied_model_folder, tmp_path / "stored")
    file = tmp_path / "stored" / "model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file, {"format": "pt"})
    ranks = ranks_of(tmp_path / "stored")
    held = trained(ranks, 2, {"full": FULL}, "training.max_steps=9")
    is_one_run(ranks.folder / "full-1", ranks.folder / "full-2")
    is_sharded(held["full"], fused=False)


@pytest.mark.campaign
def test_parts_that_wait_on_the_host_change_nothing(ranks_of, untied_model_folder):
    """On a CPU, where nothing has to move: the arithmetic, the optimizer's device and the files."""
    ranks = ranks_of(untied_model_folder)
    cases = {name: CASES[name] for name in ("full", "lora")}
    held = trained(ranks, 2, cases, "training.max_steps=12", together=("distributed.offload=all",))
    for name in cases:
        is_one_run(ranks.folder / f"{name}-1", ranks.folder / f"{name}-2")
        is_sharded(held[name], fused=name == "lora")
        assert held[name][0]["decisions"]["distributed.offload"] == "all"


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
    is_the_run_never_stopped(cut, whole, 14)
    assert len(list((cut / "checkpoints").glob("step-*"))) == 4  # the first by the clock, then 6, 12 and 14


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
        has_the_state_of(ours, theirs, step, atol=1e-6)


class Refuses(durable.SystemBackend):
    """A disk that is full in the middle of a checkpoint's optimizer state: once, or from then on."""

    def __init__(self, *, once):
        self.refusals, self.writes = 1 if once else 1000, 0

    def call(self, operation, *arguments):
        if operation == "open":
            self.writes = 6 if "optimizer.safetensors" in str(arguments[0]) else 1000000
        elif operation == "write":
            self.writes -= 1
            if self.writes <= 0 < self.refusals:
                self.refusals -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().call(operation, *arguments)


@pytest.mark.campaign
@pytest.mark.parametrize("once", [True, False])
def test_p7_a_disk_that_refuses_in_the_middle_of_a_sharded_save_leaves_nobody_waiting(
    tiny_model_folder, rows_file, tmp_path, once
):
    """Tensors are gathered while the file is written; then it is written again, or all processes end."""
    more = (*FULL, "distributed.strategy=fsdp", "training.max_steps=4", "distributed.timeout_s=30")
    given = small_run(tiny_model_folder, rows_file, tmp_path, *more)

    def refused():
        with durable.use_backend(Refuses(once=once)):
            return command(["train", *given, "run.name=refused"])

    codes, said = in_two_ranks(refused)
    assert codes == ([0, 0] if once else [6, 6]), said
    if once:
        assert in_two_ranks(lambda: command(["train", *given, "run.name=whole"]))[0] == [0, 0]
        for name in ("optimizer.safetensors", "model.safetensors"):
            saved = [tmp_path / run / "checkpoints" / "step-000004" / name for run in ("refused", "whole")]
            assert saved[0].read_bytes() == saved[1].read_bytes()
