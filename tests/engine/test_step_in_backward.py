"""N15, P2, P10: weights that move in the backward pass move as in the ordinary update, and gradients never exist
together.
"""

import itertools
import json
import math

import pytest
import torch

from case_helpers import few_of
from llmtune.engine import optim, state, update
from llmtune.engine.devices import Devices
from llmtune.engine.forward import checkpoint_blocks
from llmtune.engine.neftune import Neftune
from llmtune.engine.precision import Precision
from llmtune.errors import DivergedError

OPTIMIZERS = ["adamw", "adamw_8bit", "lion", "muon", "sgd"]


def start(bench, *, optimizer="adamw", early=True, accumulation=1, model=None, **more):
    """An epoch and a half with dropout, NEFTune, tied embeddings and ragged rows; matrices above the 4096 entries of
    8-bit states.
    """
    if model is None:
        model = bench.model(attention_dropout=0.1, hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    plan = bench.plan(bench.examples(17), epochs=1.5, batch_size=3, accumulation=accumulation)
    training = bench.training(
        model, plan, optimizer_name=optimizer, learning_rate=3e-3, max_grad_norm=None, step_in_backward=early, **more
    )
    training.nll_sum = Neftune(training.nll_sum, model.get_input_embeddings(), 5.0)
    torch.manual_seed(0)
    return training


def everything(training):
    """Lines without times, weights, and what a checkpoint of the end would hold."""
    lines = []
    for result in training.steps():
        assert all(parameter.grad is None for parameter in training.parameters.values())
        line = result.metrics()
        for name in ("tokens_per_second", "loss_tokens_per_second", "step_seconds", "memory_bytes"):
            del line[name]
        lines.append(json.dumps(line))
    return lines, training.weights(), training.capture()


def assert_same(ours, theirs):
    assert ours[0] == theirs[0]
    for one, other in (
        (ours[1], theirs[1]),
        *((ours[2].tensors[group], theirs[2].tensors[group]) for group in ("optimizer", "rng")),
    ):
        assert {name: value.dtype for name, value in one.items()} == {
            name: value.dtype for name, value in other.items()
        }
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert ours[2].state == theirs[2].state


@pytest.mark.parametrize(
    ("optimizer", "accumulation"),
    few_of(itertools.product(OPTIMIZERS, (1, 3)), [("adamw", 3), ("adamw_8bit", 1), ("muon", 1)]),
)
def test_every_weight_moves_as_in_the_ordinary_update(bench, optimizer, accumulation):
    """N15, bit for bit in fp32: losses, gradient norms, weights and what is saved, with every optimizer that works on a
    CPU.
    """
    ours, theirs = (
        everything(start(bench, optimizer=optimizer, accumulation=accumulation, early=early)) for early in (True, False)
    )
    assert len(ours[0]) == {1: 9, 3: 3}[accumulation]
    assert_same(ours, theirs)


def in_bf16(bench):
    return bench.model(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).to(torch.bfloat16)


def recomputed(bench):
    model = bench.model(attention_dropout=0.1, tie_word_embeddings=True)
    checkpoint_blocks(model)
    return model


@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (lambda bench: bench.model(tie_word_embeddings=True), "bf16"),
        pytest.param(in_bf16, "fp32", marks=pytest.mark.campaign),
        pytest.param(recomputed, "fp32", marks=pytest.mark.campaign),
        (lambda bench: bench.model(lora=True), "fp32"),
        pytest.param(lambda bench: bench.model(tie_word_embeddings=False), "fp32", marks=pytest.mark.campaign),
    ],
    ids=["bf16 arithmetic", "bf16 weights", "recomputed blocks", "LoRA", "untied head"],
)
def test_so_they_do_whatever_else_a_training_does(bench, make, precision):
    """N15, bit for bit too: the same gradients go through the same rule, whatever type they have and whatever made
    them.
    """
    ours, theirs = (
        everything(start(bench, model=make(bench), precision_name=precision, early=early)) for early in (True, False)
    )
    assert_same(ours, theirs)


def gradients_at_each_update(training):
    """How many bytes of gradients exist whenever the optimizer moves something."""
    seen = []
    for part in training.optimizer.parts:
        part.register_step_pre_hook(
            lambda *_: seen.append(sum(one.grad.nbytes for one in training.parameters.values() if one.grad is not None))
        )
    training.run()
    return seen


@pytest.mark.parametrize("optimizer", few_of(["adamw", "muon"], ["adamw"]))
def test_gradients_of_one_micro_batch_never_exist_together(bench, optimizer):
    """Each update sees one gradient, its own; the ordinary one sees them all."""
    training = start(bench, optimizer=optimizer)
    sizes = [one.nbytes for one in training.parameters.values()]
    seen = gradients_at_each_update(training)
    assert len(seen) == 9 * len(sizes)
    assert sorted(seen[: len(sizes)]) == sorted(sizes)
    assert max(gradients_at_each_update(start(bench, optimizer=optimizer, early=False))) == sum(sizes)


