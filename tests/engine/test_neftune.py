"""NEFTune: how much noise, where, and where none."""

import math

import numpy as np
import pytest
import torch

from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.neftune import Neftune, noise_scale
from llmtune.engine.objective import plain_nll_sum

ALPHA, WIDTH = 5.0, 32


def noise_of(bench, layout, seed=3, training=True):
    """The noise on each example's embeddings: a list of [length, width]."""
    model = bench.model().train(training)
    examples = [
        Example(f"a:{n}", np.full(n, 1, np.int32), np.r_[0, np.ones(n - 1)].astype(np.float32)) for n in (3, 10, 6)
    ]
    batch = make_micro_batch(examples, layout, 0)
    embedding, seen = model.get_input_embeddings(), []
    noisy = Neftune(lambda one: plain_nll_sum(model, one), embedding, ALPHA)
    keep = embedding.register_forward_hook(
        lambda module, inputs, output: seen.append(output - module.weight[inputs[0]])
    )
    torch.manual_seed(seed)
    noisy(batch)
    keep.remove()
    noisy.remove()
    noise_BTD = seen[0].detach()
    if layout == "flat":
        return list(noise_BTD[0].split([3, 10, 6])), noise_BTD
    return [noise_BTD[row, :length] for row, length in enumerate((3, 10, 6))], noise_BTD


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_noise_is_uniform_within_alpha_over_the_root_of_the_examples_own_size(bench, layout):
    noises, whole = noise_of(bench, layout)
    for noise in noises:
        bound = ALPHA / math.sqrt(len(noise) * WIDTH)
        assert 0.9 * bound < noise.abs().max() <= bound * 1.0001
        assert abs(noise.mean()) < 0.2 * bound
        assert noise.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)  # of a uniform number within the bound
    if layout == "padded":
        assert (whole[0, 3:] == 0).all()


def test_neither_padding_nor_packing_changes_the_noise(bench):
    padded, flat = noise_of(bench, "padded")[0], noise_of(bench, "flat")[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(padded, flat, strict=True))


def test_there_is_no_noise_in_evaluation(bench):
    assert (noise_of(bench, "padded", training=False)[1] == 0).all()


def test_the_noise_comes_from_the_global_generator(bench):
    first, again, other = (noise_of(bench, "flat", seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_removing_it_gives_the_model_back(bench):
    model = bench.model()
    batch = make_micro_batch(list(bench.examples(3)), "padded", 0)
    before = plain_nll_sum(model, batch)
    noisy = Neftune(lambda one: plain_nll_sum(model, one), model.get_input_embeddings(), ALPHA)
    assert noisy(batch) != before
    noisy.remove()
    assert plain_nll_sum(model, batch) == before


def test_a_forward_outside_the_loss_has_no_noise(bench):
    """Generation and other forwards during training see the model as it is."""
    model = bench.model()
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    Neftune(lambda one: plain_nll_sum(model, one), model.get_input_embeddings(), ALPHA)
    assert torch.equal(model(ids).logits, before)


def test_the_scale_of_rows_without_padding():
    batch = make_micro_batch([Example("a:1", np.zeros(4, np.int32), np.zeros(4, np.float32))] * 2, "padded", 0)
    assert noise_scale(batch, 2.0, 25).tolist() == [[pytest.approx(0.2)] * 4] * 2
