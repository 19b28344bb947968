"""A model that gives scores as the reward of drawn answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from llmtune.config.schema import Config, ObjectiveConfig
from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.data.example import Example, Message, Row
from llmtune.data.rows.preferences import PREFERENCE_FORMATS
from llmtune.engine.forward import build_engine
from llmtune.engine.precision import Precision
from llmtune.errors import ConfigError
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.models.parameters import eval_mode
from llmtune.models.weights import digest_tensors

__all__ = ["open_reward_model"]


def open_reward_model(
    objective: ObjectiveConfig, *, no_cuda: bool = False, offline: bool = False
) -> tuple[Callable[[Row, Sequence[str]], list[float]], str]:
    """Load `objective.reward_model`; return what scores the answers to a row's prompt, and the sha256 of its weights.

    Prompt and answer are written by the reward model's own template and tokenizer, as in its training. Raises
    ConfigError for a model with more than one score; ModelError, AdapterError or TokenizerError for one that cannot be
    loaded.
    """
    where = "objective.reward_model"
    if objective.reward_model is None:
        raise ConfigError("the reward `model` needs a model", where, "set `objective.reward_model: RUN` or a folder")
    loaded = load_inference_model(objective.reward_model, no_cuda=no_cuda, offline=offline, may_score=True)
    if len(loaded.labels) != 1:
        what = f"has the labels {', '.join(loaded.labels[:8])}" if loaded.labels else "gives text"
        fix = "name a model that was trained with `objective.method: reward`"
        raise ConfigError(f"`{objective.reward_model}` {what}, and a reward is one score", where, fix)
    device = next(loaded.model.parameters()).device
    precision = Precision("fp32", device)
    engine = build_engine(loaded.model, config=Config(), device=device, precision=precision)
    pad_id = loaded.tokenizer.pad_token_id or 0

    def scores(row: Row, answers: Sequence[str]) -> list[float]:
        (prompt,) = PREFERENCE_FORMATS["prompt"].parse(row)
        examples = []
        for answer in answers:
            whole = replace(prompt, messages=(*prompt.messages, Message("assistant", answer)), side=None)
            ids = np.array(loaded.renderer.render(whole).input_ids, dtype=np.int32)
            examples.append(Example(row.source, ids, np.zeros(len(ids), np.float32)))
        with eval_mode(loaded.model), precision.autocast(), torch.no_grad():
            found: list[float] = engine.scores(make_micro_batch(examples, engine.layout, pad_id))[:, 0].tolist()
        return found

    return scores, digest_tensors((name, weight.cpu()) for name, weight in sorted(loaded.model.state_dict().items()))
