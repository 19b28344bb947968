"""An objective of the user's own: a function of the log-probabilities of trained tokens."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable

from torch import Tensor

from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.forward import Engine
from llmtune.engine.objective import Objective
from llmtune.errors import UsageError

__all__ = ["LossFunction", "digest_of_code", "own_objective"]

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Log-probabilities of the trained tokens of a micro-batch (nats, float32 [N], joined to the graph) and their weights
(float32 [N]) to the *sum* of their losses, 0-d. N may be 0.
"""


def own_objective(engine: Engine, loss: LossFunction) -> Objective:
    """Make the objective that minimizes the sums of `loss`, divided once by the trained tokens of the whole window.

    UsageError is raised at the first micro-batch where `loss` gives anything but a sum that gradients can reach.
    """

    def loss_sum(batch: MicroBatch) -> Tensor:
        log_probs_N = engine.token_log_probs(batch, 1.0)
        weights_BT = batch.weights[:, 1:]
        value = loss(log_probs_N, weights_BT[weights_BT != 0].to(log_probs_N.device))
        if not isinstance(value, Tensor) or value.ndim or (log_probs_N.requires_grad and not value.requires_grad):
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
            detached = ", which no gradient reaches" if isinstance(value, Tensor) and not value.ndim else ""
            fix = "return the sum over all tokens, computed by torch: `-(weights * log_probs).sum()` is the usual loss"
            raise UsageError(f"the loss function returned {shape}{detached}", "Trainer(loss=...)", fix)
        return value.float()

    return Objective(loss_sum, "loss", "per trained token, by your function", code=digest_of_code(loss))


def digest_of_code(function: Callable[..., object]) -> str:
    """The sha256 of a function's source, or of its compiled code where it has none at hand; of an object, its class."""
    named = function if inspect.isroutine(function) else type(function)
    try:
        text = inspect.getsource(named)
    except (OSError, TypeError):
        text = repr(getattr(getattr(named, "__code__", None), "co_code", named))
    return hashlib.sha256(text.encode()).hexdigest()
