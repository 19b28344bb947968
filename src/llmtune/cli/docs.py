"""`llmtune docs TOPIC`: the pages of the documentation, which come with the package."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from llmtune.common.text import excerpt
from llmtune.config.paths import shipped_path
from llmtune.errors import UsageError

__all__ = ["Topic", "docs", "summary", "topics"]


class Topic(NamedTuple):
    """One page of the documentation."""

    topic: str
    """Name of the file without its ending."""

    title: str
    summary: str
    """First sentence of the page."""

    path: str


def docs(
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="The page to print, as Markdown.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line; with a topic, its text is in it.")
    ] = False,
) -> None:
    """Print a page of the documentation; without a topic, list the pages."""
    pages = topics()
    if topic is None:
        width = max(len(page.topic) for page in pages.values())
        for page in pages.values():
            print(json.dumps(page._asdict()) if as_json else f"{page.topic:<{width}}  {page.summary}")
        return
    # `docs/data.md` is how other pages and messages name a page.
    name = topic.lower().removeprefix("docs/").removesuffix(".md")
    if name not in pages:
        nearest = difflib.get_close_matches(name, pages, n=1)
        hint = f"did you mean `{nearest[0]}`? " if nearest else ""
        raise UsageError(
            f"there is no page `{excerpt(topic)}`", "command line", f"{hint}the pages are {', '.join(pages)}"
        )
    text = Path(pages[name].path).read_text(encoding="utf-8")
    print(json.dumps({**pages[name]._asdict(), "text": text}) if as_json else text.rstrip("\n"))


def topics() -> dict[str, Topic]:
    """Return every page by its topic, in the order of the alphabet."""
    found = {}
    for path in sorted(shipped_path("docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        found[path.stem] = Topic(path.stem, title, summary(text), str(path))
    return found


def summary(text: str) -> str:
    r"""Return the first sentence of a Markdown page, without its marks; headings, code, lists and tables are no text.

    >>> summary("# Data\n\n```bash\nllmtune train\n```\n\nWhere **rows** [come](a.md) from. More.")
    'Where rows come from.'
    """
    body = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    paragraphs = [part for part in re.split(r"\n\s*\n", body) if part.strip()]
    prose = next((part for part in paragraphs if not re.match(r"\s*[#|!>-]|\s{4}", part.strip("\n"))), "")
    plain = re.sub(r"\*\*|\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(prose.split()))
    return re.split(r"(?<=\.) ", plain, maxsplit=1)[0]
