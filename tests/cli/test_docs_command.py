"""`llmtune docs` prints the pages of docs/, and names the nearest one for a topic that does not exist."""

import json
from pathlib import Path

import pytest

from llmtune.cli.main import run

DOCS = Path(__file__).parents[2] / "docs"


def test_every_page_has_a_line_with_its_topic_and_first_sentence(capsys):
    assert run(["docs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in DOCS.glob("*.md"))
    assert "data             Where rows come from, how they are read, and the fate of each." in lines
    assert all(line.endswith(".") for line in lines)


def test_the_list_for_programs_has_one_object_a_line(capsys):
    assert run(["docs", "--json"]) == 0
    pages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(pages) == len(list(DOCS.glob("*.md")))
    assert all(Path(page["path"]).samefile(DOCS / f"{page['topic']}.md") for page in pages)
    assert all(page["title"] and page["summary"] for page in pages)


@pytest.mark.parametrize("topic", ["data", "Data", "data.md", "docs/data.md"])
def test_a_page_is_printed_as_it_is_written(topic, capsys):
    assert run(["docs", topic]) == 0
    assert capsys.readouterr().out == (DOCS / "data.md").read_text(encoding="utf-8")


def test_a_page_for_programs_has_its_text(capsys):
    assert run(["docs", "data", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert (page["topic"], page["text"]) == ("data", (DOCS / "data.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("topic", "nearest"), [("dta", "data"), ("preference", "preferences"), ("../promises", "")])
def test_an_unknown_topic_is_refused_with_the_nearest(topic, nearest, capsys):
    assert run(["docs", topic]) == 2
    err = capsys.readouterr().err
    assert f"there is no page `{topic}`" in err
    assert f"did you mean `{nearest or 'promises'}`? the pages are config, data, " in err
