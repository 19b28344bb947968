"""The reference that preference losses compare with: the model as it was before step 1, or without its adapter.

Shapes: S examples of a micro-batch, N examples of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.sharded_tensors import local_part

__all__ = ["FrozenCopy", "LiveReference", "LogProbs", "PrecomputedReference", "Reference"]

LogProbs = Callable[[MicroBatch], Tensor]
"""Log-probabilities of a micro-batch by one model, nats: one for each example, or for each of their trained tokens."""


class Reference(Protocol):
    """Gives the log-probabilities of answers by the reference."""

    def log_probs(self, batch: MicroBatch) -> Tensor:
        """Log-probability of the trained tokens of each example: nats, float32 [S], never joined to a graph.

        log p = sum over trained tokens t of w_t log softmax(logits_t)[id_t]
        """
        ...


class LiveReference:
    """The trained model itself, put back for one forward pass: `as_reference` opens and closes that state.

    It runs the same code as the policy on the same micro-batch, so that equal weights give equal bits.
    """

    def __init__(self, log_probs: LogProbs, as_reference: Callable[[], AbstractContextManager[object]]) -> None:
        self._log_probs, self._as_reference = log_probs, as_reference

    def log_probs(self, batch: MicroBatch) -> Tensor:
        """Log-probability of the trained tokens of each example: nats, float32 [S].

        log pi_ref(y | x) = sum_t weight_t log pi_ref(y_t | x, y_<t), the reference of DPO (arXiv:2305.18290).
        Call it before the policy's own forward pass: autograd must not see weights change that it holds.
        """
        with torch.no_grad(), self._as_reference():
            return self._log_probs(batch)


class FrozenCopy:
    """The trained weights as they are when this is made; costs the bytes that this process holds of them once more."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._copies = tuple(local_part(parameter.detach()).clone() for parameter in self._parameters)
        self.nbytes = sum(copy.nbytes for copy in self._copies)
        """Bytes of the copy."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the copies in the place of the weights, and the weights back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        swapped = []
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            if isinstance(parameter, DTensor):
                # Whoever gathers the parts reads the memory that they lie in, so there the numbers change places.
                part, before = local_part(parameter.detach()), copy.clone()
                copy.copy_(part)
                part.copy_(before)
                swapped.append(copy)
            else:
                # By `.data`: the optimizer, peft and the hooks hold the parameter objects, which must stay the same.
                swapped.append(parameter.data)
                parameter.data = copy
        self._copies = tuple(swapped)


class PrecomputedReference:
    """Log-probabilities measured before step 1: float32 [N], by the number of the example in its set."""

    def __init__(self, log_probs_N: Tensor, device: torch.device) -> None:
        self._log_probs_N = log_probs_N.to(device)

    def log_probs(self, batch: MicroBatch) -> Tensor:
        """Those of a micro-batch made from the set, float32 [S], as of `LiveReference`: result_s = values[index_s]."""
        assert batch.indices is not None, "the micro-batch does not know its examples"
        return self._log_probs_N[torch.from_numpy(batch.indices).to(self._log_probs_N.device)]
