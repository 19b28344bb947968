"""One process of sharded runs: the real commands, in which no pickle can be read, and what it holds written down.

It is forked. `commands` is a JSON file: a list of commands, each with its `name`, its `port` for several processes, and
its `words`. Beside it, NAME-RANK.json gets what this process holds in it.
"""

import json
import os
import sys
import warnings


def refuse(*_args, **_named):
    """Stands for everything that reads a pickle."""
    raise AssertionError("a pickle was read")


def forbid_unpickling():
    """A pickle runs code of whoever wrote it. Torch binds its own reader when it is imported."""
    import torch.distributed.distributed_c10d as c10d

    modules = [sys.modules[name] for name in ("pickle", "_pickle")]
    readers = [(module, name) for module in modules for name in ("loads", "load", "Unpickler")]
    for module, name in [*readers, (c10d, "_unpickler")]:
        setattr(module, name, refuse)


def written_down(build_setup, path):
    """`build_setup`, after which the share of this process in every weight and the decisions are in `path`."""

    def build(*args):
        setup = build_setup(*args)
        strategy, weights = setup.strategy, dict(setup.model.named_parameters())
        shares = {name: [strategy.part(one).numel(), strategy.shape(one).numel()] for name, one in weights.items()}
        kinds = sorted({type(one).__name__ for one in weights.values()})
        here = sum(weight.numel() for weight in weights.values())
        decisions = {decision.key: str(decision.value) for decision in setup.decisions}
        reasons = {decision.key: decision.reason for decision in setup.decisions}
        facts = {"shares": shares, "kinds": kinds, "here": here, "decisions": decisions, "reasons": reasons}
        path.write_text(json.dumps(facts))
        return setup

    return build


def nowhere_whole(capture, rank):
    """`capture`, which fails where a process has whole tensors of an optimizer's state that is divided.

    DeepSpeed gives them to the first process, which writes them.
    """
    from llmtune.engine.sharded_tensors import is_in_parts

    def checked(**given):
        snapshot = capture(**given)
        tensors = snapshot.tensors["optimizer"].values()
        whole = [tensor for tensor in tensors if tensor.ndim and not is_in_parts(tensor)]
        assert not whole or (rank == "0" and len(whole) == sum(tensor.ndim > 0 for tensor in tensors)), "held whole"
        return snapshot

    return checked


def run_commands(commands, rank, world_size):
    """Run the commands one after the other, and return the code of the first that fails; in a process of its own."""
    from llmtune.cli.main import run
    from llmtune.training import train, training_run

    warnings.simplefilter("ignore")  # as in an ordinary process: torch has some of its own
    forbid_unpickling()
    build_setup, code = train.build_setup, 0
    training_run.capture = nowhere_whole(training_run.capture, rank)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    for command in json.loads(commands.read_text()):
        os.environ["MASTER_PORT"] = str(command["port"])
        train.build_setup = written_down(build_setup, commands.with_name(f"{command['name']}-{rank}.json"))
        code = run(command["words"])
        if code:
            break
    return code