def test_a_weight_that_the_last_micro_batch_has_no_part_in_moves_too(bench):
    """N15 with a part of the model that only some rows reach, as experts are: its gradient is an earlier micro-batch's."""  # noqa: E501

    def train(early):
        training = start(bench, accumulation=3, model=bench.model(), early=early)
        training.model.rare = torch.nn.Parameter(torch.ones(3))
        training = bench.training(
            training.model,
            training.plan,
            learning_rate=3e-3,
            max_grad_norm=None,
            step_in_backward=early,
            nll_sum=training.nll_sum,
        )
        plain, calls = training.nll_sum, []

        def nll_sum(batch):
            calls.append(batch)
            return plain(batch) + (training.model.rare.square().sum() if len(calls) % 5 == 1 else 0)

        training.nll_sum = nll_sum
        return everything(training)

    ours = train(True)
    assert not torch.equal(ours[1]["rare"], torch.ones(3))
    assert_same(ours, train(False))


# ---- what is not finite (P10) ----

POISONED = "rows.jsonl:7"


def poisoned(bench, *, early=True, in_gradient=False, bad=math.nan, **more):
    """A micro-batch with row 7 has a loss, or only one gradient of many, that is not finite."""
    training = start(bench, model=bench.model(), early=early, **more)
    plain, weight = training.nll_sum, training.parameters["model.layers.0.mlp.up_proj.weight"]

    def nll_sum(batch):
        nats = plain(batch)
        if POISONED not in batch.sources:
            return nats
        return nats + (weight - weight.detach()).square().sum().sqrt() if in_gradient else nats * bad

    training.nll_sum = nll_sum
    return training


@pytest.mark.parametrize(
    ("bad", "accumulation"),
    few_of(itertools.product((math.nan, math.inf), (1, 3)), [(math.nan, 1), (math.inf, 3)]),
)
def test_a_window_whose_loss_is_not_finite_is_skipped_as_ever(bench, bad, accumulation):
    """P10: known before the last backward pass, so nothing moves; the rest of the run is the ordinary one's, bit for
    bit.
    """
    ours, theirs = (
        everything(poisoned(bench, bad=bad, accumulation=accumulation, early=early)) for early in (True, False)
    )
    assert [line for line in ours[0] if '"skipped": true' in line and POISONED in line]
    assert_same(ours, theirs)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_ends_the_run(bench):
    """P10: weights have moved when it is seen, so the window cannot be skipped; exit 7, and no step boundary follows."""  # noqa: E501
    training = poisoned(bench, in_gradient=True, max_skipped_steps=99)
    ordinary = poisoned(bench, in_gradient=True, max_skipped_steps=99, early=False)
    good = [result for result in ordinary.run() if not result.skipped or result.step == 0]
    steps, seen = training.steps(), []
    with pytest.raises(
        DivergedError, match=r"grad_norm is nan .* weights have moved by then; rows .*rows\.jsonl:7"
    ) as caught:
        seen.extend(steps)  # keeps what came before the error
    assert caught.value.exit_code == 7
    assert "step_in_backward: false" in caught.value.problems[0].fix
    assert list(steps) == []
    assert training.state.windows < len(good)


# ---- stopped and gone on with (P2) ----


def go_on(bench, optimizer, choices, stop):
    """Train to `stop` one way, then to the end in a new process's objects the other way; what passes between is tensors
    and JSON text.
    """
    first = start(bench, optimizer=optimizer, early=choices[0])
    lines = []
    for result in first.steps():
        lines.append(result.train_mean_nll)
        if len(lines) == stop:
            break
    taken = first.capture()
    second = start(bench, optimizer=optimizer, early=choices[1])
    torch.manual_seed(12345)
    second.restore(state.Snapshot(taken.tensors, json.loads(json.dumps(taken.state))), first.weights())
    lines += [result.train_mean_nll for result in second.steps()]
    return lines, second.weights(), second.capture()


@pytest.mark.parametrize("optimizer", few_of(OPTIMIZERS, ["adamw"]))
def test_a_run_goes_on_either_way_bit_for_bit(bench, optimizer):
    """P2: stopped with it on, gone on with it on or off, and the other way round: the run never stopped."""
    whole = start(bench, optimizer=optimizer)
    losses = [result.train_mean_nll for result in whole.run()]
    for choices in ((True, True), (True, False), (False, True)):
        lines, weights, saved = go_on(bench, optimizer, choices, 4)
        assert lines == losses
        assert bench.same_bits(weights, whole.weights())
        assert bench.same_bits(saved.tensors["optimizer"], whole.capture().tensors["optimizer"])


