"""The documents tell the truth: their commands work, and the files and headings they name exist.

Commands of code blocks are run, in a fresh working folder, with a tiny model and a few rows instead of the reader's. So
are the commands in running text that need nothing else. Of the others every word and every option must exist.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from import_samples import SAMPLES
from llmtune.cli.main import COMMANDS, GROUPS, main
from training_fixtures import _planned_bytes  # noqa: F401

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
    "scripts/pictures terminal FOLDER": "needs tmux, Chromium and ten minutes",
    "scripts/gpu": "needs a GPU",
    "scripts/gpu --pretend": "tests/gpu/test_script.py",
    "scripts/audit": "a part of scripts/lint; tests/test_audit.py",
    "scripts/house": "tests/test_architecture.py",
    "scripts/docs": "needs the package index; tests/docs/test_site.py holds its navigation",
    "scripts/lock": "needs the package index; tests/test_audit.py holds what it wrote",
    "llmtune verify resume": "tests/verify/test_verify.py types it",
    "pip install .": "tests/test_wheel.py builds, installs and uses the wheel",
}
"""Command -> why it is not run here."""

RUN_IN_TEXT = (
    "list-models",
    "config",
    "runs",
    "resume",
    "data report --config",
    "data preview --config",
    "tokenizer train --config",
)
"""Commands that are also run where they are in running text; the others need more than the text names."""


def blocks(text: str) -> list[str]:
    """Command lines of bash blocks and of indented lines, without comments."""
    fenced = [
        line
        for language, body in FENCE.findall(text)
        if language in ("bash", "sh", "console")
        for line in body.splitlines()
    ]
    lines = [*fenced, *INDENTED.findall(FENCE.sub("", text))]
    commands = [re.sub(r"(^|\s+)#.*", "", line).removeprefix("$ ").strip() for line in lines]
    return [command for command in commands if command]


def mentions(text: str) -> list[str]:
    """Commands in running text."""
    commands = [command.strip() for command in INLINE.findall(FENCE.sub("", text))]
    return [command for command in commands if not re.fullmatch(r"llmtune(\.[\w.]+)?", command)]


def of_all_pages(find) -> list[tuple[str, str]]:
    """(page, command) of all pages, each command of a page once."""
    return [(page.name, command) for page in PAGES for command in dict.fromkeys(find(page.read_text(encoding="utf-8")))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model_folder):
    """A working folder with rows and a config."""
    folder = tmp_path_factory.mktemp("work place")
    with (folder / "my-rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(8):
            words = [
                {"role": "user", "content": f"number {number}"},
                {"role": "assistant", "content": "words " * (1 + number % 3)},
            ]
            file.write(json.dumps({"messages": words}) + "\n")
    pairs = [{"prompt": f"number {n}", "chosen": "words", "rejected": "no words"} for n in range(8)]
    labels = [{"prompt": f"number {n}", "completion": "words", "label": n % 2 == 0} for n in range(8)]
    prompts = [{"question": f"number {n}", "answer": "words"} for n in range(8)]
    reward = "def closeness(prompts, completions, answer, **columns):\n"
    reward += "    return [-abs(len(text) - len(right)) for text, right in zip(completions, answer)]\n"
    (folder / "my_reward.py").write_text(reward)
    texts = [{"text": f"number {n}", "label": ("even", "odd")[n % 2]} for n in range(8)]
    for name, rows in (("pairs", pairs), ("labels", labels), ("prompts", prompts), ("texts", texts)):
        (folder / f"my-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = [
        "model:",
        f"  name: {json.dumps(str(tiny_model_folder))}",
        "data:",
        "  train: [my-rows.jsonl]",
        "  test_size: 2",
    ]
    settings = ["training:", "  max_steps: 2", "  batch_size: 2", "tracking:", "  trackers: [jsonl]"]
    (folder / "c.yaml").write_text("\n".join([*config, *settings]) + "\n")
    for peer, (name, text) in SAMPLES.items():  # of docs/switching.md
        (folder / f"{peer}{Path(name).suffix.replace('yml', 'yaml')}").write_text(text)
    (folder / "lora.yml").write_text(SAMPLES["axolotl"][1])
    watching = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"^```yaml\n# (\w+\.yaml)\n(.*?)^```", watching, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(text)
    return folder


class Reader:
    """Types the commands of the documents in a working folder."""

    def __init__(self, folder: Path, model: Path, capsys) -> None:
        self.folder, self.model, self.capsys = folder, model, capsys
        self.run = ""

    def types(self, command: str, *, fails: bool = False) -> str:
        """Run one llmtune command, with placeholders such as RUN replaced; returns its stdout."""
        words = shlex.split(command)
        assert words[0] == "llmtune"
        if "--as" in words:  # random weights repeat one token, here a line's end, and an empty answer makes no row
            words += ["--repetition-penalty", "5", "--max-new-tokens", "8"]
        with pytest.raises(SystemExit) as ended:
            main([self.replaced(word) for word in words[1:]])
        out, err = self.capsys.readouterr()
        assert bool(ended.value.code) == fails, f"`{command}` ended with {ended.value.code}:\n{err}"
        if words[1] == "train" and "--help" not in words:
            self.run = out.splitlines()[-1]
        return out

    def replaced(self, word: str) -> str:
        """A run, folder or model of this test for a placeholder; any other word as it is."""
        if word in ("FOLDER", "DIR", "report.html"):
            return f"made-{len(list(self.folder.glob('made-*')))}"
        fixed = {
            "RUN": self.run,
            "C": "c.yaml",
            "FILE...": "c.yaml",
            "A": "test",
            "B": "production",
            "COMMAND": "train",
        }
        if word.endswith("=RUN"):
            return word.removesuffix("RUN") + self.run
        return fixed.get(word, str(self.model) if word == "smollm2-135m-instruct" else word)

    def stop_a_run(self) -> None:
        """Train until a limit stops the run, so that one can be resumed."""
        self.types("llmtune train --config C training.max_minutes=1e-6 checkpoint.every_steps=1")


@pytest.fixture
def reader(workplace, tiny_model_folder, capsys, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_STATE_HOME", str(workplace / "state"))
    monkeypatch.setenv("LLMTUNE_TRAINING__MAX_STEPS", "2")  # also of configs that a command of the page writes
    monkeypatch.setenv("LLMTUNE_EVALUATION__MAX_NEW_TOKENS", "8")  # random weights seldom end an answer
    return Reader(workplace, tiny_model_folder, capsys)


def check_script(command: str) -> bool:
    """Whether the command is checked elsewhere (its script must exist) or installs a known extra or tested version."""
    if command in CHECKED_ELSEWHERE:
        script = ROOT / shlex.split(command)[0]
        assert command.startswith(("llmtune", "pip")) or os.access(script, os.X_OK), f"{script} cannot be run"
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
    """`data preview` of `llmtune data preview --config C`, or the name of a group; the command must exist."""
    names = [
        words for words in (*GROUPS, *(row.words for row in COMMANDS)) if f"{command} ".startswith(f"llmtune {words} ")
    ]
    assert names, f"no such command: {command}"
    return max(names, key=len)


def test_the_commands_of_code_blocks_work(reader):
    commands = of_all_pages(blocks)
    assert len(commands) >= 7
    ran = set()
    page_before, first_run = "", ""
    for page, command in commands:
        if page != page_before:  # each page is read by itself
            page_before, first_run = page, first_run or reader.run
            reader.run = first_run
        if command in ran or check_script(command):
            continue
        if "[" in command and "|" in command:
            options_exist(reader, command)
            if words_of(command) == "merge-lora":
                reader.types("llmtune train --config C adapter.method=lora")
        reader.types(synopsis(command))
        ran.add(command)
    assert len(ran) >= 70
    assert (reader.folder / "merged" / "merge_report.json").is_file()


def options_exist(reader: Reader, command: str) -> None:
    help_text = reader.types(f"llmtune {words_of(command)} --help")
    for option in OPTION.findall(command):
        assert option in help_text, f"`{command}`: there is no {option}"


MENTIONED = of_all_pages(mentions)


@pytest.mark.parametrize(("page", "command"), MENTIONED, ids=[f"{page}: {command}" for page, command in MENTIONED])
def test_a_command_in_running_text_exists_and_works(reader, page, command):
    if check_script(command):
        return
    if command.startswith("python -m llmtune."):
        assert (ROOT / "src" / Path(*command.split()[2].split("."))).with_suffix(".py").is_file()
        return
    command = command.replace("COMMAND", "train").replace("import FILE", "import lora.yml")
    options_exist(reader, command)
    if words_of(command).startswith(("resume",)):
        reader.stop_a_run()
    if command.removeprefix("llmtune ").startswith(RUN_IN_TEXT):
        reader.types(synopsis(command))


def test_there_are_documents_and_commands_to_look_at():
    assert len(PAGES) >= 9
    assert len(MENTIONED) >= 25
    assert sum(command.removeprefix("llmtune ").startswith(RUN_IN_TEXT) for _, command in MENTIONED) >= 10
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


def test_every_link_between_the_documents_has_a_target():
    count = 0
    missing = set()
    for page in PAGES:
        for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            count += 1
            if not linked.exists():
                missing.add(str(linked.relative_to(ROOT)))
            elif anchor:
                assert anchor in anchors(linked), f"{page.name}: no heading for {target}"
    assert count >= 9
    assert missing == set()


def test_readme_names_every_page():
    linked = {
        target.partition("#")[0]
        for target in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if target.startswith("docs/") and not target.startswith("docs/pictures/")
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
