"""Draw several answers to each prompt: prompts are computed once, their answers share them, and rows that end leave.

Every answer has a random generator of its own, so that what is drawn depends on its seed and on the model alone, not on
how many others are drawn beside it (but for the rounding of larger and smaller matrix products).

Shapes: P prompts, G answers to each, B rows that are still drawn, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llmtune.evaluation.generate import contiguous_rows_for_head, padded_on_the_left
from llmtune.models.parameters import base_model_of, eval_mode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["answer_seed", "draw_answers"]

COMPACT_BELOW = 0.75
"""Part of the rows still drawn below which the others leave the batch, which copies the cache of those that stay."""


def answer_seed(*facts: int | str) -> int:
    """A seed in [0, 2**63) for the generator of one answer, from whatever tells it from all others."""
    digest = hashlib.sha256(repr(facts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_answers(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 64,
) -> list[list[list[int]]]:
    """Return the ids of the answers to each prompt, the stop token included; at temperature 0 the most likely tokens.

    seeds: one for each answer to each prompt. An answer ends with the first stop token or after `max_new_tokens`.
    batch_size: rows drawn at once; a prompt with more answers than that is drawn by itself. Weights, modes and random
    states stay as they were (N12).
    """
    base = base_model_of(model)
    answers: list[list[list[int]]] = [[] for _ in prompts]
    # The longest first, so that a batch, which is padded to its longest prompt, has prompts of about one length.
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        rows = sum(len(seeds[other]) for other in batches[-1])
        if batches[-1] and rows + len(seeds[index]) > batch_size:
            batches.append([])
        batches[-1].append(index)
    with eval_mode(model), contiguous_rows_for_head(base):
        for batch in filter(None, batches):
            flat_seeds = [seed for index in batch for seed in seeds[index]]
            decoder = _Decoder(base, [prompts[index] for index in batch], pad_id)
            decoder.share([len(seeds[index]) for index in batch], room=max_new_tokens)
            drawn = iter(_draw(decoder, flat_seeds, set(stop_token_ids), max_new_tokens, temperature))
            for index in batch:
                answers[index] = [next(drawn) for _ in seeds[index]]
    return answers


def _draw(
    decoder: _Decoder, seeds: Sequence[int], stops: set[int], max_new_tokens: int, temperature: float
) -> list[list[int]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    answers: list[list[int]] = [[] for _ in seeds]
    rows = list(range(len(seeds)))
    """Number of the answer in each row of the batch; -1 for one that has ended."""
    for length in range(1, max_new_tokens + 1):
        uniform = [0.0 if row < 0 else float(torch.rand((), generator=generators[row])) for row in rows]
        ids_B = _choose(decoder.logits_BV, torch.tensor(uniform, dtype=torch.float64), temperature)
        for place, (row, token) in enumerate(zip(rows, ids_B.tolist(), strict=True)):
            if row >= 0:
                answers[row].append(token)
                if token in stops:
                    rows[place] = -1
        alive = [place for place, row in enumerate(rows) if row >= 0]
        if not alive or length == max_new_tokens:
            break
        if len(alive) < COMPACT_BELOW * len(rows):
            decoder.keep(alive)
            ids_B, rows = ids_B[alive], [rows[place] for place in alive]
        decoder.advance(ids_B)
    return answers


def _choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """The token of each row, int64 [B]: the first whose cumulative probability exceeds a uniform number in [0, 1).

    At temperature 0 the most likely one. uniform_B: float64 [B].
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    # In float64: the sum of 100,000 float32 probabilities is wrong by more than its smallest terms.
    cumulative_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    threshold_B1 = (uniform_B.to(logits_BV.device) * cumulative_BV[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1).clamp_max(logits_BV.shape[1] - 1)


class _RoomyLayer(DynamicLayer):
    """Keys and values of a layer in memory that has room for the tokens to come.

    The library's own layer copies all of them for each new token: 0.8 GB read and written for 64 rows of 140 tokens of
    the smallest model of the catalog.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        """Take over what `layer` holds, for at most `room` more tokens."""
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._capacity = self.keys.shape[-2] + room
        self._states: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add the states of the next tokens, [B, G, T, D] each; returns all of them."""
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        if not self._states:
            self._states = tuple(_with_capacity(states, self._capacity) for states in (self.keys, self.values))
        stop = start + key_states.shape[-2]
        for states, new in zip(self._states, (key_states, value_states), strict=True):
            states[:, :, start:stop] = new
        self.keys, self.values = (states[:, :, :stop] for states in self._states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        super().batch_select_indices(indices)
        self._states = ()  # made anew, of that many rows, when a token is added


def _with_capacity(states: Tensor, capacity: int) -> Tensor:
    """The states [B, G, T, D] in a tensor for `capacity` tokens, which holds nothing behind them yet."""
    larger = states.new_empty(*states.shape[:2], capacity, states.shape[3])
    larger[:, :, : states.shape[2]] = states
    return larger


class _Decoder:
    """A batch of sequences with their cache of keys and values, which grows by one token at a time."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        """Compute the prompts."""
        self._model = model
        self._takes = inspect.signature(model.forward).parameters
        ids_BT, self._mask_BT = padded_on_the_left(model, prompts, pad_id)
        self._device = ids_BT.device
        self._cache: Any = None
        self.logits_BV: Tensor
        """Logits of the next token of each row."""
        # A padded position sees nothing; any position number does for it.
        self._forward(ids_BT, (self._mask_BT.cumsum(1) - 1).clamp_min(0))

    def share(self, counts: Sequence[int], *, room: int) -> None:
        """Give each row so many copies of itself, one after the other, and room for so many more tokens."""
        for place, layer in enumerate(self._cache.layers):
            # Exactly: a subclass keeps a window of the newest tokens, or other states beside them. A layer that shares
            # another one's keys holds none.
            if type(layer) is DynamicLayer and layer.is_initialized:
                self._cache.layers[place] = _RoomyLayer(layer, room)
        self.keep([row for row, count in enumerate(counts) for _ in range(count)])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        if list(rows) == list(range(len(self.logits_BV))):
            return
        places = torch.tensor(rows, dtype=torch.long, device=self._device)
        self._cache.batch_select_indices(places)
        self._mask_BT, self.logits_BV = self._mask_BT[places], self.logits_BV[places]

    def advance(self, ids_B: Tensor) -> None:
        """Add a token, int64 [B], to each row."""
        positions_B1 = self._mask_BT.sum(dim=1, keepdim=True)
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(ids_B), 1)], dim=1)
        self._forward(ids_B.to(self._device).unsqueeze(1), positions_B1)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> None:
        # Some architectures (ALiBi) take no positions, some compute all logits.
        further = {"position_ids": positions_BT, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BT,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in further.items() if name in self._takes},
        )
        self._cache = output.past_key_values
        self.logits_BV = output.logits[:, -1]
