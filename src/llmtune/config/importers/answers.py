"""The batch of GRPO: TRL, whose trainer the toolkits share, counts drawn answers in it, and llmtune counts prompts."""

from __future__ import annotations

import math
from collections.abc import MutableMapping

from llmtune.config.importers.yaml_text import Setting

__all__ = ["count_prompts"]

BATCH, ACCUMULATION = "training.batch_size", "training.gradient_accumulation_steps"


def count_prompts(settings: MutableMapping[str, Setting]) -> dict[str, str]:
    """Divide a step's answers by those to each prompt, where the method is grpo; return the arithmetic by key.

    4 micro-batches of 8 answers, 8 to each prompt, are 4 prompts: 4 micro-batches of 1. Where they make no whole number
    of prompts, which TRL refuses, the number is rounded up.
    """
    method, drawn = settings.get("objective.method"), settings.get("objective.num_generations")
    batch, accumulation = settings.get(BATCH), settings.get(ACCUMULATION)
    if method is None or method.value != "grpo" or not (drawn and batch and accumulation):
        return {}
    if not isinstance(batch.value, int):  # `auto`: found by trying
        return {}
    answers = batch.value * accumulation.value
    prompts = math.ceil(answers / drawn.value)
    size = math.gcd(max(1, batch.value // drawn.value), prompts)
    said = f"{batch.value} x {accumulation.value} answers / {drawn.value} to each prompt = {prompts} prompts a step"
    settings[BATCH] = batch._replace(value=size, said=said)
    settings[ACCUMULATION] = accumulation._replace(value=prompts // size, said=said)
    return dict.fromkeys((BATCH, ACCUMULATION), said)
