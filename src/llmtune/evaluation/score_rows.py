"""The scores that a trained model gives to rows."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.config.schema import Config
from llmtune.data.dataset.batches import eval_batches
from llmtune.data.example import ExampleSet
from llmtune.engine.forward import build_engine
from llmtune.engine.precision import Precision
from llmtune.evaluation.inference_model import InferenceModel
from llmtune.models.parameters import eval_mode

__all__ = ["score_examples"]


def score_examples(loaded: InferenceModel, examples: ExampleSet, settings: Config, *, batch_size: int = 8) -> Tensor:
    """Scores of the examples, computed without autocast, float32 [N, L] on the CPU; they do not depend on `batch_size`.

    scores = W h, with the last hidden state h of the example's last token (see `engine/scoring.py`).
    """
    device = next(loaded.model.parameters()).device
    precision = Precision("fp32", device)
    engine = build_engine(loaded.model, config=settings, device=device, precision=precision)
    scores_NL = torch.zeros(len(examples), len(loaded.labels))
    batches = eval_batches(
        examples,
        batch_size=batch_size,
        layout=engine.layout,
        pad_id=loaded.tokenizer.pad_token_id or 0,
        max_group_tokens=engine.max_group_tokens,
    )
    with eval_mode(loaded.model), precision.autocast():
        for batch in batches:
            assert batch.indices is not None
            scores_NL[torch.from_numpy(batch.indices)] = engine.scores(batch).cpu()
    return scores_NL
