"""N1, N3, N4, N10: an update depends on the rows of its window and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from example_list import ExampleList
from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.data.example import Example
from llmtune.engine import loop
from llmtune.engine import objective as loss_module
from llmtune.engine.objective import plain_nll_sum, weighted_nll_sum

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def window_gradients(bench, batch_size, accumulation, train_steps=loop.train_steps, **plan):
    """Gradients and losses of all windows, the weights staying where they are."""
    model = bench.model()
    recorder = bench.recorder(dict(model.named_parameters()))
    plan = bench.plan(bench.examples(), batch_size=batch_size, accumulation=accumulation, **plan)
    results = bench.training(model, plan, optimizer=recorder, max_grad_norm=None, train_steps=train_steps).run()
    return recorder.steps, [result.train_mean_nll for result in results]


def worst_difference(bench, train_steps=loop.train_steps):
    """Largest relative difference of a window's gradient between one micro-batch of 8 and any other cut of the same 8
    rows.
    """
    whole, losses = window_gradients(bench, 8, 1)
    worst = 0.0
    for cut in CUTS:
        steps, mean_nlls = window_gradients(bench, *cut, train_steps=train_steps)
        assert len(steps) == len(whole) == 5  # 37 rows: four windows of 8 and one of 5
        worst = max(worst, *(bench.relative_difference(a, b) for a, b in zip(steps, whole, strict=True)))
        if train_steps is loop.train_steps:
            assert mean_nlls == pytest.approx(losses, rel=1e-6)
    return worst


def test_an_update_does_not_depend_on_how_a_window_is_cut(bench):
    """N1, with ragged rows, fractional weights and a last partial window."""
    assert worst_difference(bench) < 1e-6


def test_a_mean_of_means_is_caught(bench, mutant):
    """N1's test fails when each micro-batch is divided by its own weight."""
    broken = mutant(loop, "batch_loss / divisor", "batch_loss / batch.loss_weight / len(window.micro_batches)")
    assert worst_difference(bench, broken.train_steps) > 1e-3


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_an_update_does_not_depend_on_layout_or_groups(bench, layout):
    """N1, N5: flat rows and cut groups give the gradients of the padded micro-batch."""
    whole, _ = window_gradients(bench, 8, 1)
    cut, _ = window_gradients(bench, 4, 2, layout=layout, max_group_tokens=50)
    assert max(bench.relative_difference(a, b) for a, b in zip(cut, whole, strict=True)) < 1e-6


def test_a_micro_batch_without_trained_tokens_adds_zero(bench):
    """N3: loss 0 and zero gradients, also where the logits of untrained positions are not finite."""
    model = bench.model()
    examples = [Example("a:1", np.array([1, 2, 3], np.int32), np.zeros(3, np.float32))]
    nats = plain_nll_sum(model, make_micro_batch(examples, "padded", 0))
    nats.backward()
    assert nats.item() == 0.0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    broken_logits = torch.full((1, 3, 4), float("nan"))
    assert weighted_nll_sum(broken_logits, torch.tensor([[1, 2, 3]]), torch.zeros(1, 3)).item() == 0.0


def test_multiplying_by_a_zero_weight_is_caught(mutant):
    """N3's test fails when untrained positions are multiplied by 0 and not left out."""
    broken = mutant(loss_module, ".masked_fill(weights == 0, IGNORED)", "")
    assert broken.weighted_nll_sum(
        torch.full((1, 3, 4), float("nan")), torch.tensor([[1, 2, 3]]), torch.zeros(1, 3)
    ).isnan()


def test_rows_without_trained_tokens_leave_the_other_rows_alone(bench):
    """N3: a window's mean is over its trained tokens only."""
    examples = bench.examples(8)
    silent = Example("silent:1", np.arange(30, dtype=np.int32), np.zeros(30, np.float32))

    def first_step(rows):
        model = bench.model()
        recorder = bench.recorder(dict(model.named_parameters()))
        plan = bench.plan(ExampleList(rows), batch_size=3, accumulation=4, shuffle_seed=None)
        return bench.training(model, plan, optimizer=recorder, max_grad_norm=None).run()[0], recorder.steps[0]

    with_silent, gradients_with = first_step([silent, silent, silent, *examples])
    without, gradients = first_step(list(examples))
    assert with_silent.train_mean_nll == pytest.approx(without.train_mean_nll, rel=1e-6)
    assert bench.relative_difference(gradients_with, gradients) < 1e-6


