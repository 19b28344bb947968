"""What each overlong policy keeps, token by token (Q4)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data.dataset.overlong import END_LOST, cut_example

END, BOS = 9, 1


def cut(ids, weights, length, policy):
    return cut_example(
        np.array(ids, dtype=np.int32),
        np.array(weights, dtype=np.float32),
        max_length=length,
        policy=policy,
        end_token_ids=(END,),
        bos_token_id=BOS,
    )


def plain(pieces):
    return [(ids.tolist(), weights.tolist()) for ids, weights in pieces]


#         BOS  question     answer          question  answer
IDS = [1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 8, 9]
WEIGHTS = [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("policy", "length", "pieces", "lost"),
    [
        ("drop", 11, [], 12),
        ("error", 11, [], 12),
        # the cut falls between turns: nothing but the first tokens
        ("truncate_right", 8, [([1, 2, 3, 4, 5, 6, 9, 2], [0, 0, 0, 1, 1, 1, 1, 0])], 4),
        ("truncate_right", 7, [([1, 2, 3, 4, 5, 6, 9], [0, 0, 0, 1, 1, 1, 1])], 5),
        # the cut goes through an answer: its end token takes the last place
        ("truncate_right", 5, [([1, 2, 3, 4, 9], [0, 0, 0, 1, 1])], 7),
        ("truncate_right", 11, [([1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 9], [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1])], 1),
        # nothing trained is left
        ("truncate_right", 3, [], 12),
        # the begin token stays; what now comes first is predicted from nothing, so it has no weight
        ("truncate_left", 5, [([1, 3, 7, 8, 9], [0, 0, 1, 1, 1])], 7),
        ("truncate_left", 3, [([1, 8, 9], [0, 1, 1])], 9),
        ("split", 7, [([1, 2, 3, 4, 5, 6, 9], [0, 0, 0, 1, 1, 1, 1]), ([9, 2, 3, 7, 8, 9], [0, 0, 0, 1, 1, 1])], 0),
        ("split", 3, [([3, 4, 5], [0, 1, 1]), ([5, 6, 9], [0, 1, 1]), ([3, 7, 8], [0, 1, 1]), ([8, 9], [0, 1])], 3),
    ],
)
def test_what_is_kept(policy, length, pieces, lost):
    result = cut(IDS, WEIGHTS, length, policy)
    assert plain(result.pieces) == pieces
    assert result.tokens_lost == lost
    assert result.warnings == ()


def test_a_cut_answer_without_an_end_token_of_its_own_is_said():
    result = cut([1, 2, 3, 4, 5], [0, 0, 1, 1, 1], 4, "truncate_right")
    assert plain(result.pieces) == [([1, 2, 3, 4], [0, 0, 1, 1])]
    assert result.warnings == (END_LOST,)


def test_truncate_left_needs_no_begin_token():
    assert plain(cut([2, 3, 4, 5, 9], [0, 1, 1, 1, 1], 3, "truncate_left").pieces) == [([4, 5, 9], [0, 1, 1])]


@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=60),
    length=st.integers(2, 20),
    policy=st.sampled_from(["truncate_right", "truncate_left", "split"]),
)
def test_pieces_fit_and_split_trains_every_token_exactly_once(weights, length, policy):
    weights = [0.0, *weights[1:]]
    if len(weights) <= length:
        return
    ids = list(range(100, 100 + len(weights)))
    result = cut(ids, weights, length, policy)
    trained = [
        (token, weight)
        for piece, w in result.pieces
        for token, weight in zip(piece.tolist(), w.tolist(), strict=True)
        if weight
    ]
    for piece, piece_weights in result.pieces:
        assert 2 <= len(piece) <= length
        assert piece_weights[0] == 0
        assert piece_weights.any()
    assert len(ids) - len({token for piece, _ in result.pieces for token in piece.tolist()}) == result.tokens_lost
    expected = [(token, weight) for token, weight in zip(ids, weights, strict=True) if weight]
    assert trained == expected if policy == "split" else set(trained) <= set(expected)
