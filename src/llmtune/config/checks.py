"""Values of the right type that a config must not have, each by itself: out of range, empty, of another form."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmtune.config.dump import value_text
from llmtune.config.keys import default_of
from llmtune.config.schema import SourceConfig
from llmtune.config.sources import source_problems

__all__ = ["METRIC_ENDINGS", "NAME_FIELDS", "RANGES", "SOURCE_RANGES", "Range", "range_fix", "range_problem"]


@dataclass(frozen=True)
class Range:
    """Bounds of a number; None for no bound."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` lies within the bounds."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = (("at least", self.minimum), ("above", self.above), ("at most", self.maximum), ("below", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)


_COUNT = Range(minimum=1)
_FRACTION = Range(minimum=0, below=1)
_SHARE = Range(minimum=0, maximum=1)

SOURCE_RANGES: dict[str, Range] = {
    "weight": Range(above=0),
    "max_samples": _COUNT,
    "repeat": Range(above=0, maximum=1000),
    "share": Range(above=0, maximum=1),
}

RANGES: dict[str, Range] = {
    "run.seed": Range(minimum=0, maximum=2**32 - 1),
    "model.architecture.d_model": _COUNT,
    "model.architecture.n_heads": _COUNT,
    "model.architecture.n_kv_heads": _COUNT,
    "model.architecture.n_layers": _COUNT,
    "model.architecture.d_ff": _COUNT,
    "model.architecture.max_seq_len": Range(minimum=2),
    "model.architecture.dropout": _FRACTION,
    "model.architecture.attention_dropout": _FRACTION,
    "model.architecture.vocab_size": Range(minimum=257),
    "adapter.r": _COUNT,
    "adapter.alpha": Range(above=0),
    "adapter.layers": _COUNT,
    "adapter.dropout": _FRACTION,
    "data.min_length": _COUNT,
    "data.test_size": Range(minimum=0),
    "data.shuffle_seed": Range(minimum=0, maximum=2**63 - 1),
    "data.max_length": Range(minimum=2),
    "data.max_samples": _COUNT,
    "data.num_workers": Range(minimum=0),
    "training.epochs": Range(above=0),
    "training.max_steps": _COUNT,
    "training.max_minutes": Range(above=0),
    "training.batch_size": _COUNT,
    "training.gradient_accumulation_steps": _COUNT,
    "training.embedding_learning_rate": Range(above=0),
    "training.loraplus_lr_ratio": Range(above=0),
    "training.learning_rate": Range(above=0),
    "training.weight_decay": Range(minimum=0),
    "training.betas": _FRACTION,
    "training.eps": Range(above=0),
    "training.warmup_steps": Range(minimum=0),
    "training.warmup_ratio": _SHARE,
    "training.min_lr_ratio": _SHARE,
    "training.max_grad_norm": Range(above=0),
    "training.neftune_alpha": Range(above=0),
    "training.max_skipped_steps": Range(minimum=0),
    "training.num_cycles": _COUNT,
    "objective.beta": Range(minimum=0),
    "objective.label_smoothing": Range(minimum=0, maximum=0.5),
    "objective.sft_weight": Range(minimum=0),
    "objective.gamma_beta_ratio": Range(minimum=0),
    "objective.desirable_weight": Range(above=0),
    "objective.undesirable_weight": Range(above=0),
    "objective.num_generations": Range(minimum=2),
    "objective.max_new_tokens": Range(minimum=1),
    "objective.temperature": Range(above=0),
    "objective.steps_per_generation": Range(minimum=1),
    "objective.clip": Range(above=0, below=1),
    "objective.clip_high": Range(above=0),
    "evaluation.every_steps": Range(above=0),
    "evaluation.every_epochs": Range(above=0),
    "evaluation.max_new_tokens": _COUNT,
    "evaluation.temperature": Range(minimum=0),
    "evaluation.top_k": Range(minimum=0),
    "evaluation.top_p": Range(minimum=0, maximum=1),
    "evaluation.repetition_penalty": Range(above=0),
    "evaluation.batch_size": _COUNT,
    "evaluation.early_stopping_patience": _COUNT,
    "evaluation.early_stopping_threshold": Range(minimum=0),
    "checkpoint.every_steps": Range(above=0),
    "checkpoint.every_epochs": Range(above=0),
    "checkpoint.keep_last": Range(minimum=0),
    "tracking.every_steps": _COUNT,
    "distributed.sequence_parallel": _COUNT,
    "distributed.zero_stage": Range(minimum=1, maximum=3),
    "distributed.timeout_s": Range(above=0),
}

NAME_FIELDS = ("model", "config", "timestamp", "seed")
"""Names allowed in braces in `run.name`."""


def range_problem(key: str, value: object) -> str | None:
    """Return what is wrong with a value of the right type ("must be at least 1"), or None."""
    check = _SPECIAL.get(key)
    if check is not None and (problem := check(value)) is not None:
        return problem
    bounds = RANGES.get(key)
    if bounds is not None:
        items = value if isinstance(value, tuple) else (value,)
        if any(
            isinstance(item, int | float) and not isinstance(item, bool) and not bounds.holds(item) for item in items
        ):
            return f"must be {bounds}"
    return None


_SPELLED_FIXES = {
    **dict.fromkeys(("data.train", "data.eval"), "`llmtune docs data` describes the keys of a source"),
    "training.warmup_steps": "a fraction of all steps is `training.warmup_ratio`",
    "training.max_steps": "leave it out, or set `training.max_steps: null`, to train for `training.epochs`",
    "training.max_grad_norm": "set `training.max_grad_norm: null` to clip nothing",
    "checkpoint.keep_last": "set `checkpoint.keep_last: 0` to keep all",
}


def range_fix(key: str) -> str | None:
    """Return what to write instead of a value that is out of range: nothing, or the default, which never is."""
    if key in _SPELLED_FIXES:
        return _SPELLED_FIXES[key]
    default = default_of(key)
    if default is None:
        return f"leave it out, or set `{key}: null`"
    return f"the default is `{key}: {value_text(default)}`" if default != () else None


def _sources(value: tuple[SourceConfig, ...], *, held_out: bool = False) -> str | None:
    if all(source == SourceConfig(source.path) for source in value):  # paths alone
        return None if all(source.path for source in value) else "must not hold an empty path"
    return "; ".join(dict.fromkeys(source_problems(value, SOURCE_RANGES, held_out=held_out))) or None


def _test_size(value: float) -> str | None:
    return "must be a whole number of rows, or a fraction below 1" if value > 1 and value != int(value) else None


def _run_name(value: str) -> str | None:
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError:
        return "must have matching braces"
    for _, name, form, conversion in parts:
        if name is not None and (name not in NAME_FIELDS or form or conversion):
            return "may name only " + ", ".join(f"{{{field}}}" for field in NAME_FIELDS)
    return _not_empty(value)


def _not_empty(value: object) -> str | None:
    return "must not be empty" if value in ("", ()) or (isinstance(value, str) and not value.strip()) else None


def _distinct(value: tuple[str, ...]) -> str | None:
    return "must name each only once" if len(set(value)) != len(value) else None


METRIC_ENDINGS = (
    "mean_nll", "perplexity", "bits_per_byte", "exact_answers", "score",
    "accuracy", "margin", "loss", "reward", "macro_f1",
)  # fmt: skip
"""Last words of the metrics by which a best model can be chosen; between `eval_` and them may stand a data set."""


def _metric(value: str) -> str | None:
    if value.startswith("eval_") and value.endswith(METRIC_ENDINGS):
        return None
    return f"must be a metric of an evaluation ({', '.join(f'eval_{ending}' for ending in METRIC_ENDINGS)})"


def _steps(value: float | None) -> str | None:
    if value is None or 0 < value < 1 or value == int(value):
        return None
    return "must be a whole number of steps, or a fraction below 1 of all steps"


_TEMPLATE_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


def _template_args(value: Mapping[str, object]) -> str | None:
    taken = [name for name in _TEMPLATE_VARIABLES if name in value]
    return f"must not set `{taken[0]}`, which comes from the rows" if taken else None


_SPECIAL: dict[str, Callable[[Any], str | None]] = {
    "run.name": _run_name,
    "run.output_dir": _not_empty,
    "model.name": _not_empty,
    "adapter.target_modules": _not_empty,
    "data.train": _sources,
    "data.eval": partial(_sources, held_out=True),
    "data.test_size": _test_size,
    "data.template_args": _template_args,
    "evaluation.best_by": _metric,
    "evaluation.every_steps": _steps,
    "checkpoint.every_steps": _steps,
    "tracking.trackers": _distinct,
}
