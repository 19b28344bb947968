"""P2, N12, N13: a run stopped anywhere and gone on with is the run never stopped, bit for bit."""

import json
import random

import numpy as np
import pytest
import torch

from case_helpers import few_of
from llmtune.engine import optim, state
from llmtune.engine.neftune import Neftune
from llmtune.engine.state import capture_rng, restore_rng
from llmtune.errors import CheckpointError

OPTIMIZERS = ["adamw", "adafactor", "adamw_8bit", "lion", "muon", "sgd"]


def start(bench, optimizer="adamw", **more):
    """Two and a half epochs with everything random that a training can have: dropout, NEFTune, shuffled order."""
    model = bench.model(
        attention_dropout=0.1, hidden_size=64, intermediate_size=128
    )  # matrices above the 4096 entries of 8-bit states
    plan = bench.plan(bench.examples(23), epochs=2.5, batch_size=2)
    training = bench.training(model, plan, optimizer_name=optimizer, learning_rate=3e-3, **more)
    training.nll_sum = Neftune(training.nll_sum, model.get_input_embeddings(), 5.0)
    seed_all(0)
    return training


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def go_on(bench, stops, optimizer="adamw", module=state, **more):
    """Train with a fresh process's worth of objects after every stop; what passes between them is tensors and JSON
    text.
    """
    losses, snapshot, weights = [], None, None
    for stop in [*stops, None]:
        training = start(bench, optimizer, **more)
        if snapshot is not None:
            seed_all(12345)  # what a new process happens to have
            training.restore(snapshot, weights)
        for result in training.steps():
            losses.append(result.train_mean_nll)
            if len(losses) == stop:
                break
        taken = module.capture(
            parameters=training.parameters,
            optimizer=training.optimizer,
            precision=training.precision,
            state=training.state,
        )
        snapshot, weights = (
            state.Snapshot(taken.tensors, json.loads(json.dumps(taken.state, allow_nan=False))),
            training.weights(),
        )
    return losses, weights, snapshot


@pytest.mark.parametrize("optimizer", few_of(OPTIMIZERS, ["adamw", "adamw_8bit"]))
def test_a_run_stopped_anywhere_is_the_run_never_stopped(bench, optimizer):
    """P2: losses, weights, optimizer state, generators and counters, after stops in every epoch and two in a row."""
    losses, weights, snapshot = go_on(bench, [], optimizer)
    their_losses, their_weights, their_snapshot = go_on(bench, [1, 4, 5, 11], optimizer)
    assert len(losses) == 15
    assert their_losses == losses
    assert bench.same_bits(their_weights, weights)
    assert all(
        bench.same_bits(their_snapshot.tensors[group], snapshot.tensors[group]) for group in ("optimizer", "rng")
    )
    assert their_snapshot.state == snapshot.state


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        (
            state,
            "restore_rng({name: row[rank if is_saved else 0] for name, row in rows.items()}, precision.device)",
            "pass",
        ),
        (state, "        optimizer.set_state(parameter, state)", "        pass"),
        (state, 'setattr(state, counter.name, snapshot.state["training"][counter.name])', "pass"),
    ],
    ids=["generators", "optimizer", "counters"],
)
def test_leaving_one_thing_out_of_a_resume_is_caught(bench, mutant, monkeypatch, module, before, after):
    """P2's test fails when generators, optimizer state or counters are not put back."""
    losses, _, _ = go_on(bench, [])
    broken = mutant(module, before, after)
    monkeypatch.setattr(bench.training, "restore", _restore_by(broken.restore))
    assert go_on(bench, [4])[0] != losses


def _restore_by(restore):
    def put_back(training, snapshot, weights):
        with torch.no_grad():
            for name, parameter in training.parameters.items():
                parameter.copy_(weights[name])
        restore(
            snapshot,
            parameters=training.parameters,
            optimizer=training.optimizer,
            precision=training.precision,
            state=training.state,
        )

    return put_back


