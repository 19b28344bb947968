"""Mutants of what processes tell each other: each makes two processes another run than one, or ends them (N2, P9).

A mutant is put into both processes after they are forked. Without it the same test passes, which is run first.
"""

import faulthandler
import importlib.util
import json
import shutil
import signal
from dataclasses import dataclass, replace

import peft  # noqa: F401 - once here, not in every child
import pytest
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed.fsdp import FSDPModule

from llmtune.adapters import attach
from llmtune.cli.main import run as command
from llmtune.engine import loop, objective, zero
from llmtune.engine.devices import Devices
from llmtune.errors import RankLostError
from llmtune.models import load
from llmtune.training import build
from rank_helpers import end_of, environment, ordinary_command, places
from sharded_runs import FULL, LORA, is_one_run
from training_helpers import Forked, small_run

pytestmark = pytest.mark.campaign

FOUR_BIT = (*LORA, "model.quantization=4bit")
STRATEGIES = {
    "ddp": ("distributed.strategy=ddp",),
    "fsdp": ("distributed.strategy=fsdp",),
    "shared rows": ("distributed.sequence_parallel=2",),
    "deepspeed": ("distributed.strategy=deepspeed", "distributed.zero_stage=3"),
    "deepspeed 1": ("distributed.strategy=deepspeed", "distributed.zero_stage=1"),
}
TINY = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}}
HAS_DEEPSPEED = bool(importlib.util.find_spec("deepspeed") and shutil.which("g++") and shutil.which("ninja"))


class Places:
    """Runs of one process and of two over the same 19 rows in windows of 3: in the last one process has no row."""

    def __init__(self, model, rows, folder):
        self.folder = folder
        looks = ("evaluation.every_steps=4", "evaluation.prompts=[the user asks]", "evaluation.max_new_tokens=4")
        rows_of_window = ("training.batch_size=1", "training.gradient_accumulation_steps=3", "data.test_size=5")
        more = ("training.max_steps=9", "training.learning_rate=0.001", *rows_of_window, *looks)
        self.base = small_run(model, rows, folder, *more)
        (folder / "ds.json").write_text(json.dumps(TINY))

    def alone(self, words):
        run = self.folder / "-".join(["alone", *words]).replace("/", "-")
        if not run.exists():
            assert command(["train", *self.base, f"run.name={run.name}", *words]) == 0
        return run

    def together(self, name, strategy, words, mutate, timeout_s=60):
        """The run of two processes, their exit codes, and what they printed. `mutate(rank)` is called in each first."""
        given = [*self.base, f"run.name={name}", f"distributed.timeout_s={timeout_s}", *words, *STRATEGIES[strategy]]
        if "deepspeed" in strategy:
            given.append(f"distributed.deepspeed_config={self.folder / 'ds.json'}")

        def train(rank):
            faulthandler.disable()  # gloo aborts a process that gets a message of another size
            mutate(rank)
            return ordinary_command(["train", *given])

        started = [
            Forked(lambda rank=rank: train(rank), environ=environment(**place)) for rank, place in enumerate(places())
        ]
        codes, said = end_of(started)
        return self.folder / name, codes, "".join(said)


@pytest.fixture(scope="module")
def runs(untied_model_folder, rows_file, tmp_path_factory):
    return Places(untied_model_folder, rows_file, tmp_path_factory.mktemp("mutants"))


# ---- what a mutant does in a process, by its rank ----


def mean_of_gradients(_rank):
    """Gradients are averaged, as torch's DDP, FSDP and DeepSpeed do by themselves."""
    sync = Devices.sync_gradients

    def averaged(devices, parameters):
        sync(devices, parameters)
        for parameter in parameters:
            parameter.grad /= devices.world_size

    Devices.sync_gradients = averaged
    FSDPModule.set_gradient_divide_factor = lambda *_: None
    FSDPModule.set_force_sum_reduction_for_comms = lambda *_: None
    zero.StepOfEngine.backward = lambda update, loss: update._engine.backward(loss, scale_wrt_gas=False)


def own_tokens(_rank):
    """Each process divides its losses by the trained tokens of its own rows."""
    loop._divisor = lambda _objective, window, _devices, _weight: window.loss_weight or 1.0


def shared_tokens_twice(_rank):
    """Every process that shares a row counts its tokens."""
    Devices.count = Devices.sum


def head_without_gradient(_rank):
    """The head is not joined to the graph where no row is trained, and nobody waits for its part."""
    joined = objective.head_nll_sum

    def apart(head, hidden, *given, **named):
        return hidden.float().sum() if hidden.shape[0] == 0 else joined(head, hidden, *given, **named)

    objective.head_nll_sum = apart
    FSDPModule.set_reduce_scatter_unused_params = lambda *_, **__: None


def head_left_out(_rank):
    """The gradient of the head is that of each process alone."""
    sync = Devices.sync_gradients
    Devices.sync_gradients = lambda devices, parameters: sync(devices, parameters[:-1])


def unequal_counts(_rank):
    """A process makes as many passes as it has micro-batches."""
    choose = build.build_engine
    build.build_engine = lambda *given, **named: replace(choose(*given, **named), equal_counts=False)


