"""Judge generated answers: built-in scores, and functions of the user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from llmtune.errors import UsageError, in_one_line
from llmtune.evaluation.predictions import Prediction

__all__ = ["SCORES", "Score", "code_digest", "find_score", "mean_score", "scores_of", "user_function"]

Score = Callable[[str, str, str], float]
"""(prompt, reference, answer) -> a number; higher is better."""


def find_score(name: str) -> Score:
    """Return the built-in score of that name, or the function of `FILE.py:FUNCTION`.

    Such a file is run, so its name comes from a command line or a Python caller, never from a config. Raises UsageError
    where there is no such score, file or function.
    """
    if ":" in name:
        form = "give it three texts: `def score(prompt, reference, answer)`"
        return user_function(name, "--score", lambda signature: signature.bind("", "", ""), form)
    if name not in SCORES:
        raise UsageError(f"there is no score `{name}`", "--score", f"one of {', '.join(SCORES)}, or FILE.py:FUNCTION")
    return SCORES[name]


def code_digest(name: str) -> str:
    """Return the sha256 of the file of `FILE.py:FUNCTION`, which `find_score` or `find_rewards` has found."""
    return hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()


def user_function(name: str, option: str, call: Callable[[inspect.Signature], object], form: str) -> Callable[..., Any]:
    """Run the file of `FILE.py:FUNCTION`, the value of `option`, and return its function.

    call: binds the arguments that it will be given to its signature. form: the fix where it does not take them. Raises
    UsageError where there is no such file or function, or one that takes other arguments.
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"there is no file `{path}`", option, "name a Python file, as FILE.py:FUNCTION")
    module_name = f"_llmtune_user_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"`{path}` is no Python file", option, "name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses of the file look their module up
    with _named_as_theirs(path, option):
        spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UsageError(f"`{path}` has no function `{function}`", option, f"it has {known or 'none'}")
    # Before a model is loaded; a function that Python cannot describe is called as it is.
    with suppress(ValueError):
        signature = inspect.signature(found)
        try:
            call(signature)
        except TypeError as error:
            raise UsageError(f"`{function}` does not take what it is given: {error}", option, form) from error
    return cast("Callable[..., Any]", found)


def scores_of(predictions: Sequence[Prediction], score: Score) -> list[float]:
    """Return the score of each prediction. Raises UsageError where `score` fails or gives no finite number."""
    values = []
    for prediction in predictions:
        with _named_as_theirs(prediction.source, "--score"):
            value = score(prediction.prompt, prediction.reference, prediction.answer)
        if not isinstance(value, int | float) or not math.isfinite(value):
            fix = "return a finite number, or True and False"
            raise UsageError(f"the score of {prediction.source} is {value!r}", "--score", fix)
        values.append(float(value))
    return values


@contextmanager
def _named_as_theirs(what: str, option: str) -> Iterator[None]:
    """Raise UsageError for whatever the user's own code raises: it is no bug of llmtune."""
    try:
        yield
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        place = (
            f" ({Path(line.filename).name}:{line.lineno})" if not line.filename.startswith(str(Path(__file__))) else ""
        )
        called = "; a score is called with three texts: (prompt, reference, answer)" if option == "--score" else ""
        problem = f"your code fails on {what}: {type(error).__name__}: {in_one_line(error)}{place}"
        raise UsageError(problem, option, f"correct it{called}") from error


def mean_score(predictions: Sequence[Prediction], score: Score) -> float:
    """Return the mean over all answers."""
    return fmean(scores_of(predictions, score))


def _exact(_prompt: str, reference: str, answer: str) -> float:
    return float(answer == reference)


def _contains(_prompt: str, reference: str, answer: str) -> float:
    """1 where the answer holds the reference; case and white space do not count.

    >>> _contains("", "Paris", "It is  paris.")
    1.0
    """
    return float(" ".join(reference.lower().split()) in " ".join(answer.lower().split()))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _f1(_prompt: str, reference: str, answer: str) -> float:
    """F1 of the words both have, counted as often as they stand (Rajpurkar et al. 2016, arXiv:1606.05250).

    >>> round(_f1("", "the cat sat", "a cat sat down"), 3)
    0.571
    """
    wanted, given = Counter(_words(reference)), Counter(_words(answer))
    shared = (wanted & given).total()
    if not shared:
        return float(not wanted and not given)
    precision, recall = shared / given.total(), shared / wanted.total()
    return 2 * precision * recall / (precision + recall)


def _number(_prompt: str, reference: str, answer: str) -> float:
    """1 where the last number of both is the same (GSM8K, Cobbe et al. 2021, arXiv:2110.14168).

    >>> _number("", "2 + 2 #### 1,004", "so it is 1004.0 in all"), _number("", "4", "none")
    (1.0, 0.0)
    """
    numbers = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) for text in (reference, answer)]
    if not all(numbers):
        return 0.0
    wanted, given = (float(found[-1].replace(",", "")) for found in numbers)
    return float(wanted == given)


SCORES: dict[str, Score] = {"exact": _exact, "contains": _contains, "f1": _f1, "number": _number}
"""Names that `evaluation.score` and `--score` accept."""
