"""data.json of a run: lengths of its examples, and a few of them as the model sees them, for whoever reads its report.

Written once before step 1. A run's rows may be gone or changed by the time someone asks what it was trained on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmtune.data.dataset.preview import stretches
from llmtune.data.dataset.report import length_summary
from llmtune.data.example import Example, ExampleSet
from llmtune.prepare import Prepared

__all__ = ["DATA_FILE", "data_excerpt"]

DATA_FILE = "data.json"
EXAMPLES = 3
MOST_TOKENS = 700
"""Tokens of an example that are kept."""


def data_excerpt(prepared: Prepared) -> dict[str, Any]:
    """The lengths of the examples of each side in tokens, and some examples spread over it with their weights."""
    sides = {"train": prepared.data.train, "eval": prepared.data.eval}
    return {name: _side(examples, prepared) for name, examples in sides.items() if examples is not None}


def _side(examples: ExampleSet, prepared: Prepared) -> dict[str, Any]:
    count = len(examples)
    chosen = sorted({count * place // EXAMPLES for place in range(EXAMPLES)}) if count else []
    return {
        "lengths": length_summary(examples.lengths, prepared.config.data.max_length),
        "examples": [_example(examples[place], prepared) for place in chosen],
    }


def _example(example: Example, prepared: Prepared) -> dict[str, Any]:
    shown = replace(example, input_ids=example.input_ids[:MOST_TOKENS], weights=example.weights[:MOST_TOKENS])
    return {
        "source": example.source,
        "side": example.side,
        "tokens": len(example),
        "trained_tokens": int((example.weights > 0).sum()),
        "shown_tokens": len(shown),
        "stretches": [list(stretch) for stretch in stretches(shown, prepared.tokenizer.tokenizer)],
    }
