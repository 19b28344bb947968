"""The documents tell the truth: what they say to type works, and what they point to exists.

Commands of code blocks are run, in a fresh working folder, with a tiny model and rows in the place of what the reader
brings; so are those in the text that stand for themselves. Of commands that are only mentioned, every word and every
option must exist.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from llmtune.cli.main import COMMANDS, GROUPS, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    ((?:llmtune|scripts/|pip ).*)$", re.MULTILINE)
INLINE = re.compile(r"(?<!`)`((?:llmtune|scripts/|pip |python -m llmtune)[^`\n]*)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<!\S)\[?(--[a-z-]+)")

CHECKED_ELSEWHERE = {
    "scripts/quickstart": "run by .ci/run in a fresh environment",
    "scripts/test": "run by .ci/run in a fresh environment",
    "scripts/test --all": "the same script with the long campaigns",
    "scripts/lint": "run by .ci/run in a fresh environment",
    "scripts/gpu": "needs a GPU",
    "scripts/audit": "a part of scripts/lint; tests/test_audit.py",
    "scripts/house": "tests/test_architecture.py",
    "scripts/lock": "needs the package index; tests/test_audit.py holds what it wrote",
    "pip install .": "tests/test_wheel.py builds, installs and uses the wheel",
}
"""Command -> why it is not run here."""

STANDS_FOR_ITSELF = (
    "list-models",
    "config",
    "runs",
    "resume",
    "data report --config",
    "data preview --config",
    "tokenizer train --config",
)
"""Commands that are run for real also where they stand in the text; the others need more than the text names."""


def blocks(text: str) -> list[str]:
    """Command lines of bash blocks and of indented lines, without comments."""
    fenced = [
        line
        for language, body in FENCE.findall(text)
        if language in ("bash", "sh", "console")
        for line in body.splitlines()
    ]
    lines = [*fenced, *INDENTED.findall(FENCE.sub("", text))]
    return [found for line in lines if (found := re.sub(r"(^|\s+)#.*", "", line).removeprefix("$ ").strip())]


def mentions(text: str) -> list[str]:
    """Commands in running text."""
    return [
        one.strip()
        for one in INLINE.findall(FENCE.sub("", text))
        if not re.fullmatch(r"llmtune(\.[\w.]+)?", one.strip())
    ]


def of_all(find) -> list[tuple[str, str]]:
    """(page, command) of all pages, each command of a page once."""
    return [(page.name, one) for page in PAGES for one in dict.fromkeys(find(page.read_text(encoding="utf-8")))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model_folder):
    """A working folder with what a reader brings: rows, a config, a file to validate."""
    here = tmp_path_factory.mktemp("work place")
    with (here / "my-rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(8):
            words = [
                {"role": "user", "content": f"number {number}"},
                {"role": "assistant", "content": "words " * (1 + number % 3)},
            ]
            file.write(json.dumps({"messages": words}) + "\n")
    config = [
        "model:",
        f"  name: {json.dumps(str(tiny_model_folder))}",
        "data:",
        "  train: [my-rows.jsonl]",
        "  test_size: 2",
    ]
    more = ["training:", "  max_steps: 4", "  batch_size: 2", "tracking:", "  trackers: [jsonl]"]
    (here / "c.yaml").write_text("\n".join([*config, *more]) + "\n")
    return here


class Reader:
    """Someone who types what the documents say."""

    def __init__(self, here: Path, model: Path, capsys) -> None:
        self.here, self.model, self.capsys = here, model, capsys
        self.run = ""

    def types(self, command: str, *, fails: bool = False) -> str:
        """Run one llmtune command with the reader's own things in the place of the document's; returns what it printed."""  # noqa: E501
        words = shlex.split(command)
        assert words[0] == "llmtune"
        with pytest.raises(SystemExit) as ended:
            main([self.own(word) for word in words[1:]])
        out, err = self.capsys.readouterr()
        assert bool(ended.value.code) == fails, f"`{command}` ended with {ended.value.code}:\n{err}"
        if words[1] == "train" and "--help" not in words:
            self.run = out.splitlines()[-1]
        return out

    def own(self, word: str) -> str:
        """What stands for a word of the document here."""
        if word in ("FOLDER", "DIR", "report.html"):
            return f"made-{len(list(self.here.glob('made-*')))}"
        fixed = {
            "RUN": self.run,
            "C": "c.yaml",
            "FILE...": "c.yaml",
            "A": "test",
            "B": "production",
            "COMMAND": "train",
        }
        return fixed.get(word, str(self.model) if word == "smollm2-135m-instruct" else word)

    def has_a_stopped_run(self) -> None:
        """Train one until a limit stops it: something to resume."""
        self.types("llmtune train --config C training.max_minutes=1e-6 checkpoint.every_steps=1")


@pytest.fixture
def reader(workplace, tiny_model_folder, capsys, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_STATE_HOME", str(workplace / "state"))
    return Reader(workplace, tiny_model_folder, capsys)


def check_script(command: str) -> bool:
    """Whether the command is one that is checked elsewhere (then it must be there), or installs what exists: an extra,
    a tested version.
    """
    if command in CHECKED_ELSEWHERE:
        script = ROOT / shlex.split(command)[0]
        assert command.startswith("pip") or os.access(script, os.X_OK), f"{script} cannot be run"
        return True
    extra = re.fullmatch(r"pip install '(?:llmtune|\.)\[(\w+)\]'", command)
    if extra:
        assert extra[1] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = re.fullmatch(r"pip install --no-deps (\S+==\S+)", command)
    if pinned:
        assert pinned[1] in (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    return bool(extra or pinned)


def synopsis(command: str) -> str:
    """The shortest command that a line such as `do A|B --to DIR [--more X]` describes."""
    return re.sub(r"\|\S+", "", re.sub(r"\s*\[[^\]]*\]", "", command))


def words_of(command: str) -> str:
    """`data preview` of `llmtune data preview --config C`, or the name of a group; fails when there is no such command."""  # noqa: E501
    found = [
        words for words in (*GROUPS, *(row.words for row in COMMANDS)) if f"{command} ".startswith(f"llmtune {words} ")
    ]
    assert found, f"no such command: {command}"
    return max(found, key=len)


def test_what_code_blocks_say_to_type_works(reader):
    found = of_all(blocks)
    assert len(found) >= 7
    ran = 0
    for _, command in found:
        if check_script(command):
            continue
        if "[" in command and "|" in command:
            options_exist(reader, command)
            if words_of(command) == "merge-lora":
                reader.types("llmtune train --config C adapter.method=lora")
        reader.types(synopsis(command))
        ran += 1
    assert ran >= 4
    assert (reader.here / "merged" / "merge_report.json").is_file()


def options_exist(reader: Reader, command: str) -> None:
    help_text = reader.types(f"llmtune {words_of(command)} --help")
    for option in OPTION.findall(command):
        assert option in help_text, f"`{command}`: there is no {option}"


MENTIONED = of_all(mentions)


@pytest.mark.parametrize(("page", "command"), MENTIONED, ids=[f"{page}: {command}" for page, command in MENTIONED])
def test_a_command_in_the_text_exists_and_works(reader, page, command):
    if check_script(command):
        return
    if command.startswith("python -m llmtune."):
        assert (ROOT / "src" / Path(*command.split()[2].split("."))).with_suffix(".py").is_file()
        return
    command = command.replace("COMMAND", "train")
    options_exist(reader, command)
    if words_of(command).startswith(("resume",)):
        reader.has_a_stopped_run()
    if command.removeprefix("llmtune ").startswith(STANDS_FOR_ITSELF):
        reader.types(synopsis(command))


def test_there_are_documents_and_commands_to_look_at():
    assert len(PAGES) >= 9
    assert len(MENTIONED) >= 25
    assert sum(command.removeprefix("llmtune ").startswith(STANDS_FOR_ITSELF) for _, command in MENTIONED) >= 10
    assert {"README.md", "config.md", "data.md", "models.md", "CONTRIBUTING.md"} <= {page for page, _ in MENTIONED}


def test_what_is_checked_elsewhere_is_checked_there():
    ci = (ROOT / ".ci" / "run").read_text()
    for command, why in CHECKED_ELSEWHERE.items():
        assert ".ci/run" not in why or command in ci
    assert (ROOT / "tests" / "test_wheel.py").is_file()


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_inside_the_documents_leads_somewhere():
    count = 0
    missing = set()
    for page in PAGES:
        for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            path, _, anchor = target.partition("#")
            aim = (page.parent / path).resolve() if path else page
            count += 1
            if not aim.exists():
                missing.add(str(aim.relative_to(ROOT)))
            elif anchor:
                assert anchor in anchors(aim), f"{page.name}: no heading for {target}"
    assert count >= 9
    assert missing == set()


def test_readme_names_every_page():
    linked = {
        target
        for target in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if target.startswith("docs/")
    }
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert len(pages) >= 7
    assert pages == linked


NAMED_PATH = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|jinja|ipynb))`")
NAMED_FOLDER = re.compile(r"`((?:src/llmtune|tests|benchmarks|scripts|examples|configs)/(?:[\w-]+/)*)`")
TABLE_IN_FILE = re.compile(r"`([A-Z_]{4,})` in `([\w./]+\.py)`|`([\w./]+\.py)` \(`([A-Z_]{4,})`\)")


def in_the_package(page: Path, name: str) -> Path | None:
    """The file that a page means by `name`: from the top, in the package, or in its `data/`."""
    roots = (ROOT, ROOT / "src" / "llmtune", ROOT / "src" / "llmtune" / "data", page.parent)
    return next((root / name for root in roots if (root / name).exists()), None)


def test_files_and_tables_that_the_documents_name_exist():
    count, missing = 0, []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in [*NAMED_PATH.findall(text), *NAMED_FOLDER.findall(text)]:
            count += 1
            if in_the_package(page, name) is None:
                missing.append(f"{page.name}: {name}")
        for groups in TABLE_IN_FILE.findall(text):
            table, name = (groups[0], groups[1]) if groups[0] else (groups[3], groups[2])
            path = in_the_package(page, name)
            if path is None or not re.search(rf"^{table}\b.* = ", path.read_text(encoding="utf-8"), re.MULTILINE):
                missing.append(f"{page.name}: {table} in {name}")
            count += 1
    assert missing == []
    assert count >= 100


def test_the_map_has_every_folder_with_its_rank():
    drawing = FENCE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))[0][1]
    ranks = {}
    for line in drawing.splitlines():
        if row := re.match(r"\s*(\d+)\s+((?:\S+(?:/|\.py)\s+)+)", line):
            ranks |= {name.rstrip("/").removesuffix(".py"): int(row[1]) for name in row[2].split()}
    source = (ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8")
    table = re.search(r"^RANKS = \{\n(.*?)^\}", source, re.MULTILINE | re.DOTALL)[1]
    assert ranks == {name: int(rank) for name, rank in re.findall(r'"(\w+)": (\d+),', table)}