def test_the_same_training_twice_is_the_same(bench):
    """N13: weights and metrics, but times and memory, byte for byte."""

    def lines(training):
        untimed = []
        for result in training.steps():
            line = result.metrics()
            for name in ("tokens_per_second", "loss_tokens_per_second", "step_seconds", "memory_bytes"):
                del line[name]
            untimed.append(json.dumps(line))
        return untimed

    first, second = start(bench), None
    ours = lines(first)
    second = start(bench)
    assert lines(second) == ours
    assert bench.same_bits(first.weights(), second.weights())


def test_looking_changes_nothing(bench):
    """N12: capturing state, reading metrics and evaluating between steps leave the final weights as they are."""
    quiet, watched = start(bench), None
    quiet.run()
    watched = start(bench)
    for result in watched.steps():
        result.metrics()
        watched.capture()
        watched.model.eval()
        with torch.no_grad():
            watched.nll_sum(watched.plan.window(1).micro_batches[0])
        watched.model.train()
    assert bench.same_bits(quiet.weights(), watched.weights())


def test_metrics_have_exactly_the_names_of_the_design(bench):
    line = start(bench).run()[0].metrics()
    assert " ".join(line) == (
        "step epoch progress train_mean_nll learning_rate grad_norm num_tokens num_loss_tokens num_sequences "
        "rows_digest tokens_per_second loss_tokens_per_second step_seconds memory_bytes"
    )
    assert line["memory_bytes"] > 10_000_000
    assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["step_seconds"])


def test_a_yield_is_a_step_boundary(bench):
    """Gradients are clear and the state counts exactly what was applied."""
    training = start(bench)
    tokens = 0
    for count, result in enumerate(training.steps(), start=1):
        tokens += result.num_tokens
        assert (training.state.step, training.state.windows, result.step) == (count, count, count)
        assert (training.state.epoch, training.state.num_tokens) == (result.epoch, tokens)
        assert result.progress == count / 15
        assert all(parameter.grad is None for parameter in training.parameters.values())
    assert training.state.epoch == 2 + 12 / 23


def test_a_snapshot_of_other_parameters_is_refused(bench):
    """Nothing has been changed when it is."""
    training = start(bench)
    next(training.steps())
    snapshot = training.capture()
    snapshot.state["optimizer"]["lm_head.extra"] = snapshot.state["optimizer"].pop("lm_head.weight")
    before = training.capture()
    with pytest.raises(
        CheckpointError,
        match=r"1 of the model's are absent \(lm_head.weight\), 1 are not in the model \(lm_head.extra\)",
    ):
        training.restore(snapshot, training.weights())
    assert bench.same_bits(training.capture().tensors["optimizer"], before.tensors["optimizer"])


def test_a_snapshot_that_lost_a_tensor_is_refused(bench):
    training = start(bench)
    next(training.steps())
    snapshot = training.capture()
    del snapshot.tensors["optimizer"]["lm_head.weight//exp_avg"]
    with pytest.raises(CheckpointError, match=r"disagree on 1: lm_head.weight//exp_avg"):
        training.restore(snapshot, training.weights())


def test_a_snapshot_of_another_optimizer_is_refused(bench):
    """An AdamW state put into SGD would be ignored without a word."""
    training = start(bench)
    next(training.steps())
    other = start(bench, "sgd")
    with pytest.raises(
        CheckpointError,
        match=r"the checkpoint's optimizer moved `model.embed_tokens.weight` by AdamW, this run's by SGD",
    ):
        other.restore(training.capture(), training.weights())


def test_generators_of_every_library_come_back():
    """P2: with a normal draw kept by Python and by NumPy, and without."""

    def draw():
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.random(),
            torch.rand(2).tolist(),
        ]

    for _ in range(2):
        taken = capture_rng(torch.device("cpu"))
        expected = draw() + draw()
        seed_all(99)
        restore_rng(taken, torch.device("cpu"))
        assert draw() + draw() == expected
        draw()


def test_every_optimizer_is_covered_here():
    """P2 is shown for all that work on a CPU; the paged ones need a GPU."""
    assert set(optim.OPTIMIZERS) == {*OPTIMIZERS, "paged_adamw", "paged_adamw_8bit"}
