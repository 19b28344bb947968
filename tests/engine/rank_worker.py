"""One rank of the N2 test: trains its share of every window and writes what it ends with.

Run as `python rank_worker.py OUTPUT` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, or alone.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtune.errors import LlmtuneError, MachineError, Problem


def load_bench():
    """The bench of conftest.py, without pytest."""
    spec = importlib.util.spec_from_file_location("bench_of_conftest", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def resume_is_exact(bench, devices):
    """P2 with dropout, each rank drawing from generators of its own: stopped after 3 steps and gone on with, nothing
    differs.
    """
    from llmtune.engine.state import capture, restore

    def start():
        model = bench.make_model(attention_dropout=0.2)
        plan = bench.make_plan(
            bench.make_examples(13),
            batch_size=2,
            accumulation=1,
            epochs=2,
            world_size=devices.world_size,
            rank=devices.rank,
        )
        torch.manual_seed(100 + devices.rank)
        return bench.Training(model, plan, devices=devices)

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

    with pytest.raises(LlmtuneError) as refused:
        devices.on_main(refuse)
    assert refused.value.exit_code == 6
    assert [problem.problem for problem in refused.value.problems] == ["the disk is full", "and slow"]
    assert refused.value.is_reported is (None if devices.is_main else True)
    own = MachineError("each by itself")
    with pytest.raises(MachineError), devices.errors_printed_once():
        raise own
    assert devices.sum(float(not own.is_reported)) == (1.0,)


def main(output):
    """Train 13 sequences an epoch in windows of 4: the last window of an epoch has a single row, so one of two ranks
    gets none.
    """
    from llmtune.engine.devices import Devices

    torch.set_num_threads(1)
    bench = load_bench()
    devices = Devices.from_environment(no_cuda=True, timeout_s=60)
    for packing in ("none", "best_fit"):
        model = bench.make_model(seed=devices.rank)  # only the broadcast makes them equal
        model.unused = torch.nn.Parameter(torch.ones(3))  # has a gradient on no rank
        devices.broadcast(model.parameters())
        plan = bench.make_plan(
            bench.make_examples(13, empty_every=6),
            packing=packing,
            batch_size=4,
            accumulation=1,
            epochs=3,
            world_size=devices.world_size,
            rank=devices.rank,
        )
        training = bench.Training(model, plan, learning_rate=3e-3)
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
    devices.close()
    if devices.world_size > 1:
        a_group_of_another_program_is_joined_and_left_standing(output, devices)


def a_group_of_another_program_is_joined_and_left_standing(output, devices):
    """Ray Train, for one, has made the process group before a training begins."""
    import torch.distributed as dist

    from llmtune.engine.devices import Devices

    assert not dist.is_initialized()
    place = {"rank": devices.rank, "world_size": devices.world_size}
    dist.init_process_group("gloo", init_method=f"file://{output}/group", **place)
    joined = Devices.from_environment(no_cuda=True, timeout_s=60)
    assert joined.sum(1.0) == (joined.world_size,)
    assert joined.from_main("same" if joined.is_main else "other") == "same"
    joined.close()
    assert dist.is_initialized()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process while its interpreter is shutting down