def test_a_window_without_any_trained_token_is_an_update_with_gradient_zero(bench):
    """N3: no division by zero; the step is counted as planned."""
    plan = bench.plan(bench.examples(4, empty_every=1), batch_size=2)
    result = bench.training(bench.model(), plan).run()[0]
    assert (result.step, result.train_mean_nll, result.grad_norm, result.skipped) == (1, 0.0, 0.0, False)


def nll_of(model, batch):
    with torch.no_grad():
        return plain_nll_sum(model, batch).item()


def test_padding_and_order_have_no_effect(bench):
    """N4: pad length, pad id, row order, padding side, and what stands under the mask."""
    model = bench.model()
    examples = list(bench.examples(5))
    batch = make_micro_batch(examples, "padded", 0)
    nats = nll_of(model, batch)

    assert nll_of(model, make_micro_batch(examples[::-1], "padded", 0)) == pytest.approx(nats, rel=1e-6)
    assert nll_of(model, make_micro_batch(examples, "padded", 9)) == pytest.approx(nats, rel=1e-6)
    wide = Example("wide:1", np.zeros(60, np.int32), np.zeros(60, np.float32))
    assert nll_of(model, make_micro_batch([*examples, wide], "padded", 0)) == pytest.approx(nats, rel=1e-6)
    assert sum(nll_of(model, make_micro_batch([one], "padded", 0)) for one in examples) == pytest.approx(nats, rel=1e-6)
    assert nll_of(model, left_padded(batch)) == pytest.approx(nats, rel=1e-6)
    noise = torch.randint_like(batch.input_ids, 64)
    assert nll_of(model, replace(batch, input_ids=torch.where(batch.attention_mask, batch.input_ids, noise))) == nats


def left_padded(batch):
    def turn(tensor_BT):
        return torch.stack(
            [row.roll(int((~mask).sum())) for row, mask in zip(tensor_BT, batch.attention_mask, strict=True)]
        )

    mask = turn(batch.attention_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return replace(
        batch, input_ids=turn(batch.input_ids), weights=turn(batch.weights), position_ids=positions, attention_mask=mask
    )


def test_the_loss_is_what_numpy_computes_in_float64(bench):
    """N4: weighted negative log-likelihood, position t predicted by the logits before it."""
    model = bench.model()
    batch = make_micro_batch(list(bench.examples(5)), "padded", 0)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.double().numpy()
    expected = 0.0
    for row, ids, weights in zip(logits, batch.input_ids.numpy(), batch.weights.numpy(), strict=True):
        for t in range(1, len(ids)):
            log_total = np.log(np.exp(row[t - 1] - row[t - 1].max()).sum()) + row[t - 1].max()
            expected += float(weights[t]) * (log_total - row[t - 1][ids[t]])
    assert nll_of(model, batch) == pytest.approx(expected, rel=1e-6)


def test_clipping_is_that_of_torch_on_the_whole_window(bench):
    """N10: after accumulation, `clip_grad_norm_` on the same gradients, bit for bit; the norm reported is the one
    before.
    """
    limit = 0.5
    plan = bench.plan(bench.examples())
    models = [bench.model(), bench.model()]
    raw, clipped = (bench.recorder(dict(model.named_parameters())) for model in models)
    bench.training(models[0], plan, optimizer=raw, max_grad_norm=None).run()
    results = bench.training(models[1], plan, optimizer=clipped, max_grad_norm=limit).run()
    for ours, gradients, result in zip(clipped.steps, raw.steps, results, strict=True):
        holders = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients.values()]
        for holder, gradient in zip(holders, gradients.values(), strict=True):
            holder.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(holders, limit)
        assert result.grad_norm == norm.item() > limit
        assert bench.same_bits(ours, dict(zip(gradients, [holder.grad for holder in holders], strict=True)))


def test_clipping_each_micro_batch_is_caught(bench, mutant):
    """N10's test fails when gradients are clipped before the window is whole."""
    broken = mutant(
        loop,
        "            update.backward(loss * precision.scale if precision.scale != 1.0 else loss)",
        "            update.backward(loss); update.finish_gradients()",
    )
    plan = bench.plan(bench.examples(), batch_size=2, accumulation=4)
    norms = [
        [
            result.grad_norm
            for result in bench.training(bench.model(), plan, max_grad_norm=0.5, train_steps=one.train_steps).run()
        ]
        for one in (loop, broken)
    ]
    assert norms[1] != pytest.approx(norms[0], rel=1e-3)
