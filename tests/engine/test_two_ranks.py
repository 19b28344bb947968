"""N2: two processes are one process, whatever falls to each of them."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from llmtune.engine.choose_device import choose_device, peak_memory_bytes
from llmtune.engine.devices import Devices
from llmtune.engine.state import capture, restore
from llmtune.errors import MachineError, Problem
from rank_helpers import in_two_ranks
from training_helpers import in_child


def resume_is_exact(bench, devices):
    """P2 with dropout, each rank drawing from generators of its own: stopped after 3 steps and gone on with, nothing
    differs.
    """

    def start():
        model = bench.model(attention_dropout=0.2)
        plan = bench.plan(
            bench.examples(13),
            batch_size=2,
            accumulation=1,
            epochs=2,
            world_size=devices.world_size,
            rank=devices.rank,
        )
        torch.manual_seed(100 + devices.rank)
        return bench.training(model, plan, devices=devices)

    whole = start()
    losses = [result.train_mean_nll for result in whole.run()]
    first = start()
    steps = first.steps()
    for _ in range(3):
        next(steps)
    parts = {
        "parameters": first.parameters,
        "optimizer": first.optimizer,
        "precision": first.precision,
        "state": first.state,
    }
    snapshot = capture(**parts, devices=devices)
    assert len(snapshot.tensors["rng"]["torch"]) == devices.world_size
    main_s = capture(**parts, devices=devices, keep=devices.is_main)
    assert bool(main_s.tensors["optimizer"]) == devices.is_main
    assert main_s.state == snapshot.state
    second = start()
    torch.manual_seed(0)
    second.model.load_state_dict(first.model.state_dict())
    parts = {
        "parameters": second.parameters,
        "optimizer": second.optimizer,
        "precision": second.precision,
        "state": second.state,
    }
    restore(snapshot, **parts, devices=devices)
    assert [result.train_mean_nll for result in second.run()] == losses[3:]
    assert bench.same_bits(second.weights(), whole.weights())


def decisions_are_the_main_process_s(devices):
    """Answers, work and refusals of rank 0 are those of every rank; the largest of each value wins; an error is
    reported by one rank alone.
    """
    assert devices.largest(devices.rank, -1.0, 7) == (devices.world_size - 1, -1.0, 7)
    assert devices.from_main({"rank": devices.rank}) == {"rank": 0}
    done = devices.on_main(lambda: devices.rank)
    assert done == (0 if devices.is_main else None)

    def refuse():
        raise MachineError.all([Problem("the disk is full", "/there", "make room"), Problem("and slow")])

    with pytest.raises(MachineError) as refused:
        devices.on_main(refuse)
    assert refused.value.exit_code == 6
    assert [problem.problem for problem in refused.value.problems] == ["the disk is full", "and slow"]
    assert refused.value.is_reported is (None if devices.world_size == 1 else not devices.is_main)
    own = MachineError("each by itself")
    with pytest.raises(MachineError), devices.errors_printed_once():
        raise own
    assert devices.sum(float(not own.is_reported)) == (1.0,)


def train_and_compare(bench, output):
    """Train 13 sequences an epoch in windows of 4: the last window of an epoch has a single row, so one of two ranks
    gets none.
    """
    devices = Devices.from_environment(no_cuda=True, timeout_s=60)
    for packing in ("none", "best_fit"):
        model = bench.model(seed=devices.rank)  # only the broadcast makes them equal
        model.unused = torch.nn.Parameter(torch.ones(3))  # has a gradient on no rank
        devices.broadcast(model.parameters())
        plan = bench.plan(
            bench.examples(13, empty_every=6),
            packing=packing,
            batch_size=4,
            accumulation=1,
            epochs=3,
            world_size=devices.world_size,
            rank=devices.rank,
        )
        training = bench.training(model, plan, learning_rate=3e-3)
        training.devices = devices
        shares = [plan.window(step).num_sequences for step in range(1, plan.total_steps + 1)]
        results = training.run()
        name = f"{packing}-{devices.world_size}-{devices.rank}"
        save_file(training.weights(), f"{output}/{name}.safetensors")
        lines = [
            {
                "loss": r.train_mean_nll,
                "norm": r.grad_norm,
                "tokens": r.num_tokens,
                "weight": r.num_loss_tokens,
                "rows": r.num_sequences,
            }
            for r in results
        ]
        Path(f"{output}/{name}.json").write_text(json.dumps({"lines": lines, "shares": shares}))
    resume_is_exact(bench, devices)
    ranks = devices.gather_rows(torch.tensor([devices.rank, 7]))
    assert ranks.tolist() == [[rank, 7] for rank in range(devices.world_size)]
    assert devices.sum(1.0, float(devices.rank)) == (devices.world_size, sum(range(devices.world_size)))
    decisions_are_the_main_process_s(devices)
    place = {"rank": devices.rank, "world_size": devices.world_size}
    devices.close()
    # What is done after the end is done by each process alone; one of them is still the main one.
    assert (devices.rank, devices.world_size, devices.is_main) == (0, 1, place["rank"] == 0)
    assert devices.sum(3.0) == (3.0,)
    if place["world_size"] > 1:
        a_group_of_another_program_is_joined_and_left_standing(output, place)


def a_group_of_another_program_is_joined_and_left_standing(output, place):
    """Ray Train, for one, has made the process group before a training begins."""
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{output}/group", **place)
    joined = Devices.from_environment(no_cuda=True, timeout_s=60)
    assert joined.sum(1.0) == (joined.world_size,)
    assert joined.from_main("same" if joined.is_main else "other") == "same"
    joined.close()
    assert dist.is_initialized()


@pytest.fixture(scope="module")
def outputs(bench, tmp_path_factory):
    """Trains as one process and as two."""
    output = tmp_path_factory.mktemp("ranks")
    assert in_child(lambda: train_and_compare(bench, output)) == 0
    codes, said = in_two_ranks(lambda: train_and_compare(bench, output))
    assert codes == [0, 0], "\n".join(said)
    return output


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_two_processes_are_one(bench, outputs, packing):
    """N2: losses, norms and weights within 1e-6, with unequal tokens on the ranks and windows in which a rank has no
    row.
    """
    alone = json.loads((outputs / f"{packing}-1-0.json").read_text())
    ranks = [json.loads((outputs / f"{packing}-2-{rank}.json").read_text()) for rank in range(2)]
    shares = list(zip(ranks[0]["shares"], ranks[1]["shares"], strict=True))
    assert [sum(share) for share in shares] == alone["shares"]
    assert packing != "none" or any(0 in share for share in shares)
    assert ranks[0]["lines"] == ranks[1]["lines"]
    for ours, theirs in zip(ranks[0]["lines"], alone["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
        assert [ours[key] for key in ("tokens", "weight", "rows")] == [
            theirs[key] for key in ("tokens", "weight", "rows")
        ]
    weights = [load_file(outputs / f"{packing}-2-{rank}.safetensors") for rank in range(2)]
    whole = load_file(outputs / f"{packing}-1-0.safetensors")
    assert bench.same_bits(weights[0], weights[1])
    assert bench.relative_difference(weights[0], whole) < 1e-6
    assert (whole["unused"] == 1).all()
    assert (weights[0]["unused"] == 1).all()


def test_a_launcher_that_sets_half_the_environment_is_refused():
    with pytest.raises(MachineError, match="WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is not set"):
        Devices.from_environment(no_cuda=True, timeout_s=1, environ={"WORLD_SIZE": "2", "RANK": "0"})


def test_a_single_process_sums_nothing():
    devices = Devices.from_environment(no_cuda=True, timeout_s=1, environ={})
    assert (devices.rank, devices.world_size, devices.is_main) == (0, 1, True)
    assert devices.sum(0.1, 3) == (0.1, 3)
    value = torch.tensor([0.5])
    assert devices.sum_tensor(value) is value
    assert devices.gather_rows(value).tolist() == [[0.5]]


def test_the_device_is_chosen_with_a_reason():
    device, decision = choose_device(no_cuda=True)
    assert (device.type, decision.value, decision.reason) == ("cpu", "cpu", "--no-cuda was given")


def test_a_process_without_a_gpu_beside_others_that_have_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MachineError, match="process 2 of this machine has no GPU: there are 2"):
        choose_device(environ={"LOCAL_RANK": "2"})


def test_peak_memory_never_falls():
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(50_000_000 // 4)
    assert peak_memory_bytes(torch.device("cpu")) >= before >= block.numel()
