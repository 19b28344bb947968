"""P10: what is not finite is never applied and never hidden; its rows are named; a budget; then exit 7."""

import math

import pytest
import torch

from llmtune.engine import loop
from llmtune.engine.devices import Devices
from llmtune.engine.loop import describe_rows, non_finite_parameters
from llmtune.errors import DivergedError
from rank_helpers import in_two_ranks

POISONED = "rows.jsonl:7"
ALONE = Devices(torch.device("cpu"))


def poisoned(bench, *, bad, in_gradient=False, batch_size=2, devices=ALONE, **more):
    """A training in which any micro-batch with row 7 has a loss (or a gradient) of `bad`."""
    shares = {"world_size": devices.world_size, "rank": devices.rank}
    plan = bench.plan(bench.examples(16), epochs=4, batch_size=batch_size, accumulation=2, **shares)
    training = bench.training(bench.model(), plan, devices=devices, **more)
    plain = training.nll_sum
    weight = next(iter(training.parameters.values()))

    def nll_sum(batch):
        nats = plain(batch)
        if POISONED not in batch.sources:
            return nats
        if in_gradient:
            return nats + (weight - weight.detach()).square().sum().sqrt()  # 0, with gradient 0 x infinity
        return nats * bad

    training.nll_sum = nll_sum
    return training


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_applied_and_its_rows_are_named(bench, bad):
    """P10: the micro-batch of the row is named, not the whole window; everything else trains on."""
    training = poisoned(bench, bad=bad, max_skipped_steps=4)
    before, seen = training.weights(), []
    for result in training.steps():
        assert bench.same_bits(training.weights(), before) == (result.skipped or result.learning_rate == 0)
        assert all(parameter.grad is None for parameter in training.parameters.values())
        before = training.weights()
        seen.append(result)
    skipped = [result for result in seen if result.skipped]
    assert len(skipped) == training.state.skipped_steps == 4  # once an epoch
    assert all(POISONED in result.sources and len(result.sources) == 2 for result in skipped)
    assert all("train_mean_nll is" in result.reason for result in skipped)
    assert training.state.step == len(seen) - 4
    assert not non_finite_parameters(training.parameters)


def test_a_gradient_that_is_not_finite_names_all_rows_of_its_window(bench):
    """P10: the loss says nothing, so every row of the window is a suspect."""
    training = poisoned(bench, bad=math.nan, in_gradient=True, max_skipped_steps=4)
    skipped = [result for result in training.steps() if result.skipped]
    assert [len(result.sources) for result in skipped] == [4, 4, 4, 4]
    assert all(POISONED in result.sources and result.reason == "grad_norm is nan" for result in skipped)
    assert all(math.isfinite(result.train_mean_nll) for result in skipped)


def of_two_processes(bench, in_gradient):
    """Every process names what is not finite in any: row 7 is another's in some epochs."""
    devices = Devices.from_environment(no_cuda=True, timeout_s=60)
    training = poisoned(bench, bad=math.nan, in_gradient=in_gradient, devices=devices, max_skipped_steps=4)
    is_own = [any(POISONED in batch.sources for batch in window.micro_batches) for window in training.plan.windows()]
    blamed = [
        (devices.rank if own else 1 - devices.rank, result)
        for own, result in zip(is_own, training.steps(), strict=True)
        if result.skipped
    ]
    devices.close()
    assert {rank for rank, _ in blamed} == {0, 1}
    for rank, result in blamed:
        assert POISONED in result.sources
        assert len(set(result.sources)) == (4 if in_gradient else 2)
        assert result.reason == ("grad_norm is nan" if in_gradient else f"train_mean_nll is nan (process {rank})")


@pytest.mark.parametrize("in_gradient", [False, True])
def test_the_rows_and_the_process_are_named_whichever_it_is(bench, in_gradient):
    """P10: the main process writes and prints, and its own rows are not to blame."""
    codes, said = in_two_ranks(lambda: of_two_processes(bench, in_gradient))
    assert codes == [0, 0], "\n".join(said)


def test_beyond_the_budget_the_training_has_diverged(bench):
    """P10: exit 7; the message has the rows, the count and the budget."""
    training = poisoned(bench, bad=math.inf, max_skipped_steps=2)
    with pytest.raises(
        DivergedError, match=r"train_mean_nll is inf .* 3 windows skipped, 2 allowed; rows .*rows\.jsonl:7"
    ) as caught:
        training.run()
    assert caught.value.exit_code == 7
    assert not non_finite_parameters(training.parameters)


def test_the_budget_is_that_of_the_whole_run(bench):
    """P10: a resumed run does not start with a fresh budget."""
    first = poisoned(bench, bad=math.inf, max_skipped_steps=2)
    for result in first.steps():
        if result.skipped and first.state.skipped_steps == 2:
            break
    second = poisoned(bench, bad=math.inf, max_skipped_steps=2)
    second.restore(first.capture(), first.weights())
    with pytest.raises(DivergedError):
        second.run()


def test_a_skipped_window_is_a_line_of_plain_json(bench):
    """P10, never hidden: the line says so, and has no NaN in it."""
    training = poisoned(bench, bad=math.nan)
    line = next(result for result in training.steps() if result.skipped).metrics()
    assert line["skipped"] is True
    assert line["train_mean_nll"] is None
    assert POISONED in line["sources"]


def test_applying_a_gradient_that_is_not_finite_is_caught(bench, mutant):
    """P10's test fails when only the loss is looked at."""
    broken = mutant(loop, "return None if math.isfinite(grad_norm) else", "return None if True else")
    training = poisoned(bench, bad=math.nan, in_gradient=True, train_steps=broken.train_steps, max_skipped_steps=99)
    training.run()
    assert non_finite_parameters(training.parameters)


def test_parameters_that_are_not_finite_are_named():
    parameters = {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan]), "c": torch.tensor([[math.inf]])}
    assert non_finite_parameters(parameters) == ["b", "c"]
    assert non_finite_parameters({}) == []


def test_many_rows_are_counted_after_the_first():
    assert describe_rows([f"a:{n}" for n in range(11)]) == "a:0, a:1, a:2, a:3, a:4, a:5, a:6, a:7 and 3 more"
