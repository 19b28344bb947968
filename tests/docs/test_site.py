"""The site of the documentation (`scripts/docs`): every page is in its navigation, and no page asks another host."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


def pages_of(entries):
    """The files that a navigation names, in its order; an entry is {title: file} or {title: entries}."""
    for entry in entries:
        ((_, target),) = entry.items()
        if isinstance(target, str):
            yield target
        else:
            yield from pages_of(target)


def test_every_page_is_in_the_navigation_once_and_every_entry_exists():
    docs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = list(pages_of(PROJECT["nav"]))
    assert len(docs) >= 17
    assert sorted(listed) == sorted(docs | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"})


def test_the_site_needs_nothing_from_another_host():
    """`offline` without a script of our own of this name takes one from a content delivery network."""
    scripts = [script["path"] for script in PROJECT["extra"]["polyfills"]]
    assert "offline" in PROJECT["plugins"]
    assert PROJECT["theme"]["font"] is False
    assert scripts == ["docs/site/iframe-worker.js"]
    assert (ROOT / scripts[0]).is_file()


def test_the_pages_follow_the_readers_dark_or_light_setting():
    """The first palette is the one of a first visit, and one for light alone would be kept when the setting changes."""
    assert [palette["media"] for palette in PROJECT["theme"]["palette"]] == [
        "(prefers-color-scheme)",
        "(prefers-color-scheme: light)",
        "(prefers-color-scheme: dark)",
    ]


def test_the_script_copies_what_the_navigation_names():
    copied = next(line for line in (ROOT / "scripts" / "docs").read_text().splitlines() if line.startswith("cp -r "))
    assert {page.split("/")[0] for page in pages_of(PROJECT["nav"])} <= set(copied.split())
    assert copied.split()[-1] == PROJECT["docs_dir"]


def test_every_picture_is_small_and_shown_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert len(pictures) >= 10
    assert [picture.name for picture in pictures if f"pictures/{picture.name})" not in pages] == []
    assert [picture.name for picture in pictures if picture.stat().st_size > 200_000] == []