def unequal_gradients(_rank):
    """A process without rows has no gradients, and does not ask whether another one has."""
    original = Devices.sync_gradients

    def unasked(devices, parameters):
        if any(parameter.grad is not None for parameter in parameters):
            original(devices, parameters)

    Devices.sync_gradients = unasked


def rows_of_its_own(_rank):
    """Processes that share rows read different ones."""
    Devices.reader = property(lambda devices: devices.rank)
    Devices.readers = property(lambda devices: devices.world_size)


def sum_on_the_main_one_alone(rank):
    """The main process asks the others a question that they do not hear."""
    read = loop._read

    def asked(losses, norm, devices):
        if rank == 0:
            devices.sum(1.0, 2.0, 3.0)
        return read(losses, norm, devices)

    loop._read = asked


def other_start(rank):
    """No mutant: the processes draw different weights of the adapter, as on unlike devices."""
    attach_adapter = attach.attach_adapter

    def otherwise(model, config, *, seed, **named):
        return attach_adapter(model, config, seed=seed + rank, **named)

    attach.attach_adapter = otherwise


def without_broadcast(rank):
    other_start(rank)
    Devices.broadcast = lambda *_: None


def without_broadcast_of_deepspeed(rank):
    import deepspeed

    other_start(rank)
    deepspeed.DeepSpeedEngine._broadcast_model = lambda *_: None


def scales_of_another_layer(_rank):
    """The layers keep the scales that the first of their shape has."""
    keep = load.disable_cpu_repacking

    def stale(model):
        count, first = keep(model), {}
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                shape = tuple(module.quant_state.shape)
                module.quant_state = module.weight.quant_state = first.setdefault(shape, module.quant_state)
        return count

    load.disable_cpu_repacking = stale


def nothing(_rank):
    """No mutant."""


@dataclass(frozen=True)
class Mutant:
    mutate: object
    words: tuple[str, ...] = FULL
    ends: bool = False
    """Whether the processes end with an error; otherwise they finish, as another run."""


EVERYWHERE = {
    "mean instead of sum": Mutant(mean_of_gradients),
    "collective of the main process alone": Mutant(sum_on_the_main_one_alone, ends=True),
}
QUANTIZED = {"stale quant_state": Mutant(scales_of_another_layer, FOUR_BIT)}
DIVISOR = {"own tokens as divisor": Mutant(own_tokens)}
IN_PARTS = {
    "head without gradient": Mutant(head_without_gradient, ends=True),
    "unequal counts": Mutant(unequal_counts, ends=True),
}
WHOLE = {"head without gradient": Mutant(head_left_out), "missing broadcast": Mutant(without_broadcast, LORA)}
MUTANTS = {
    "ddp": EVERYWHERE | QUANTIZED | DIVISOR | WHOLE | {"unequal counts": Mutant(unequal_gradients, ends=True)},
    "fsdp": EVERYWHERE | QUANTIZED | DIVISOR | IN_PARTS,
    "shared rows": EVERYWHERE
    | QUANTIZED
    | WHOLE
    | {
        "own tokens as divisor": Mutant(shared_tokens_twice),
        "unequal counts": Mutant(rows_of_its_own, ends=True),
    },
    "deepspeed": EVERYWHERE | DIVISOR | IN_PARTS,
    "deepspeed 1": {"missing broadcast": Mutant(without_broadcast_of_deepspeed, LORA)},
}
needs = {name: [pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed, g++ and ninja are not here")]
         if "deepspeed" in name else [] for name in STRATEGIES}  # fmt: skip
CONTROLS = [
    pytest.param(strategy, words, mutate, marks=needs[strategy], id=f"{strategy}-{name}")
    for strategy in MUTANTS
    for name, words, mutate in (
        ("full", FULL, nothing),
        ("4bit", FOUR_BIT, nothing),
        ("unlike starts", LORA, other_start),
    )
    if any(words == mutant.words for mutant in MUTANTS[strategy].values())
]


@pytest.mark.parametrize(("strategy", "words", "mutate"), CONTROLS)
def test_without_a_mutant_two_processes_are_one(runs, strategy, words, mutate):
    name = f"{strategy}-{mutate.__name__}-{words[-1]}".replace(" ", "-")
    run, codes, said = runs.together(name, strategy, words, mutate)
    assert codes == [0, 0], said
    is_one_run(runs.alone(words), run)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [pytest.param(strategy, name, marks=needs[strategy]) for strategy, mutants in MUTANTS.items() for name in mutants],
)
def test_a_mutant_is_caught(runs, strategy, name):
    mutant = MUTANTS[strategy][name]
    alone = runs.alone(mutant.words)
    run, codes, said = runs.together(
        f"{strategy}-{name}".replace(" ", "-"), strategy, mutant.words, mutant.mutate, 8 if mutant.ends else 60
    )
    print(codes, said)
    if mutant.ends:
        assert set(codes) <= {RankLostError.exit_code, -signal.SIGABRT}, said
        assert RankLostError.exit_code in codes, said
        return
    assert codes == [0, 0], said
    with pytest.raises(AssertionError) as caught:
        is_one_run(alone, run)
    print(caught.value)
