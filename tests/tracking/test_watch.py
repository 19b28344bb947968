"""Histograms of gradients: taken when they are whole, and without a trace in the training."""

import pytest
import torch

from llmtune.tracking.watch import HistogramWatch, histogram_of


def train(steps, *, watch=None, every_steps=1):
    """Train a tiny regression with two micro-batches a step; return its weights and what was taken after each step."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    watching = (
        HistogramWatch(optimizer, dict(layer.named_parameters()), watch, every_steps=every_steps) if watch else None
    )
    taken, gradients = [], []
    for _ in range(steps):
        for _ in range(2):
            layer(torch.randn(4, 3, generator=generator)).square().mean().backward()
        gradients.append(layer.weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        taken.append(watching.take() if watching else {})
    return [parameter.detach().clone() for parameter in layer.parameters()], taken, gradients


@pytest.mark.parametrize("kind", ["gradients", "all"])
def test_watching_changes_nothing(kind):
    """N12."""
    for one, other in zip(train(4)[0], train(4, watch=kind)[0], strict=True):
        assert torch.equal(one, other)


def test_a_histogram_is_of_the_whole_windows_gradient():
    _, taken, gradients = train(2, watch="gradients")
    for histograms, gradient in zip(taken, gradients, strict=True):
        found = histograms["gradients/weight"]
        assert sum(found.counts) == gradient.numel()
        assert found.edges[0] == pytest.approx(float(gradient.min()))
        assert found.edges[-1] == pytest.approx(float(gradient.max()))
        assert found.norm == pytest.approx(float(gradient.norm()))


def test_only_steps_that_are_logged_are_looked_at():
    assert [bool(histograms) for histograms in train(4, watch="gradients", every_steps=2)[1]] == [
        False,
        True,
        False,
        True,
    ]


def test_weights_are_counted_when_all_is_watched():
    assert set(train(1, watch="all")[1][0]) == {"gradients/weight", "gradients/bias", "weights/weight", "weights/bias"}


def test_values_that_are_no_numbers_and_values_that_are_all_alike_make_a_histogram():
    assert sum(histogram_of(torch.full((5,), 2.0)).counts) == 5
    assert sum(histogram_of(torch.full((5,), float("nan"))).counts) == 0