# ---- the tests are tested ----


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("        set_learning_rate(self._optimizer, rate)\n        # Only now", "        # Only now"),
        (
            "            self._optimizer.step_only(parameter)\n        parameter.grad = None",
            "            self._optimizer.step_only(parameter)",
        ),
        (
            "            if parameter.grad is not None:\n                self._optimizer.step_only(parameter)",
            "            pass",
        ),
        (
            "for parameter in self._parameters if parameter in self._norms]",
            "for parameter in self._norms if parameter.ndim > 1]",
        ),
        ("        self._norms.clear()\n", ""),
        ("bool(torch.stack(list(losses)).double().sum().isfinite())", "True"),
    ],
    ids=["rate", "gradient not dropped", "leftovers", "norm of matrices only", "old norms", "a bad loss applied"],
)
def test_leaving_one_thing_out_is_caught(bench, mutant, monkeypatch, before, after):
    """The laws above fail on each of these."""
    assert law_broken_by(mutant(update, before, after), bench, monkeypatch)


def test_the_rules_of_another_group_are_caught(bench, mutant, monkeypatch):
    broken = mutant(optim, '[{**group, "params": [parameter]}]', '[{**part.param_groups[0], "params": [parameter]}]')
    monkeypatch.setattr(optim.Optimizer, "step_only", broken.Optimizer.step_only)
    assert law_broken_by(update, bench, monkeypatch)


def law_broken_by(broken, bench, monkeypatch):
    """Whether one of three laws fails where that module makes the update."""
    real = bench.training.update
    monkeypatch.setattr(
        bench.training,
        "update",
        lambda self: (
            broken.StepInBackward(list(self.parameters.values()), self.optimizer)
            if self.step_in_backward
            else real(self)
        ),
    )
    laws = [
        lambda: test_every_weight_moves_as_in_the_ordinary_update(bench, "adamw", 1),
        lambda: test_a_weight_that_the_last_micro_batch_has_no_part_in_moves_too(bench),
        lambda: test_a_window_whose_loss_is_not_finite_is_skipped_as_ever(bench, math.nan, 1),
    ]
    for law in laws:
        try:
            law()
        except (AssertionError, DivergedError):
            return True
    return False


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"])
def test_on_a_gpu_weights_move_the_same_and_gradients_take_less(optimizer):
    """N15 in bf16 arithmetic on CUDA: losses, norms and weights up to the order of sums, and the gradients' share of
    the peak gone.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmtune.engine.optim import build_optimizer, matrices_of_blocks
    from llmtune.engine.update import StepAfterBackward, StepInBackward

    device = torch.device("cuda")
    shape = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )

    def train(early):
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape).to(device)
        parameters = dict(model.named_parameters())
        rule = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "device": device}
        built, _ = build_optimizer(optimizer, parameters, orthogonal=matrices_of_blocks(model, parameters), **rule)
        weights = list(parameters.values())
        precision = Precision("bf16", device)
        update = (
            StepInBackward(weights, built)
            if early
            else StepAfterBackward(weights, built, precision, Devices(device).sync_gradients, max_grad_norm=None)
        )
        ids = torch.randint(512, (4, 2, 32), generator=torch.Generator().manual_seed(1)).to(device)
        losses, norms, kept = [], [], 0
        for step, batch in enumerate(ids):
            if step == 1:
                torch.cuda.reset_peak_memory_stats()  # the first step makes the optimizer's state
            before = torch.cuda.memory_allocated()
            with precision.autocast():
                loss = model(batch, labels=batch).loss
            kept = torch.cuda.memory_allocated() - before
            update.before_last_backward([loss.detach()], 1e-3)
            loss.backward()
            norms.append(float(update.finish_gradients()))
            update.apply(1e-3)
            update.clear()
            losses.append(float(loss.detach()))
        return (
            losses,
            norms,
            {name: one.detach().cpu() for name, one in parameters.items()},
            torch.cuda.max_memory_allocated(),
            kept,
        )

    ours, theirs = train(True), train(False)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-2)
    for name, weight in theirs[2].items():
        assert (ours[2][name] - weight).norm() <= 1e-2 * weight.norm(), name
    gradients = sum(weight.nbytes for weight in theirs[2].values())
    # The one peak is at the end of the backward pass, when all gradients are there. The other is at its begin, when it
    # holds what the forward pass kept: activations, and autocast's copies of the weights, half as large as gradients.
    assert theirs[3] - ours[3] > 0.9 * gradients - ours[4] > 0
