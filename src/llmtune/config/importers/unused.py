"""Settings of an import that neither toolkit would use: an adapter's without an adapter, evaluation without rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from llmtune.config.importers.rules import Outcome
from llmtune.config.importers.yaml_text import Setting

__all__ = ["unused_settings"]

Settings = Mapping[str, Setting]


class Unused(NamedTuple):
    """Keys that do nothing in some situation."""

    keys: tuple[str, ...]
    """Beginnings of our keys."""
    when: Callable[[Settings], bool]
    text: str
    unless: tuple[str, str] = ("", "off")
    """A key of the file and its text with which they do something all the same."""


def _is(key: str, *values: object) -> Callable[[Settings], bool]:
    return lambda settings: (settings[key].value if key in settings else None) in values


def _no_held_out(settings: Settings) -> bool:
    size = settings.get("data.test_size")
    return "data.eval" not in settings and (size is None or not size.value)


UNUSED_WHEN = (
    Unused(
        ("adapter.",),
        lambda settings: not _is("adapter.method", "lora")(settings),
        "every weight is trained, so no adapter is made",
    ),
    Unused(
        ("training.loraplus_lr_ratio", "model.quantization"),
        lambda settings: not _is("adapter.method", "lora")(settings),
        "every weight is trained, so no adapter is made",
    ),
    Unused(
        (
            "evaluation.every",
            "evaluation.early",
            "checkpoint.final",
            "evaluation.best_by",
            "evaluation.before_training",
        ),
        _no_held_out,
        "no rows are held out, so nothing is evaluated",
    ),
    Unused(
        ("training.warmup_ratio",),
        lambda settings: "training.warmup_steps" in settings and not settings["training.warmup_steps"].is_default,
        "`warmup_steps` stands beside it, and counts",
    ),
    Unused(
        ("training.warmup_steps", "training.warmup_ratio", "training.min_lr_ratio"),
        _is("training.lr_schedule", "constant"),
        "a constant schedule has none",
    ),
    Unused(
        ("training.min_lr_ratio",), _is("training.lr_schedule", "constant_with_warmup"), "a constant schedule has none"
    ),
    Unused(
        ("training.num_cycles",),
        lambda settings: not _is("training.lr_schedule", "cosine_with_restarts")(settings),
        "only a schedule with restarts has cycles",
    ),
    Unused(
        ("objective.",),
        _is("objective.method", None, "sft"),
        "no answers are compared",
    ),
    Unused(
        ("adapter.dropout",),
        _is("objective.method", "dpo", "kto", "orpo", "simpo"),
        "TRL, whose trainer it is, switches dropout off where answers are compared (`disable_dropout`)",
        ("disable_dropout", "false"),
    ),
    Unused(
        ("objective.sft_weight",),
        _is("objective.method", "kto", "reward", "grpo", "classification"),
        "only a comparison of pairs has this part",
    ),
    Unused(("data.packing",), _is("objective.method", "dpo", "kto", "orpo", "simpo"), "pairs are not packed"),
)


def unused_settings(settings: Settings, text_of: Callable[[str], str]) -> Iterator[tuple[str, Outcome, str]]:
    """Return each key that does nothing, with what became of it; `adapter.method: none` itself says so and stays.

    `text_of` gives the text under a key of the file.
    """
    gone: set[str] = set()
    for row in UNUSED_WHEN:
        found = [
            key
            for key in settings
            if key.startswith(row.keys) and key not in ("adapter.method", "objective.method") and key not in gone
        ]
        if found and row.when(settings) and text_of(row.unless[0]) != row.unless[1]:
            gone.update(found)
            yield from ((key, Outcome.IGNORED, row.text) for key in found)
