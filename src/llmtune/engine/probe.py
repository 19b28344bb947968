"""The probe of the model at hand: whether the flat engine's fast forms compute what the library's own forward does.

The flat loss must be the plain one on a small batch, and a document's loss must not change by one bit when its
neighbour changes (promises N5 and N15). On a CUDA device the backward pass is probed too, on a document that is longer
than 128 tokens: there forward and backward are other kernels, and torch chooses them by the length and by whether
gradients are wanted.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtune.common.memory import is_out_of_memory
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.objective import WHOLE_ROW, flat_nll_sum, plain_nll_sum, weighted_nll_sum
from llmtune.engine.precision import Precision
from llmtune.engine.sequence_parallel import SharedRows
from llmtune.engine.sharding import Strategy
from llmtune.errors import ModelError, in_one_line
from llmtune.kernels.attention import BACKENDS, use_attention, use_segment_attention
from llmtune.kernels.linear_cross_entropy import Head, find_head
from llmtune.models.parameters import base_model_of, eval_mode

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["MODEL_ERRORS", "PROBE_ERRORS", "Probe"]

LENGTHS = {"cpu": (7, 12, 5), "cuda": (7, 300, 5)}
"""Tokens of the probe's documents: of different lengths, so that a shifted position or boundary changes the loss."""

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative difference of the probe's two losses, some ten roundings of the arithmetic's type."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest ||g - g'|| / ||g'|| of the two gradients, all compared weights together: each block rounds again, and a wrong
factor is far above it."""

ONE_WEIGHT = 3.0
"""How many times that a single weight's gradients may differ by, of its own ||g'||. A kernel that is wrong for queries
and keys only is hidden among all, of which theirs are less than a tenth. The roundings of one weight do not average out
(small models in bf16: 0.15 for an adapter of OPT, 0.03 elsewhere), and a rotation the wrong way is 0.9 or more."""

SMALLEST_SHARE = 1e-3
"""Least norm that a weight's difference is measured by, as a share of the norm of all. Some gradients are nothing but
rounding, such as that of a key's bias without rotary positions, to which softmax is blind (OPT: 4e-7)."""

COMPARED_WEIGHTS, LARGEST_WEIGHT = 16, 1 << 26
"""Trained weights whose gradients are compared, the model's first of at most that many entries: a gradient there has
come through every block, and holding those of all weights twice would take memory that no plan counts."""

MODEL_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    IndexError,
    KeyError,
    ArithmeticError,
    AssertionError,
)
"""Errors of a model's own code on an input it was not written for."""

PROBE_ERRORS = (*MODEL_ERRORS, MemoryError, ImportError, OSError, subprocess.SubprocessError)
"""Errors of a model that does not take flat rows, or of a kernel that cannot be built or started here."""


