"""Cases of which the default suite takes a few and the campaign takes all."""

from collections.abc import Collection, Iterable

import pytest


def few_of(cases: Iterable, few: Collection) -> list:
    """The cases for `parametrize`; those that are not among `few` run in the campaign only."""
    marks = pytest.mark.campaign
    return [
        case if case in few else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
        for case in cases
    ]
