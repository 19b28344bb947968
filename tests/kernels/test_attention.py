"""N5 and N15 for attention by segments: every backend is attention under the dense mask, and no document feels another."""  # noqa: E501

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from llmtune.kernels.attention import BACKENDS, AttentionParams, Segments, dense_mask, is_segment_mask, segment_mask
from llmtune.kernels.attention_layout import Tile, make_layout, plan_tiles
from llmtune.kernels.tiled_attention import tiled_attention

CPU = torch.device("cpu")
MARKS = (0, 3, 4, 60, 120, 700, 705, 1000)
SHORT = (0, 40, 70, 150, 170, 260, 300, 305)
"""Lengths 40, 30, 80, 20, 90, 40, 5: packed into pieces of 90, which takes another order and leaves gaps."""
ALIKE = (0, 200, 400, 600, 760, 860)
"""Three documents of 200 side by side, one of 160, one of 100."""
APART = (0, 300, 340, 600, 770, 1070)
"""Documents of 300, 40, 260, 170 and 300: their parts that go together are unevenly far apart."""


def heads(count: int, dtype: torch.dtype = torch.float32, total: int = MARKS[-1], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, total, count, 16, generator=generator, dtype=torch.float32)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
    )


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: AttentionParams, marks: tuple[int, ...] = MARKS
) -> torch.Tensor:
    """Attention from its definition in float64, with nothing shared with the code under test but the mask (which has
    its own test).
    """
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
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool
    )
    assert torch.equal(dense_mask((0, 3, 5), 2, CPU), expected)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        (backend, rule)
        for backend in ("tiles", "sdpa", "flex", "eager")
        for rule in (
            AttentionParams(0.3),
            AttentionParams(0.3, window=37),
            AttentionParams(0.3, window=300),
            AttentionParams(0.3, softcap=0.8),
            AttentionParams(0.3, window=37, softcap=0.8),
        )
        if not (backend == "sdpa" and rule.softcap)
    ],
)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_every_backend_equals_attention_under_the_dense_mask(
    backend: str, rule: AttentionParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N15: outputs within 1e-6, gradients within 1e-5 relative, float32."""
    query, key, value = heads(6, seed=1), heads(2, seed=2), heads(2, seed=3)
    segments = Segments(torch.tensor(MARKS, dtype=torch.int32), 580)
    # Torch refuses the backward pass on a CPU, where only the uncompiled form has one.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_rows: None)
    found = run(lambda q, k, v: BACKENDS[backend](q, k, v, segments, rule), query, key, value)
    expected = run(lambda q, k, v: reference(q, k, v, rule), query, key, value)
    assert relative(found[0], expected[0]) < 1e-6
    assert [relative(a, b) < 1e-5 for a, b in zip(found[1:], expected[1:], strict=True)] == [True] * 3


def test_tiles_of_heads_that_share_no_key_head_equal_attention_under_the_dense_mask() -> None:
    """N15 where a tile takes more queries because no heads are stacked in it: 256 of them, in a document of 580."""
    inputs = heads(3, seed=1), heads(3, seed=2), heads(3, seed=3)
    found = run(lambda q, k, v: tiled_attention(q, k, v, MARKS, scale=0.3), *inputs)
    expected = run(lambda q, k, v: reference(q, k, v, AttentionParams(0.3)), *inputs)
    assert relative(found[0], expected[0]) < 1e-6
    assert max(relative(a, b) for a, b in zip(found[1:], expected[1:], strict=True)) < 1e-5


@pytest.mark.parametrize(
    "rule",
    [AttentionParams(0.3), AttentionParams(0.3, window=37), AttentionParams(0.3, window=150, softcap=0.8)],
    ids=str,
)
@pytest.mark.parametrize("marks", [SHORT, ALIKE, APART], ids=["packed", "alike", "apart"])
def test_tiles_of_several_documents_at_once_equal_attention_under_the_dense_mask(
    marks: tuple[int, ...], rule: AttentionParams
) -> None:
    """N15 where short documents are packed into pieces in another order, with gaps, and where documents of one length
    are stacked.
    """
    inputs = [heads(count, total=marks[-1], seed=seed) for seed, count in enumerate((6, 2, 2))]
    segments = Segments(torch.tensor(marks, dtype=torch.int32), 200)
    found = run(lambda q, k, v: BACKENDS["tiles"](q, k, v, segments, rule), *inputs)
    expected = run(lambda q, k, v: reference(q, k, v, rule, marks), *inputs)
    assert relative(found[0], expected[0]) < 1e-6
    assert max(relative(a, b) for a, b in zip(found[1:], expected[1:], strict=True)) < 1e-5


def test_tiles_in_bf16_stay_within_a_hundredth() -> None:
    """N15: the stated bound in bf16, outputs and gradients, relative in norm."""
    inputs = heads(6, torch.bfloat16, seed=1), heads(2, torch.bfloat16, seed=2), heads(2, torch.bfloat16, seed=3)
    found = run(lambda q, k, v: tiled_attention(q, k, v, MARKS, scale=0.25), *inputs)
    expected = run(lambda q, k, v: reference(q, k, v, AttentionParams(0.25)), *inputs)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["tiles", "sdpa", "eager"])
def test_a_document_does_not_feel_its_neighbour_by_one_bit(backend: str, dtype: torch.dtype) -> None:
    """N5: outputs and gradients of every other document are bit-identical when one document changes."""
    query, key, value = heads(6, dtype, seed=1), heads(2, dtype, seed=2), heads(2, dtype, seed=3)
    changed = [torch.cat([x[:, :, :4], 3 * x[:, :, 4:60] + 1, x[:, :, 60:]], dim=2) for x in (query, key, value)]
    segments = Segments(torch.tensor(MARKS, dtype=torch.int32), 580)
    one = run(lambda q, k, v: BACKENDS[backend](q, k, v, segments, AttentionParams(0.25)), query, key, value)
    other = run(lambda q, k, v: BACKENDS[backend](q, k, v, segments, AttentionParams(0.25)), *changed)
    assert torch.equal(one[0][:, :4], other[0][:, :4])
    assert torch.equal(one[0][:, 60:], other[0][:, 60:])
    assert not torch.equal(one[0][:, 4:60], other[0][:, 4:60])
    for a, b in zip(one[1:], other[1:], strict=True):
        assert torch.equal(a[:, :, 60:], b[:, :, 60:])


@pytest.mark.parametrize(("marks", "changed"), [(ALIKE, (200, 400)), (APART, (340, 600))], ids=["alike", "apart"])
def test_a_document_does_not_feel_another_of_the_same_products_by_one_bit(
    marks: tuple[int, ...], changed: tuple[int, int]
) -> None:
    """N5 where one product serves several documents, and one of them changes."""
    start, stop = changed
    inputs = [heads(count, torch.bfloat16, marks[-1], seed) for seed, count in enumerate((6, 2, 2))]
    others = [torch.cat([x[:, :, :start], 3 * x[:, :, start:stop] + 1, x[:, :, stop:]], dim=2) for x in inputs]
    one, other = (
        run(lambda q, k, v: tiled_attention(q, k, v, marks, scale=0.25), *given) for given in (inputs, others)
    )
    assert not torch.equal(one[0][:, start:stop], other[0][:, start:stop])
    for a, b, dim in zip(one, other, (1, 2, 2, 2), strict=True):
        assert torch.equal(a.narrow(dim, 0, start), b.narrow(dim, 0, start))
        assert torch.equal(a.narrow(dim, stop, marks[-1] - stop), b.narrow(dim, stop, marks[-1] - stop))


def places_of(tile: Tile) -> torch.Tensor:
    """The row's token at each place of a tile's pieces, from their beginning to the tile's end, [C, stop]; -1 in gaps."""  # noqa: E501
    if tile.rearrangement is None:
        return torch.tensor(tile.offsets).unsqueeze(1) + torch.arange(tile.stop)
    own = tile.offsets[0] + torch.arange(len(tile.rearrangement.inverse))
    at_places = torch.full((tile.pieces * tile.stop,), -1)
    at_places[tile.rearrangement.inverse] = own
    assert torch.equal(own[tile.rearrangement.order][at_places >= 0], at_places[at_places >= 0])
    return at_places.view(tile.pieces, tile.stop)


@pytest.mark.parametrize("window", [None, 5, 37, 300])
@pytest.mark.parametrize(
    "marks", [(0, 1), (0, 256), (0, 257, 600), (0, 100, 128, 129, 400, 410), ALIKE, APART, SHORT, MARKS]
)
def test_tiles_cover_every_visible_pair_once(marks: tuple[int, ...], window: int | None) -> None:
    seen = torch.zeros(marks[-1], marks[-1], dtype=torch.int32)
    for tile in plan_tiles(marks, window, 64, torch.float32, CPU):
        columns = tile.mask.shape[-1]
        hidden_CNc = tile.mask.expand(tile.pieces, 1, *tile.mask.shape[-2:])[:, 0]
        for tokens, hidden in zip(places_of(tile), hidden_CNc, strict=True):
            block = torch.ones(tile.stop - tile.start, tile.stop - tile.key_start, dtype=torch.int32)
            block[:, block.shape[1] - columns :] = (hidden == 0).int()
            query, key = tokens[tile.start : tile.stop], tokens[tile.key_start : tile.stop]
            gap, key_gap = query < 0, key < 0
            seen[query[~gap][:, None], key[~key_gap][None, :]] += block[~gap][:, ~key_gap]
            assert block[gap][:, ~key_gap].sum() == block[~gap][:, key_gap].sum() == 0, (
                "nothing passes between gaps and tokens"
            )
            assert (block[gap].sum(1) == 1).all(), "a gap's output is finite"
    assert torch.equal(seen, dense_mask(marks, window, CPU).int())


@pytest.mark.parametrize("marks", [ALIKE, APART, SHORT, MARKS])
def test_every_query_stands_once_where_the_layout_says_and_gaps_repeat_one(marks: tuple[int, ...]) -> None:
    layout = make_layout(marks, None, 64, 6, 2, torch.float32, CPU)
    queries = torch.arange(6 * marks[-1], dtype=torch.int32)
    assert torch.equal(layout.order[layout.inverse], queries)
    for tile, (own,) in layout.by_tile(layout.order.unsqueeze(1)):
        token_GCRN, head_GCRN = (part.view(2, tile.pieces, 3, -1) for part in (own // 6, own % 6))
        assert torch.equal(head_GCRN, torch.arange(6).view(2, 1, 3, 1).expand_as(head_GCRN)), (
            "heads that share a key head are neighbours"
        )
        expected_GCRN = places_of(tile)[:, tile.start : tile.stop].view(1, tile.pieces, 1, -1).expand_as(token_GCRN)
        assert torch.equal(token_GCRN[expected_GCRN >= 0], expected_GCRN[expected_GCRN >= 0].int())
    assert len(layout.order) == sum(6 * tile.queries for tile in layout.tiles)


def test_strides_of_the_inputs_change_no_bit() -> None:
    as_models_give_them = [heads(count, torch.bfloat16, seed=seed) for seed, count in enumerate((6, 2, 2))]
    in_order = [x.contiguous() for x in as_models_give_them]
    assert in_order[0].stride() != as_models_give_them[0].stride()
    found, expected = (
        run(lambda q, k, v: tiled_attention(q, k, v, MARKS, scale=0.3), *x) for x in (as_models_give_them, in_order)
    )
    assert all(map(torch.equal, found, expected))


def test_documents_share_their_products() -> None:
    """What the tiles are for: a few large products, whatever the order of the documents."""
    short = plan_tiles(SHORT, None, 256, torch.float32, CPU)
    assert [(tile.pieces, tile.stop) for tile in short] == [(4, 90)]
    in_order = plan_tiles((0, 30, 64, 104, 128), None, 256, torch.float32, CPU)
    assert [(tile.pieces, tile.stop, tile.rearrangement) for tile in in_order] == [(2, 64, None)]
    alike = plan_tiles((0, 256, 512, 768, 900), None, 256, torch.float32, CPU)
    assert [(tile.offsets, tile.start, tile.stop) for tile in alike] == [
        ((0, 256, 512, 768), 0, 128), ((0, 256, 512), 128, 256), ((768,), 128, 132),
    ]  # fmt: skip
    of_all_lengths = plan_tiles((0, 300, 340, 600, 2000, 2300), None, 256, torch.float32, CPU)
    assert [(tile.offsets, tile.start, tile.stop) for tile in of_all_lengths if tile.pieces > 1] == [
        ((0, 340, 2000), 0, 128), ((0, 340, 2000), 128, 256), ((0, 2000), 256, 300),
    ]  # fmt: skip
    assert {tile.stop - tile.start for tile in of_all_lengths if tile.offsets == (600,)} == {256, 1400 - 5 * 256}, (
        "probabilities not kept"
    )
    assert {tile.pieces for tile in plan_tiles((0, 1100, 2200), None, 256, torch.float32, CPU)} == {1}, "nor are these"


@pytest.mark.parametrize("backend", ["tiles", "varlen", "flex"])
def test_dropout_is_drawn_by_sdpa_where_a_backend_has_none(backend: str) -> None:
    """The probe of a model runs without dropout, so a backend that passed it must also train with it."""
    segments, rule = Segments(torch.tensor(MARKS, dtype=torch.int32), 580), AttentionParams(0.25, dropout=0.3)
    found = []
    for name in (backend, "sdpa"):
        torch.manual_seed(1)
        found.append(BACKENDS[name](heads(4), heads(2), heads(2, seed=1), segments, rule))
    assert torch.equal(*found)
    assert not torch.equal(
        found[0], BACKENDS["sdpa"](heads(4), heads(2), heads(2, seed=1), segments, AttentionParams(0.25))
    )


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_makes_one_mask_of_a_window_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as large as all pairs of tokens, and each layer and its recomputation would make it again."""
    made = []

    def noted(*args: Any, **named: Any) -> Any:
        made.append(args)
        return create_block_mask(*args, **named)

    monkeypatch.setattr("llmtune.kernels.attention.create_block_mask", noted)
    segments = Segments(torch.tensor([0, 40, 90], dtype=torch.int32), 50)
    inputs = [heads(count, total=90).detach() for count in (4, 2, 2)]
    for window in (None, 16, None, 16):
        BACKENDS["flex"](*inputs, segments, AttentionParams(0.25, window))
    assert len(made) == 2


def test_a_segment_mask_costs_a_few_numbers_and_is_told_from_other_masks() -> None:
    mask = segment_mask(torch.tensor([0, 3, 9], dtype=torch.int32), 6, CPU)
    assert mask.shape == (1, 1, 6, 3)
    assert mask.untyped_storage().nbytes() == 12
    assert is_segment_mask(mask)
    assert not any(
        is_segment_mask(other)
        for other in (None, torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.int32))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_cuda_backends_equal_attention_under_the_dense_mask(backend: str, window: int | None) -> None:
    """N15 on a GPU, bf16: within a hundredth of float64, relative in norm."""
    inputs = [torch.randn(1, count, MARKS[-1], 64).to(torch.bfloat16) for count in (6, 2, 2)]
    segments = Segments(torch.tensor(MARKS, dtype=torch.int32, device="cuda"), 580)
    expected = run(lambda q, k, v: reference(q, k, v, AttentionParams(0.125, window)), *inputs)
    found = run(
        lambda q, k, v: BACKENDS[backend](q, k, v, segments, AttentionParams(0.125, window)).cpu(),
        *(x.cuda() for x in inputs),
    )
    assert max(relative(a.cpu(), b) for a, b in zip(found, expected, strict=True)) < 1e-2