def _probe_errors() -> tuple[type[Exception], ...]:
    """Return PROBE_ERRORS, and that of Triton where it is installed: its errors have a base class of their own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return PROBE_ERRORS
    return (*PROBE_ERRORS, TritonError)


class Probe:
    """A small batch through a model, first as the library computes it and then by each way that is tried."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        device: torch.device,
        precision: Precision,
        strategy: Strategy,
        rows: SharedRows | None = None,
    ) -> None:
        """Run the library's own forward (and backward, on a CUDA device): the model must not be patched yet.

        rows: the part of this process in rows that several share; those then compute the flat loss together.
        Where weights are sharded no gradients are compared: a backward pass leaves each process those of its part.
        """
        self._model, self._device, self._precision, self._strategy = model, device, precision, strategy
        self._rows = rows
        embeddings = cast("Tensor", model.get_input_embeddings().weight)
        vocabulary = strategy.shape(embeddings)[0]  # a divided weight has no rows of its own between two steps
        base, lengths = base_model_of(model), _lengths(model, device)
        self._plain_nll_sum = plain_nll_sum
        if find_head(base) is None:
            self._plain_nll_sum = _hidden_nll_sum
            vocabulary = min(vocabulary, int(base.config.get_text_config().hidden_size))
        self._documents, self._changed = _documents(vocabulary, lengths, 0), _documents(vocabulary, lengths, 1)
        self._with_gradients = (
            device.type == "cuda" and not strategy.is_sharded and not torch.is_inference_mode_enabled()
        )
        self._loss = 0.0
        self._gradients: dict[str, Tensor] = {}
        self.failure = self._caught(self._measure_library)
        """Why the library's own way does not work on such a batch; None where it does."""

    def failure_of(self, backend: str, head: Head | None) -> str | None:
        """Switch the model to a backend and compare, with that head; when that fails, switch back and say why.

        head: None of a model that gives scores. A new head of scores is 0, and would hide every fault: the hidden
        states themselves are taken for logits.

        Raises the error of memory that runs out, which says nothing of the backend.
        """
        base = base_model_of(self._model)
        before = str(base.config._attn_implementation)

        def compare() -> str | None:
            use_segment_attention(base, backend, self._rows.attention(BACKENDS[backend]) if self._rows else None)
            return self._strategy.run(self._compare, head or Head(nn.Identity()))

        failure = self._caught(compare)
        if failure is not None and base.config._attn_implementation != before:
            use_attention(base, before)
        return failure

    def _caught(self, work: Callable[[], str | None]) -> str | None:
        try:
            return work()
        except ModelError as error:
            return error.problems[0].problem
        except _probe_errors() as error:
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {in_one_line(error)}"

    def _measure_library(self) -> None:
        def plain(examples: Sequence[Example]) -> Tensor:
            return self._plain_nll_sum(self._model, make_micro_batch(examples, "padded", 0))

        def measure() -> None:
            with eval_mode(self._model), self._precision.autocast():
                self._loss = float(plain(self._documents))
            if self._with_gradients:
                self._gradients = self._gradients_of(plain)

        self._strategy.run(measure)

    def _compare(self, head: Head) -> str | None:
        """Compare losses (and gradients), and a document's loss before and after its neighbour changes.

        None when they are equal, else the difference in words.
        """

        def flat(examples: Sequence[Example]) -> Tensor:
            batch = make_micro_batch(examples, "flat", 0)
            part = self._rows.part if self._rows else WHOLE_ROW
            return flat_nll_sum(self._model, batch, head=head, device=self._device, part=part)

        def together(value: Tensor) -> Tensor:
            return self._rows.sum(value) if self._rows else value

        with eval_mode(self._model), self._precision.autocast():
            found = float(together(flat(self._documents)))
            # The first document changes and carries no loss, so the sums are those of its neighbours alone.
            both = (self._documents, self._changed)
            before, after = (float(together(flat(_untrain_first(some)))) for some in both)
            dtype = _compute_dtype(self._model, self._device)
        # Written so that a NaN fails as well.
        if not abs(found - self._loss) <= LOSS_TOLERANCE[dtype] * abs(self._loss):
            return f"its loss on a probe is {found:.6g}, the plain forward's {self._loss:.6g}"
        if before != after:
            return f"a document's loss moved from {before:.8g} to {after:.8g} when its neighbour changed"
        if not self._gradients:
            return None
        gradients = {name: together(gradient) for name, gradient in self._gradients_of(flat).items()}
        return _difference(gradients, self._gradients, GRADIENT_TOLERANCE[dtype])

    def _gradients_of(self, loss: Callable[[Sequence[Example]], Tensor]) -> dict[str, Tensor]:
        """The gradients of the first trained weights by their names, float32."""
        trained = (both for both in self._model.named_parameters() if both[1].requires_grad)
        weights = dict(islice((both for both in trained if both[1].numel() <= LARGEST_WEIGHT), COMPARED_WEIGHTS))
        if not weights:
            return {}
        tokens = sum(map(len, self._documents))
        with eval_mode(self._model):
            with torch.enable_grad(), self._precision.autocast():
                mean = loss(self._documents) / tokens * self._precision.scale
            gradients = torch.autograd.grad(mean, list(weights.values()), allow_unused=True, materialize_grads=True)
        return {name: gradient.float() for name, gradient in zip(weights, gradients, strict=True)}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> str | None:
    """Compare gradients, all together and weight by weight: None when they are equal, else the difference in words."""
    norms = torch.stack([gradient.norm() for gradient in expected.values()])
    apart = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()])
    of_all = norms.norm()
    shares = torch.cat([(apart.norm() / of_all)[None], apart / norms.clamp(min=SMALLEST_SHARE * of_all) / ONE_WEIGHT])
    for share, name in zip(shares.tolist(), ("", *expected), strict=True):
        if not share <= tolerance:  # a NaN fails as well
            where, times = (f" in {name}", ONE_WEIGHT) if name else ("", 1.0)
            return f"its gradient on a probe is {share * times:.2g} of its norm away from the plain backward's{where}"
    return None


def _hidden_nll_sum(model: nn.Module, batch: MicroBatch) -> Tensor:
    """As `plain_nll_sum`, of the hidden states [B, T, E] in the place of logits."""
    batch = batch.to(next(model.parameters()).device)
    decoder = base_model_of(model).base_model  # type: ignore[arg-type]
    hidden = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return weighted_nll_sum(hidden.last_hidden_state, batch.input_ids, batch.weights)


def _compute_dtype(model: PreTrainedModel | PeftModel, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.get_input_embeddings().weight.dtype  # type: ignore[return-value]


def _lengths(model: PreTrainedModel | PeftModel, device: torch.device) -> tuple[int, ...]:
    """The lengths of the documents: at most as many tokens as the model has positions."""
    positions = getattr(base_model_of(model).config.get_text_config(), "max_position_embeddings", None)
    return tuple(min(length, positions or length) for length in LENGTHS.get(device.type, LENGTHS["cpu"]))


def _documents(vocabulary: int, lengths: Sequence[int], shift: int) -> list[Example]:
    """Short documents of arbitrary, fixed tokens; `shift` changes the first one only."""
    documents = []
    for number, length in enumerate(lengths):
        ids = (7919 * (100 * number + np.arange(length)) + 13 + (shift if number == 0 else 0)) % vocabulary
        weights = np.ones(length, dtype=np.float32)
        weights[0] = 0
        documents.append(Example(source=f"probe:{number}", input_ids=ids.astype(np.int32), weights=weights))
    return documents


def _untrain_first(documents: list[Example]) -> list[Example]:
    return [replace(documents[0], weights=np.zeros_like(documents[0].weights)), *documents[1:]]
