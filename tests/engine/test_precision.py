"""N11: the fp16 loss scale, and what autocast may change."""

import json

import pytest
import torch

from llmtune.engine import loop, precision
from llmtune.engine.precision import Precision, choose_precision
from llmtune.errors import ConfigError

CPU = torch.device("cpu")


def overflow_in(step, training):
    """A loss function whose gradients overflow in the window that makes `step`, the loss staying finite."""
    plain = training.nll_sum
    last = next(iter(training.parameters.values()))

    def nll_sum(batch):
        nats = plain(batch)
        if training.state.windows + 1 == step:
            infinite = last.sum() * 3e38
            nats = nats + (infinite - infinite.detach())  # adds 0 to the loss, 3e38 x scale to the gradient
        return nats

    return nll_sum


def fp16_training(bench, **more):
    training = bench.training(bench.model(), bench.plan(bench.examples(), epochs=2), precision_name="fp16", **more)
    training.nll_sum = overflow_in(3, training)
    return training


def test_an_overflow_skips_the_step_halves_the_scale_and_keeps_the_learning_rate(bench):
    """N11: the weights stay as they were, the next window takes the rate that this one did not use."""
    training = fp16_training(bench)
    steps = training.steps()
    next(steps)
    next(steps)
    before = training.weights()
    skipped = next(steps)
    assert bench.same_bits(training.weights(), before)
    assert skipped.skipped
    assert (skipped.step, training.state.step, training.state.windows) == (2, 2, 3)
    assert training.precision.scale == 2.0**15
    after = next(steps)
    assert (after.step, after.skipped) == (3, False)
    assert skipped.learning_rate == after.learning_rate == training.rate(2)
    assert (training.state.overflow_steps, training.state.skipped_steps) == (1, 0)


def test_a_learning_rate_that_advances_on_a_skipped_step_is_caught(bench, mutant):
    """N11's test fails when the schedule counts windows instead of updates."""
    broken = mutant(loop, "learning_rate(state.step)", "learning_rate(state.windows)")
    rates = [
        [r.learning_rate for r in fp16_training(bench, train_steps=one.train_steps).run()] for one in (loop, broken)
    ]
    assert rates[0][:3] == rates[1][:3]
    assert rates[0][3] != rates[1][3]


def test_the_scale_survives_resume(bench):
    """N11: as JSON, bit for bit; the resumed run is the unbroken one."""
    whole = fp16_training(bench)
    losses = [result.train_mean_nll for result in whole.run()]
    first = fp16_training(bench)
    steps = first.steps()
    for _ in range(4):
        next(steps)
    snapshot, weights = first.capture(), first.weights()
    second = fp16_training(bench)
    second.restore(type(snapshot)(snapshot.tensors, json.loads(json.dumps(snapshot.state))), weights)
    assert second.precision.state_dict() == {"name": "fp16", "scale": 2.0**15, "good_steps": 1}
    assert [result.train_mean_nll for result in second.run()] == losses[4:]
    assert bench.same_bits(second.weights(), whole.weights())


def test_the_scale_moves_as_that_of_torch():
    """N11: the same numbers as `torch.amp.GradScaler` through overflows and growth."""
    ours, theirs = Precision("fp16", CPU), torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for step in range(2 * 2000 + 60):
        bad = step in (0, 1, 7, 1500, 3600)
        parameter.grad = torch.full((1,), float("inf") if bad else 1.0)
        theirs.scale(torch.zeros(1))
        theirs.step(optimizer)
        theirs.update()
        ours.advance(applied=not bad, loss_is_finite=True)
        assert ours.scale == theirs.get_scale()
    assert ours.scale == 2.0**12  # 16, five times halved, once doubled


def test_a_loss_that_is_not_finite_is_not_the_scales_doing():
    scale = Precision("fp16", CPU)
    assert scale.advance(applied=False, loss_is_finite=True)
    assert not scale.advance(applied=False, loss_is_finite=False)


def test_an_overflow_that_no_scale_can_help_is_counted():
    scale = Precision("fp16", CPU)
    overflows = [scale.advance(applied=False, loss_is_finite=True) for _ in range(18)]
    assert overflows == [True] * 16 + [False] * 2
    assert scale.scale == 1.0


def test_the_scale_is_out_of_the_gradients_before_clipping(bench):
    """N10, N11: a scaled backward reports and clips the norm of the true gradient."""
    plan = bench.plan(bench.examples())
    plain, scaled = (bench.training(bench.model(), plan, precision_name=name) for name in ("fp32", "fp16"))
    scaled.precision._dtype = None  # fp32 arithmetic, only the scale remains
    scaled.precision.autocast = plain.precision.autocast
    ours, theirs = scaled.run(), plain.run()
    assert [r.grad_norm for r in ours] == pytest.approx([r.grad_norm for r in theirs], rel=1e-5)
    assert bench.relative_difference(scaled.weights(), plain.weights()) < 1e-5


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_trains_close_to_single(bench, name):
    """Losses within 1 % over two epochs; weights and optimizer state stay float32."""
    plan = bench.plan(bench.examples(), epochs=2)
    single, half = (bench.training(bench.model(), plan, precision_name=one) for one in ("fp32", name))
    losses, expected = ([result.train_mean_nll for result in training.run()] for training in (half, single))
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses != pytest.approx(expected, rel=1e-6), "computed in float32"
    assert {value.dtype for value in half.weights().values()} == {torch.float32}
    assert {tensor.dtype for tensor in half.capture().tensors["optimizer"].values()} == {torch.float32}


def test_the_choice_names_what_it_saw():
    decision = choose_precision(CPU)
    native = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    assert decision.key == "training.precision"
    assert decision.value == ("bf16" if native else "fp32")
    assert "bf16" in decision.reason


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="unknown precision `fp8`"):
        Precision("fp8", CPU)


def test_a_scale_left_in_the_gradients_is_caught(bench, mutant):
    """N10, N11: the test above fails when gradients are not unscaled."""
    broken = mutant(precision, "1.0 / self._scale", "1.0")
    plan = bench.plan(bench.examples(4), batch_size=4)
    training = bench.training(bench.model(), plan)
    norm = training.run()[0].grad_norm
    other = bench.training(bench.model(), plan)
    other.precision = broken.Precision("fp16", CPU)
    assert other.run()[0].grad_norm > 1000 * norm
