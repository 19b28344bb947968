"""Every kind of error and every exit code has a page."""

from __future__ import annotations

import pytest

from llmtune.cli.explain import PAGES
from llmtune.cli.main import run
from llmtune.errors import LlmtuneError


def kinds_of(cls):
    return {kind for child in cls.__subclasses__() for kind in {child} | kinds_of(child)}


def test_every_kind_of_error_has_a_page():
    assert {page.kind for page in PAGES} == {
        kind for kind in kinds_of(LlmtuneError) if kind.__module__ == "llmtune.errors"
    }


@pytest.mark.parametrize(
    "code", ["0", "1", "2", "3", "4", "5", "6", "7", "8", "130", "143", *(page.kind.kind for page in PAGES)]
)
def test_every_code_and_kind_is_explained(code, capsys):
    assert run(["explain", code]) == 0
    assert len(capsys.readouterr().out) > 20


@pytest.mark.parametrize("kind", ["usage", "config", "data", "model", "tokenizer", "adapter", "checkpoint", "machine"])
def test_a_page_shows_bad_inputs_of_its_kind_with_their_answers(kind, capsys):
    assert run(["explain", kind]) == 0
    out = capsys.readouterr().out
    assert out.count("\n  llmtune ") >= 3
    assert out.count("    error: ") == out.count("\n  llmtune ")


def test_the_list_names_every_kind(capsys):
    assert run(["explain"]) == 0
    out = capsys.readouterr().out
    assert all(f" {page.kind.kind} " in out for page in PAGES)


@pytest.mark.parametrize("code", ["9", "zzz", "-1", "²", "99999999999"])
def test_what_is_not_known_is_refused(code, capsys):
    assert run(["explain", "--", code]) == 2
    assert "nothing is known by" in capsys.readouterr().err
