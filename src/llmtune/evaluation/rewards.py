"""Rewards of drawn answers: rows of a table, and functions of the user's own."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, SupportsFloat

from llmtune.config.schema import ObjectiveConfig
from llmtune.data.example import Row
from llmtune.errors import ConfigError, UsageError
from llmtune.evaluation.reward_model import open_reward_model
from llmtune.evaluation.scores import SCORES, Score, code_digest, user_function

__all__ = ["REWARDS", "AnswerGroup", "Reward", "find_rewards", "rewards_digest", "total_reward"]


class AnswerGroup(NamedTuple):
    """The answers to one prompt, with the row that the prompt comes from."""

    source: str
    """The row, as `file:line`."""
    prompt: str
    """The text of the prompt as the model sees it."""
    answers: Sequence[str]
    """Their texts, without the tokens that end them."""
    ids: Sequence[Sequence[int]]
    """Their tokens, the stop token included."""
    reference: str | None
    """The right answer, where the row has one."""
    columns: Mapping[str, object]
    """All fields of the row."""


@dataclass(frozen=True)
class Reward:
    """One reward and its weight in the sum."""

    name: str
    weight: float
    code: str = field(repr=False)
    """sha256 of the file of a user's function; empty for a row of the table."""
    judge: Callable[[AnswerGroup], Sequence[float | None]]
    """Gives a number for each answer of a group, higher is better; None for one that it does not judge."""


def find_rewards(
    objective: ObjectiveConfig, functions: Sequence[str] = (), *, no_cuda: bool = False, offline: bool = False
) -> list[Reward]:
    """Return the rewards of a config and those of `--reward FILE.py:FUNCTION[=WEIGHT]`.

    Such a file is run, so its name comes from a command line or a Python caller, never from a config. Raises
    ConfigError where there is no reward at all, UsageError where there is no such file or function.
    """
    rewards = [
        Reward(name, weight, "", REWARDS[name](objective))
        if name != MODEL
        else _model(objective, weight, no_cuda=no_cuda, offline=offline)
        for name, weight in objective.rewards.items()
    ]
    for text in functions:
        name, separator, weight = text.rpartition("=")
        try:
            own = _own(name or text, float(weight) if separator else 1.0)
        except ValueError as error:
            fix = "write FILE.py:FUNCTION or FILE.py:FUNCTION=0.5"
            raise UsageError(f"the weight `{weight}` is no number", "--reward", fix) from error
        rewards.append(own)
    if not rewards:
        fix = "set `objective.rewards: {exact: 1.0}`, or give `--reward FILE.py:FUNCTION`"
        raise ConfigError("grpo learns from rewards, and none is named", where="objective.rewards", fix=fix)
    names = [reward.name for reward in rewards]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"two rewards are called `{repeated}`", "--reward", "give the function another name")
    return rewards


