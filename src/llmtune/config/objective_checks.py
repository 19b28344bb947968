"""What `objective` contradicts: keys of another method, and rows and noise that cannot be compared."""

from __future__ import annotations

from llmtune.config.contradiction import Contradiction
from llmtune.config.schema import Config, ObjectiveConfig, ObjectiveMethod, SourceConfig

__all__ = ["OBJECTIVE_CONTRADICTIONS"]

PAIRED: tuple[ObjectiveMethod, ...] = ("dpo", "simpo", "orpo")
METHODS_OF: dict[str, tuple[ObjectiveMethod, ...]] = {
    "loss": ("dpo", "kto", "grpo"),
    "beta": (*PAIRED, "kto", "grpo"),
    "label_smoothing": ("dpo",),
    "sft_weight": ("dpo",),
    "gamma_beta_ratio": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": ("dpo", "kto", "grpo"),
    "reference_model": ("dpo", "kto", "grpo"),
    "reference_revision": ("dpo", "kto", "grpo"),
    "num_generations": ("grpo",),
    "max_new_tokens": ("grpo",),
    "temperature": ("grpo",),
    "steps_per_generation": ("grpo",),
    "rewards": ("grpo",),
    "reward_pattern": ("grpo",),
    "reward_model": ("grpo",),
    "scale_rewards": ("grpo",),
    "clip": ("grpo",),
    "clip_high": ("grpo",),
    "mask_truncated": ("grpo",),
}
"""Methods in which each key of `objective` counts."""
LOSSES_OF: dict[ObjectiveMethod, tuple[str, ...]] = {
    "dpo": ("sigmoid", "ipo", "hinge"),
    "kto": ("kto", "apo_zero"),
    "grpo": ("dapo", "grpo", "dr_grpo"),
}
FORMATS_OF: dict[ObjectiveMethod, set[str]] = {
    "kto": {"preference", "unpaired"},
    "grpo": {"prompt"},
    "classification": {"classification"},
}
"""Formats of rows by method; other methods that compare answers take pairs."""
REWARDS = ("exact", "contains", "f1", "number", "json_fields", "regex", "length", "model")
"""Names that `objective.rewards` accepts."""
ANSWER_RULES = ("last_assistant_message", "last_assistant_turn", "all_assistant_messages")


def _compares(config: Config) -> bool:
    return config.objective.method != "sft"


def _sources(config: Config) -> tuple[SourceConfig, ...]:
    return (*config.data.train, *config.data.eval)


def _a_format_does_not_fit(config: Config) -> bool:
    method, names = config.objective.method, {config.data.format, *(source.format for source in _sources(config))}
    names -= {"auto", None}
    return method != "sft" and not names <= FORMATS_OF.get(method, {"preference"})


def _draws(config: Config) -> bool:
    return config.objective.method == "grpo"


def _rules(config: Config) -> set[str]:
    return {config.data.train_on, *(source.train_on for source in _sources(config) if source.train_on is not None)}


_OF_ANOTHER_METHOD: list[Contradiction] = []
for _name, _methods in METHODS_OF.items():
    _OF_ANOTHER_METHOD.append(
        Contradiction(
            (f"objective.{_name}", "objective.method"),
            lambda c, _, name=_name, methods=_methods: (  # type: ignore[misc]
                getattr(c.objective, name) != getattr(ObjectiveConfig(), name) and c.objective.method not in methods
            ),
            f"this setting counts only where the method is {' or '.join(_methods)}",
            f"remove it, or set `objective.method: {_methods[0]}`",
        )
    )
for _method, _losses in LOSSES_OF.items():
    _OF_ANOTHER_METHOD.append(
        Contradiction(
            ("objective.loss", "objective.method"),
            lambda c, _, method=_method, losses=_losses: (  # type: ignore[misc]
                c.objective.method == method and c.objective.loss not in ("auto", *losses)
            ),
            f"{_method} has no such loss",
            f"set `objective.loss` to {' or '.join(_losses)}, or remove it",
        )
    )

