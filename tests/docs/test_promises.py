"""docs/promises.md: every number that code cites is a promise there, and every promise names tests that cite it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")

PROMISES = dict(re.findall(r"^### ([NPQ]\d+)\. [^\n]*\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
"""Number -> the text below its heading."""


def numbers_cited(text: str) -> set[str]:
    """`P4` in prose, and `_p4_` in the name of a test."""
    in_names = re.findall(r"(?<=_)[npq][1-9]\d?(?=_|\b)", " ".join(re.findall(r"def (test_\w+)", text)))
    return {*re.findall(r"\b[NPQ][1-9]\d?\b", text), *(number.upper() for number in in_names)}


def files_named(text: str) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py)`", text)


def test_the_promises_are_numbered_without_gaps():
    counts = {letter: sum(number[0] == letter for number in PROMISES) for letter in "QNP"}
    assert counts == {"Q": 9, "N": 15, "P": 12}
    assert set(PROMISES) == {f"{letter}{number}" for letter, count in counts.items() for number in range(1, count + 1)}


def test_every_number_that_is_cited_is_a_promise():
    files = [path for folder in ("src", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "promises.md"]
    cited = {
        (path.relative_to(ROOT).as_posix(), number)
        for path in files
        for number in numbers_cited(path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 100
    assert sorted((file, number) for file, number in cited if number not in PROMISES) == []


@pytest.mark.parametrize("number", PROMISES)
def test_a_promise_names_tests_that_cite_it(number):
    files = files_named(PROMISES[number])
    assert files
    for file in files:
        assert (ROOT / file).is_file(), f"{number} names {file}, which does not exist"
        assert number in numbers_cited((ROOT / file).read_text(encoding="utf-8")), f"{file} does not cite {number}"


def test_the_promises_without_a_number_name_tests_that_exist():
    section = PAGE.split("## Nobody let in\n")[1]
    bullets = re.findall(r"^- .*?(?=^- |\Z)", section, re.MULTILINE | re.DOTALL)
    assert len(bullets) >= 11
    for bullet in bullets:
        assert files_named(bullet), f"no test is named: {bullet}"
        for file in files_named(bullet):
            assert (ROOT / file).is_file(), f"{file} does not exist"