def rewards_digest(rewards: Sequence[Reward]) -> str | None:
    """sha256 over names, weights and code of rewards; None without any."""
    facts = [[reward.name, reward.weight, reward.code] for reward in rewards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() if facts else None


def total_reward(rewards: Sequence[Reward], judged: Mapping[str, float | None]) -> float | None:
    """Weighted sum of the rewards of one answer that are not None; None where all are."""
    known = [reward.weight * value for reward in rewards if (value := judged[reward.name]) is not None]
    return math.fsum(known) if known else None


def _own(name: str, weight: float) -> Reward:
    """A function of the user's: fn(prompts, completions, completion_ids, **columns) -> a number or None for each."""
    path, _, short_name = name.rpartition(":")
    if not path:
        raise UsageError(f"`{name}` names no function", "--reward", "write FILE.py:FUNCTION")
    form = "it is called by names: `def reward(prompts, completions, completion_ids, **columns)`, each a list"
    names = ("prompts", "completions", "completion_ids")
    # What else it asks for is a column of the rows, which are not read yet.
    function = user_function(
        name, "--reward", lambda signature: signature.bind_partial(**{key: [] for key in names}), form
    )

    def judge(group: AnswerGroup) -> Sequence[float | None]:
        count = len(group.answers)
        columns: dict[str, list[object]] = {column: [value] * count for column, value in group.columns.items()}
        if group.reference is not None:
            columns.setdefault("answer", [group.reference] * count)
        given: dict[str, list[object]] = {"prompts": [group.prompt] * count, "completions": list(group.answers)}
        given["completion_ids"] = [list(ids) for ids in group.ids]
        hidden = sorted(columns.keys() & given.keys())
        if hidden:
            problem = f"the field `{hidden[0]}` of {group.source} has the name of what every reward is given"
            raise UsageError(problem, f"--reward {name}", "give the field another name")
        try:
            returned = function(**columns, **given)
            if isinstance(returned, Iterable) and not isinstance(returned, str):
                returned = list(returned)  # here, because it may compute them only now
        except Exception as error:  # the user's own code may raise anything
            problem = f"the reward failed on the answers to {group.source}: {type(error).__name__}: {error}"
            raise UsageError(problem, f"--reward {name}", "mend the function, then `llmtune resume`") from error
        return _checked(returned, count, group.source, f"--reward {name}")

    return Reward(short_name, weight, code_digest(name), judge)


def _checked(returned: object, count: int, source: str, where: str) -> list[float | None]:
    """The numbers that a user's function returned. Raises UsageError unless there is one, or None, for each answer."""
    fix = "return a list with a finite number for each answer, or None for one that is not judged"
    if not isinstance(returned, list):
        raise UsageError(f"the reward gave {returned!r} for the {count} answers to {source}", where, fix)
    if len(returned) != count:
        raise UsageError(f"the reward gave {len(returned)} numbers for the {count} answers to {source}", where, fix)
    numbers: list[float | None] = []
    for value in returned:
        try:
            # Numbers of NumPy and torch too, but no text, which `float` would read.
            number = None if value is None else float(value) if isinstance(value, SupportsFloat) else math.nan
        except (TypeError, ValueError):  # an array of several
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise UsageError(f"the reward of an answer to {source} is {value!r}", where, fix)
        numbers.append(number)
    return numbers


MODEL = "model"
"""The reward that a model gives."""


def _model(objective: ObjectiveConfig, weight: float, *, no_cuda: bool, offline: bool) -> Reward:
    """The score of prompt and answer by `objective.reward_model`; its weights count as the reward's code."""
    scores, digest = open_reward_model(objective, no_cuda=no_cuda, offline=offline)

    def judge(group: AnswerGroup) -> Sequence[float | None]:
        return scores(Row(group.source, group.columns), group.answers)

    return Reward(MODEL, weight, digest, judge)


# --- the rows of the table


Judge = Callable[[AnswerGroup], Sequence[float | None]]


def _compare(score: Score, _objective: ObjectiveConfig) -> Judge:
    """Compare each answer with the row's answer by a score; None where it has none."""

    def judge(group: AnswerGroup) -> Sequence[float | None]:
        if group.reference is None:
            return [None] * len(group.answers)
        reference = group.reference.strip()
        return [score(group.prompt, reference, answer.strip()) for answer in group.answers]

    return judge


def _json_fields(_prompt: str, reference: str, answer: str) -> float:
    """Part of the fields that are right, of all that either object has; 0 for an answer that is no JSON object.

    >>> _json_fields("", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 30, "x": 1}')
    0.3333333333333333
    """
    wanted, given = _json_object(reference), _json_object(answer)
    if wanted is None or given is None:
        return 0.0
    names = wanted.keys() | given.keys()
    right = sum(name in wanted and name in given and wanted[name] == given[name] for name in names)
    return right / len(names) if names else 1.0


def _json_object(text: str) -> dict[str, object] | None:
    with suppress(ValueError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None
    return None


def _regex(objective: ObjectiveConfig) -> Judge:
    """1 for an answer that holds `objective.reward_pattern`."""
    try:
        pattern = re.compile(objective.reward_pattern or "", re.DOTALL)
    except re.error as error:
        problem = f"`{objective.reward_pattern}` is no regular expression: {error}"
        raise ConfigError(problem, where="objective.reward_pattern") from error
    return lambda group: [float(pattern.search(answer) is not None) for answer in group.answers]


def _length(objective: ObjectiveConfig) -> Judge:
    """0 up to three quarters of `max_new_tokens`, then down to -1 at all of them (DAPO, arXiv:2503.14476, eq. 13)."""
    longest = objective.max_new_tokens
    margin = max(1, longest // 4)
    return lambda group: [min(0.0, (longest - margin - len(ids)) / margin) for ids in group.ids]


REWARDS: dict[str, Callable[[ObjectiveConfig], Judge]] = {
    "exact": partial(_compare, SCORES["exact"]),
    "contains": partial(_compare, SCORES["contains"]),
    "f1": partial(_compare, SCORES["f1"]),
    "number": partial(_compare, SCORES["number"]),
    "json_fields": partial(_compare, _json_fields),
    "regex": _regex,
    "length": _length,
}
"""Names that `objective.rewards` accepts; each makes its judge from the settings."""
