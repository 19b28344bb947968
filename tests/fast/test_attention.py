"""N5 and N15 for attention by segments: every backend is attention under the dense mask, and no document feels another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtune.models.attention import BACKENDS, Rule, Segments, dense_mask, is_segment_mask, segment_mask
from llmtune.models.fused_attention import plan_tiles, tiled_attention

CPU = torch.device("cpu")
MARKS = (0, 3, 4, 60, 120, 700, 705, 1000)


def heads(count: int, dtype: torch.dtype = torch.float32, total: int = MARKS[-1], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, total, count, 16, generator=generator, dtype=torch.float32).to(dtype).transpose(1, 2).requires_grad_()


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, marks: tuple[int, ...] = MARKS) -> torch.Tensor:
    """Attention from its definition in float64, with nothing shared with the code under test but the mask (which has its own test)."""
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~dense_mask(marks, rule.window, CPU), float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def run(attend: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attend(*inputs)
    weights = torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape)
    (output.double() * weights).sum().backward()
    return [output.detach(), *(x.grad for x in inputs if x.grad is not None)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def test_the_dense_mask_is_the_definition_of_what_a_query_sees() -> None:
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(dense_mask((0, 3, 5), 2, CPU), expected)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        (backend, rule)
        for backend in ("tiles", "sdpa", "flex", "eager")
        for rule in (Rule(0.3), Rule(0.3, window=37), Rule(0.3, window=300), Rule(0.3, softcap=0.8), Rule(0.3, window=37, softcap=0.8))
        if not (backend == "sdpa" and rule.softcap)
    ],
)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_every_backend_equals_attention_under_the_dense_mask(backend: str, rule: Rule) -> None:
    """N15: outputs within 1e-6, gradients within 1e-5 relative, float32."""
    query, key, value = heads(6, seed=1), heads(2, seed=2), heads(2, seed=3)
    segments = Segments(torch.tensor(MARKS, dtype=torch.int32), 580)
    if backend == "flex":  # flex attention has no backward pass on a CPU
        with torch.no_grad():
            inputs = [x.detach() for x in (query, key, value)]
            assert relative(BACKENDS[backend](*inputs, segments, rule), reference(*inputs, rule)) < 1e-6
        return
    found = run(lambda q, k, v: BACKENDS[backend](q, k, v, segments, rule), query, key, value)
    expected = run(lambda q, k, v: reference(q, k, v, rule), query, key, value)
    assert relative(found[0], expected[0]) < 1e-6
    assert [relative(a, b) < 1e-5 for a, b in zip(found[1:], expected[1:], strict=True)] == [True] * 3


def test_tiles_of_heads_that_share_no_key_head_equal_attention_under_the_dense_mask() -> None:
    """N15 where a tile takes more queries because no heads are stacked in it: 256 of them, in a document of 580."""
    inputs = heads(3, seed=1), heads(3, seed=2), heads(3, seed=3)
    found = run(lambda q, k, v: tiled_attention(q, k, v, MARKS, scale=0.3), *inputs)
    expected = run(lambda q, k, v: reference(q, k, v, Rule(0.3)), *inputs)
    assert relative(found[0], expected[0]) < 1e-6
    assert max(relative(a, b) for a, b in zip(found[1:], expected[1:], strict=True)) < 1e-5


def test_tiles_in_bf16_stay_within_a_hundredth() -> None:
    """N15: the stated bound in bf16, outputs and gradients, relative in norm."""
    inputs = heads(6, torch.bfloat16, seed=1), heads(2, torch.bfloat16, seed=2), heads(2, torch.bfloat16, seed=3)
    found = run(lambda q, k, v: tiled_attention(q, k, v, MARKS, scale=0.25), *inputs)
    expected = run(lambda q, k, v: reference(q, k, v, Rule(0.25)), *inputs)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["tiles", "sdpa", "eager"])
def test_a_document_does_not_feel_its_neighbour_by_one_bit(backend: str, dtype: torch.dtype) -> None:
    """N5: outputs and gradients of every other document are bit-identical when one document changes."""
    query, key, value = heads(6, dtype, seed=1), heads(2, dtype, seed=2), heads(2, dtype, seed=3)
    changed = [torch.cat([x[:, :, :4], 3 * x[:, :, 4:60] + 1, x[:, :, 60:]], dim=2) for x in (query, key, value)]
    segments = Segments(torch.tensor(MARKS, dtype=torch.int32), 580)
    one = run(lambda q, k, v: BACKENDS[backend](q, k, v, segments, Rule(0.25)), query, key, value)
    other = run(lambda q, k, v: BACKENDS[backend](q, k, v, segments, Rule(0.25)), *changed)
    assert torch.equal(one[0][:, :4], other[0][:, :4])
    assert torch.equal(one[0][:, 60:], other[0][:, 60:])
    assert not torch.equal(one[0][:, 4:60], other[0][:, 4:60])
    for a, b in zip(one[1:], other[1:], strict=True):
        assert torch.equal(a[:, :, 60:], b[:, :, 60:])


@pytest.mark.parametrize("window", [None, 5, 37, 300])
@pytest.mark.parametrize("marks", [(0, 1), (0, 256), (0, 257, 600), (0, 100, 128, 129, 400, 410), MARKS])
def test_tiles_cover_every_visible_pair_once(marks: tuple[int, ...], window: int | None) -> None:
    seen = torch.zeros(marks[-1], marks[-1], dtype=torch.int32)
    for tile in plan_tiles(marks, window, 64, torch.float32, CPU):
        block = torch.ones(tile.stop - tile.start, tile.stop - tile.key_start, dtype=torch.int32)
        block[:, block.shape[1] - tile.hidden.shape[1] :] = (tile.hidden == 0).int()
        seen[tile.start : tile.stop, tile.key_start : tile.stop] += block
    assert torch.equal(seen, dense_mask(marks, window, CPU).int())


@pytest.mark.parametrize("backend", ["tiles", "varlen", "flex"])
def test_dropout_is_drawn_by_sdpa_where_a_backend_has_none(backend: str) -> None:
    """The probe of a model runs without dropout, so a backend that passed it must also train with it."""
    segments, rule = Segments(torch.tensor(MARKS, dtype=torch.int32), 580), Rule(0.25, dropout=0.3)
    found = []
    for name in (backend, "sdpa"):
        torch.manual_seed(1)
        found.append(BACKENDS[name](heads(4), heads(2), heads(2, seed=1), segments, rule))
    assert torch.equal(*found)
    assert not torch.equal(found[0], BACKENDS["sdpa"](heads(4), heads(2), heads(2, seed=1), segments, Rule(0.25)))


def test_a_segment_mask_costs_a_few_numbers_and_is_told_from_other_masks() -> None:
    mask = segment_mask(torch.tensor([0, 3, 9], dtype=torch.int32), 6, CPU)
    assert mask.shape == (1, 1, 6, 3)
    assert mask.untyped_storage().nbytes() == 12
    assert is_segment_mask(mask)
    assert not any(
        is_segment_mask(other) for other in (None, torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.int32))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_cuda_backends_equal_attention_under_the_dense_mask(backend: str, window: int | None) -> None:
    """N15 on a GPU, bf16: within a hundredth of float64, relative in norm."""
    inputs = [torch.randn(1, count, MARKS[-1], 64).to(torch.bfloat16) for count in (6, 2, 2)]
    segments = Segments(torch.tensor(MARKS, dtype=torch.int32, device="cuda"), 580)
    expected = run(lambda q, k, v: reference(q, k, v, Rule(0.125, window)), *inputs)
    found = run(lambda q, k, v: BACKENDS[backend](q, k, v, segments, Rule(0.125, window)).cpu(), *(x.cuda() for x in inputs))
    assert max(relative(a.cpu(), b) for a, b in zip(found, expected, strict=True)) < 1e-2
