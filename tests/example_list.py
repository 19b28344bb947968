"""An `ExampleSet` made of examples in memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.packing import examples_together, plan_sequences
from llmtune.data.example import SIDES, Example, example_digest, set_digest


class ExampleList:
    """An `ExampleSet` held in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(example) for example in self._examples], dtype=np.int64)

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        return np.array([example.weights.sum(dtype=np.float64) for example in self._examples], dtype=np.float64)

    @property
    def sides(self) -> npt.NDArray[np.int8]:
        return np.array([SIDES.index(one.side) if one.side else -1 for one in self._examples], dtype=np.int8)

    @property
    def labels(self) -> list[str | None]:
        return [one.label for one in self._examples]

    @property
    def margins(self) -> npt.NDArray[np.float64]:
        return np.array([one.margin for one in self._examples], dtype=np.float64)

    @property
    def digest(self) -> str:
        return set_digest(
            example_digest(one.input_ids, one.weights, one.side, label=one.label, margin=one.margin)
            for one in self._examples
        )


def windows_of(examples, *, batch_size, accumulation, layout="padded", packing="none", group=None, rank=0, ranks=1):
    """The windows of one epoch over examples that belong together, as one process of several is given them."""
    plan = BatchPlan(
        examples,
        plan_sequences(examples, 40, packing, 7),
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=1,
        max_steps=None,
        shuffle_seed=3,
        layout=layout,
        max_group_tokens=group,
        together=examples_together(examples),
        rank=rank,
        world_size=ranks,
    )
    return list(plan.windows())