OBJECTIVE_CONTRADICTIONS: tuple[Contradiction, ...] = (
    *_OF_ANOTHER_METHOD,
    Contradiction(
        ("objective.label_smoothing", "objective.loss"),
        lambda c, _: c.objective.label_smoothing > 0 and c.objective.loss not in ("auto", "sigmoid"),
        "labels are smoothed in the sigmoid loss only",
        "set `objective.loss: sigmoid`, or `objective.label_smoothing: 0`",
    ),
    Contradiction(
        ("objective.reference", "adapter.method"),
        lambda c, _: c.objective.reference == "base" and c.adapter.method == "none",
        "without an adapter there is no base to compare with: every weight is trained",
        "set `objective.reference: start` (a frozen copy) or `precomputed`",
    ),
    Contradiction(
        ("objective.reference", "adapter.init"),
        lambda c, _: c.objective.reference == "base" and c.adapter.takes_from_base,
        "without this adapter the model in memory is not the base: the adapter's first values were taken out of it",
        "set `objective.reference: start` (a frozen copy, which answers as the base does) or `precomputed`",
    ),
    Contradiction(
        ("objective.reference", "objective.reference_model"),
        lambda c, _: (c.objective.reference == "model") != (c.objective.reference_model is not None),
        "a second model is named by `reference_model`, and taken where `reference` is `model`",
        "set both, or neither",
    ),
    Contradiction(
        ("objective.reference_revision", "objective.reference_model"),
        lambda c, _: c.objective.reference_revision is not None and c.objective.reference_model is None,
        "a revision is given of no model",
        "set `objective.reference_model` too, or remove it",
    ),
    Contradiction(
        ("objective.reference", "objective.loss", "objective.method"),
        lambda c, _: (
            c.objective.method == "kto" and c.objective.reference == "precomputed" and c.objective.loss != "apo_zero"
        ),
        "the reference point of kto is measured on other pairs in each window, which cannot be precomputed",
        "set `objective.reference: start` (or base), or `objective.loss: apo_zero`",
    ),
    Contradiction(
        ("data.format", "data.train", "data.eval", "objective.method"),
        lambda c, _: _a_format_does_not_fit(c),
        "rows of this format are not what this method learns from",
        "give pairs (`preference`), to kto also answers with a label (`unpaired`), to grpo a `prompt`, to "
        "classification rows with a `label` (`classification`)",
    ),
    Contradiction(
        ("data.text_column", "data.train", "data.eval", "objective.method"),
        lambda c, _: (
            _compares(c) and bool(c.data.text_column or any(source.text_column is not None for source in _sources(c)))
        ),
        "the field of a text counts in supervised fine-tuning only",
        "remove `data.text_column` (to classify that field: `columns: {text: FIELD}` in the source)",
    ),
    Contradiction(
        ("data.overlong", "objective.method"),
        lambda c, _: _compares(c) and c.data.overlong == "split",
        "answers that are compared cannot be split",
        "set `data.overlong` to drop, truncate_right or truncate_left",
    ),
    Contradiction(
        ("data.one_example_per_turn", "objective.method"),
        lambda c, _: _compares(c) and bool(c.data.one_example_per_turn),
        "where answers are compared, a row is one prompt and its answers",
        "remove `data.one_example_per_turn`",
    ),
    Contradiction(
        ("data.train_on", "data.train", "data.eval", "objective.method"),
        lambda c, _: _compares(c) and not _rules(c) <= {*ANSWER_RULES},
        "where answers are compared, their own tokens are trained and nothing else",
        "remove `data.train_on`",
    ),
    Contradiction(
        ("data.train", "data.eval", "objective.method"),
        lambda c, _: _compares(c) and any(source.weight != 1 for source in _sources(c)),
        "the weight of a source is not used where answers are compared",
        "remove `weight` from the source",
    ),
    Contradiction(
        ("data.train", "objective.method"),
        lambda c, _: _compares(c) and c.data.is_mixed,
        "sources are mixed by `repeat` and `share` in supervised fine-tuning only",
        "remove `repeat` and `share` from the sources",
    ),
    Contradiction(
        ("objective.beta", "objective.method"),
        lambda c, _: c.objective.beta == 0 and not _draws(c),
        "with a beta of 0 nothing is compared",
        "give a beta above 0, or leave it out",
    ),
    Contradiction(
        ("objective.rewards", "objective.method"),
        lambda c, _: _draws(c) and not set(c.objective.rewards) <= {*REWARDS},
        "there is no reward of that name",
        f"take some of {', '.join(REWARDS)}, or `--reward FILE.py:FUNCTION`",
    ),
    Contradiction(
        ("objective.reward_pattern", "objective.rewards"),
        lambda c, _: _draws(c) and ("regex" in c.objective.rewards) != (c.objective.reward_pattern is not None),
        "the reward `regex` and `reward_pattern` need each other",
        "set both, or neither",
    ),
    Contradiction(
        ("objective.reward_model", "objective.rewards"),
        lambda c, _: _draws(c) and ("model" in c.objective.rewards) != (c.objective.reward_model is not None),
        "the reward `model` and `reward_model` need each other",
        "set both, or neither",
    ),
    Contradiction(
        ("objective.reference", "objective.method"),
        lambda c, _: _draws(c) and c.objective.reference == "precomputed",
        "the answers of grpo are new in each step, so nothing about them can be precomputed",
        "set `objective.reference: auto`",
    ),
    Contradiction(
        ("data.overlong", "objective.method"),
        lambda c, _: _draws(c) and c.data.overlong not in ("error", "drop"),
        "a prompt that is cut asks something else",
        "set `data.overlong` to drop or error",
    ),
    Contradiction(
        ("data.packing", "objective.method"),
        lambda c, _: _draws(c) and c.data.packing != "none",
        "the length of an answer that will be drawn is not known, so nothing can be packed beforehand",
        "set `data.packing: none`",
    ),
    Contradiction(
        ("evaluation.exact_match", "evaluation.score", "objective.method"),
        lambda c, _: _draws(c) and (c.evaluation.exact_match or c.evaluation.score is not None),
        "grpo judges held-out answers by its rewards",
        "remove `evaluation.exact_match` and `evaluation.score`, and give the reward instead",
    ),
    Contradiction(
        ("evaluation.exact_match", "evaluation.score", "objective.method"),
        lambda c, _: c.objective.trains_head and (c.evaluation.exact_match or c.evaluation.score is not None),
        "the model of this method gives scores, and answers nothing",
        "remove `evaluation.exact_match` and `evaluation.score`",
    ),
    Contradiction(
        ("distributed.strategy", "objective.method"),
        lambda c, _: _draws(c) and c.distributed.strategy in ("fsdp", "deepspeed"),
        "answers are drawn from a whole model, and this strategy divides it",
        "set `distributed.strategy: ddp`",
    ),
    Contradiction(
        ("training.neftune_alpha", "objective.method"),
        lambda c, _: _compares(c) and c.training.neftune_alpha is not None,
        "noise on the embeddings is added in supervised fine-tuning only",
        "set `training.neftune_alpha: null`",
    ),
)
