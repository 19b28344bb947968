"""What the fix of an error proposes, taken apart: commands, options and settings, each tried on the program itself."""

import ast
import re
import shlex
from itertools import pairwise
from pathlib import Path

import llmtune
from llmtune.cli.main import COMMANDS, build
from llmtune.config.alias_refusals import NOT_HERE
from llmtune.config.contradictions import CONTRADICTIONS
from llmtune.config.keys import LEAVES, SECTIONS
from llmtune.config.layers import parse_config
from llmtune.errors import ConfigError

HOLE = "\N{REPLACEMENT CHARACTER}"
"""Stands for a value that the program fills in."""
CAPITAL_FOLDERS = ("DIR", "FOLDER", "FILE")
CAPITALS = re.compile(r"\b(RUN|MODEL|FILE|DIR|NAME|N|KEY=VALUE|ADAPTER)\b")


def refused(fix, command=None):
    """Every proposal of a fix that the program would refuse; `command`: words of the one that was typed."""
    wrong = []
    for quoted in re.findall(r"`([^`]+)`", fix):
        if HOLE in quoted:
            continue
        if quoted.startswith("llmtune "):
            wrong += _refused_command(quoted)
        elif match := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(: |=)(.+)", quoted):
            wrong += _refused_setting(match[1], match[3])
        elif re.fullmatch(r"[a-z]+(\.[a-z_]+)+", quoted) and quoted.split(".")[0] in SECTIONS:
            wrong += [] if quoted in LEAVES or quoted in SECTIONS else [f"there is no key `{quoted}`"]
    if command is not None:
        wrong += [
            f"`{option}` is no option of `{command}`"
            for option in re.findall(r"(?:say|give|add|with|name it with) `?(--[a-z][a-z-]+)", fix)
            if option not in _options(command)
        ]
    return wrong


def refused_in(output, command_line):
    """Every proposal in the fix lines of an error message that the program, or the command typed, would refuse."""
    words = command_line.split()
    names = {row.words for row in COMMANDS}
    command = next((name for name in (" ".join(words[:2]), *words[:1]) if name in names), None)
    return [wrong for fix in re.findall(r"^ *fix: (.*)$", output, re.MULTILINE) for wrong in refused(fix, command)]


def settings_in(fix):
    """Every setting with a value that a fix proposes, as KEY=VALUE."""
    found = [re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?:: |=)(.+)", quoted) for quoted in re.findall(r"`([^`]+)`", fix)]
    pairs = [(match[1], match[2]) for match in found if match and HOLE not in match[2]]
    return [
        f"{key}={value}" for key, value in pairs if not re.search(r"\.\.\.|…", value) and not CAPITALS.search(value)
    ]


def command_lines_in(output, typed):
    """The command lines by which the fixes of an error message are tried; `typed`: the words of the one that failed.

    A setting is tried on the config that was typed, a command with all its words as it stands, an option that is to be
    said behind the words that were typed.
    """
    lines = []
    for fix in re.findall(r"^ *fix: (.*)$", output, re.MULTILINE):
        lines += [["config", "show", *_config_words(typed), setting] for setting in settings_in(fix)]
        for quoted in re.findall(r"`(llmtune [^`]+)`", fix):
            words = shlex.split(quoted)[1:]
            if not any(CAPITALS.fullmatch(word) or word == "..." for word in words):
                # Without what it is to work on, a command is only named.
                lines.append(words if len(words) > 1 or words[0] in ("list-models", "runs") else [*words, "--help"])
        lines += [[*typed, option] for option in re.findall(r"(?:say|add) `?(--[a-z][a-z-]+)`? to go on", fix)]
    return lines


def healed_command_lines(output, typed):
    """For each fix of an error message that names settings: the command typed with each of them, then with all.

    Without those that are written in the place of a wrong word: on top of it they heal nothing, and `command_lines_in`
    tries them by themselves.
    """
    lines = []
    for fix in re.findall(r"^ *fix: (.*)$", output, re.MULTILINE):
        settings = settings_in(fix)
        if settings and not re.match("write |leave it out|the default is", fix):
            every = [[setting] for setting in settings] + ([settings] if len(settings) > 1 else [])
            lines.append((fix, [[*typed, *one] for one in every]))
    return lines


def filled_command_lines(output, places):
    """Every command that a fix names, with what stands in capitals filled in; without those that nothing fills."""
    lines = []
    for quoted in re.findall(r"`(llmtune [^`]+)`", " ".join(re.findall(r"^ *fix: (.*)$", output, re.MULTILINE))):
        words = shlex.split(quoted)[1:]
        # What is to be written must not be there yet.
        new = [before in ("-o", "--output") and word in CAPITAL_FOLDERS for before, word in pairwise(["", *words])]
        words = [places["NEW"] if is_new else places.get(word, word) for word, is_new in zip(words, new, strict=True)]
        if not any(re.search(r"\b[A-Z]{2,}\b|\.\.\.", word) for word in words if word not in places.values()):
            lines.append(words)
    return lines


def _config_words(typed):
    """The configs and settings among the words of a command line."""
    words, pairs = [], list(zip(typed, [*typed[1:], ""], strict=True))
    for word, following in pairs:
        if word in ("-c", "--config"):
            words += [word, following]
        elif word.startswith("--config=") or re.match(r"[a-z_]+(\.[a-z_]+)*=", word):
            words.append(word)
    return words


def _refused_command(text):
    words = [word for word in shlex.split(text)[1:] if word != "..."]
    names = [row.words for row in COMMANDS]
    if not words or words[0].startswith("-") or CAPITALS.fullmatch(words[0]):
        return []
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in names:
            given = [word.split("=")[0] for word in words[length:] if word.startswith("--")]
            return [f"`{option}` is no option of `llmtune {name}`" for option in given if option not in _options(name)]
    groups = {name.split()[0] for name in names if " " in name}
    return [] if words[0] in groups and words[1:] in ([], ["--help"]) else [f"there is no command `{text}`"]


def _options(name):
    command = build()
    for word in name.split():
        command = command.get_command(None, word) if word != name else command.get_command(None, name)
        if command is None:
            return set()
    return {"--help", *(word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts))}


def _refused_setting(key, value):
    if key not in LEAVES:
        return [f"there is no key `{key}`"]
    if value in ("...", "…") or CAPITALS.search(value):
        return []
    inner = value
    for name in reversed(key.split(".")[1:]):
        inner = f"{{{name}: {inner}}}"
    try:
        parse_config(f"{key.split('.')[0]}: {inner}")
    except ConfigError as error:
        # A setting that needs another one beside it is a right answer to the config that it is given for.
        return [
            str(row) for row in error.problems if re.search(r"unknown|must be|must have|not a config key", row.problem)
        ]
    return []


def written_fixes():
    """Every fix that stands in the package as a text, by place; values that are filled in are holes."""
    found = {f"CONTRADICTIONS {row.keys}": row.fix for row in CONTRADICTIONS}
    found |= {f"NOT_HERE {name}": fix for name, (_, fix) in NOT_HERE.items()}
    package = Path(llmtune.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for value in _fixes_of(node):
                text = _text(value)
                if text:
                    found[f"{path.relative_to(package)}:{value.lineno}"] = text
    return found


def _fixes_of(node):
    if isinstance(node, ast.keyword) and node.arg == "fix":
        return [node.value]
    if isinstance(node, ast.Assign) and any(isinstance(name, ast.Name) and name.id == "fix" for name in node.targets):
        return [node.value]
    is_error = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error")
    return [node.args[2]] if is_error and len(node.args) == 3 else []


def _text(node):
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return ""
