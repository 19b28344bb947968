"""Command lines of shell scripts and of fenced blocks in pages -> one table of options each. Nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

from llmtune.config.document import Entry, Listing, Node, Origin, Scalar, Table
from llmtune.config.importers.arithmetic import Unknown, evaluate
from llmtune.config.importers.tables import peer_of

__all__ = ["COMMANDS", "command_tables"]

COMMANDS: tuple[tuple[str, str], ...] = (
    (r"(swift|megatron) (sft|pt|rlhf)\b", "ms-swift"),
    (r"(?:accelerate launch|python[\d.]*|torchrun|deepspeed)\b.*?\b(swift)/cli/(sft|pt|rlhf)\.py\b", "ms-swift"),
    (r"(?:python[\d.]* -m )?trl (sft|dpo|kto|grpo|reward|rloo)\b", "trl"),
    (r"(?:llamafactory-cli|lmf) (train)\b(?=.* --)", "llama-factory"),
    (r"(?:python[\d.]* -m |python[\d.]* )?mlx_lm[. ](lora)(?:\.py)?\b", "mlx-lm"),
    (r"(?:accelerate launch|python[\d.]*|torchrun|uv run|deepspeed)\b.*?\b([\w-]+)\.py\b", "trl"),
)
"""The beginning of a command that trains (its first or last group names the method) and the peer it belongs to."""

_SCRIPTS = re.compile(r"(^|_)(sft|dpo|kto|orpo|cpo|bco|ppo|grpo|rloo|reward|gkd|online_dpo|nash_md|xpo|prm)($|_)")
_FENCE = re.compile(r"^\s*(```+|~~~+)\s*(\w*)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
_ENDS = {"|", "&&", "||", ";", "&", ">", ">>", "2>&1", "<"}
_SUBSTITUTION = re.compile(r"\$\([^()]*(?:\([^()]*\)[^()]*)*\)|`[^`]*`")
"""What the shell would put in its place: `$(expr 16 / 4)`, `$((16 / 4))`."""
_SUM = re.compile(r"\$\(\(([\w\s+*/()-]+)\)\)|\$\(\s*expr\s([\w\s+*/-]+)\)|`\s*expr\s([\w\s+*/-]+)`")


def command_tables(text: str, file: str) -> Iterator[tuple[str, Table]]:
    """Return the place and the options of every command that trains.

    `--key value` is an entry; several values are a list, none is `true`. `$command` is the method, `$peer` the toolkit,
    and variables set before the command (`NPROC_PER_NODE=4`) or exported are entries with a `$` before their name. A
    variable that the same script sets is replaced by its value, and so is arithmetic (`$((16 / 4))`).
    """
    variables: dict[str, str] = {}
    exported: dict[str, tuple[str, int]] = {}
    for line in _logical_lines(_shell_text(text)):
        words = [(_evaluated(word, variables), number) for word, number in line]
        is_export = words[0][0] == "export"
        setting = [(_ASSIGNMENT.fullmatch(word), number) for word, number in words[is_export:]]
        if all(match for match, _ in setting):
            for match, number in setting:
                assert match is not None
                variables[match[1]] = match[2]
                exported |= {match[1]: (match[2], number)} if is_export else {}
            continue
        ends = next((place for place, (word, _) in enumerate(words) if word in _ENDS), len(words))
        table = _table(words[:ends], file, exported)
        if table is not None:
            yield f"{file}:{words[0][1]}", table


def _evaluated(word: str, variables: Mapping[str, str]) -> str:
    """A word with the values of the script's own variables, and the results of its arithmetic, which has no fractions.

    >>> _evaluated("$(expr 16 / $n)", {"n": "4"}), _evaluated("$((16 / n))", {"n": "4"}), _evaluated("$(nproc)", {})
    ('4', '4', '$(nproc)')
    """

    def result(match: re.Match[str]) -> str:
        terms = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), match[1] or match[2] or match[3])
        try:
            return str(int(evaluate(terms.strip(), lambda _: None)[0]))
        except (Unknown, SyntaxError, KeyError):
            return match[0]

    return _SUM.sub(result, _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), word))


def _shell_text(text: str) -> list[tuple[str, int]]:
    """The lines with their numbers; of a page (or the docstring of a script), those in fenced blocks of shell."""
    lines = [(line, number) for number, line in enumerate(text.splitlines(), 1)]
    if not any(_FENCE.match(line) for line, _ in lines):
        return lines
    kept, language = [], None
    for line, number in lines:
        fence = _FENCE.match(line)
        if fence:
            language = None if language is not None else (fence[2].lower() or "text")
        elif language in ("bash", "sh", "shell", "console", "text"):
            kept.append((re.sub(r"^\s*[$>] ", "", line), number))
    return kept


def _logical_lines(lines: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """The words of each command with their lines: a backslash, or an open quote, goes on in the next line."""
    words: list[tuple[str, int]] = []
    pending, start = "", 0
    for raw, number in lines:
        line = raw.rstrip()
        continues = line.endswith("\\")
        text = pending + (line[:-1] if continues else line)
        start = start if pending else number
        try:
            # What stands in `$( )` is one word, whatever blanks it holds.
            whole = _SUBSTITUTION.sub(lambda match: match[0].replace(" ", "\0"), _without_comment(text))
            words += [(word.replace("\0", " "), start) for word in shlex.split(whole)]
            pending = ""
        except ValueError:  # an open quote
            pending = text + "\n" if len(text) < 4000 else ""
            continue
        if not continues:
            if words:
                yield words
            words = []
    if words:
        yield words


def _without_comment(text: str) -> str:
    """Leave out what follows a `#` that begins a word outside quotes; in `NAME#500` it begins none."""
    quote, before = "", " "
    for place, letter in enumerate(text):
        if letter == "#" and not quote and before.isspace():
            return text[:place]
        if letter in "'\"" and quote in ("", letter) and before != "\\":
            quote = "" if quote else letter
        before = letter
    return text


def _table(words: list[tuple[str, int]], file: str, exported: Mapping[str, tuple[str, int]]) -> Table | None:
    assigned = [(f"${name}", value, line) for name, (value, line) in exported.items()]
    while words and (match := _ASSIGNMENT.fullmatch(words[0][0])):
        assigned.append((f"${match[1]}", match[2], words[0][1]))
        words = words[1:]
    said = " ".join(word for word, _ in words)
    found = next(((match, peer) for pattern, peer in COMMANDS if (match := re.match(pattern, said))), None)
    if found is None:
        return None
    match, peer = found
    method = match[match.lastindex or 1]
    if "." in said[: match.end()] and peer == "trl":
        script = _SCRIPTS.search(method)
        if script is None:
            return None
        method = script[2]
    line = words[0][1]
    if peer == "ms-swift" and match[1] == "megatron":
        assigned.append(("$megatron", "true", line))
    entries: dict[str, Entry] = {}
    for key, value, at in [("$peer", peer, line), ("$command", method, line), *assigned]:
        origin = Origin("file", f"{file}:{at}")
        entries[key] = Entry(key, Scalar(value, True, origin), origin)
    for key, value, at in _options(words, file):
        entries[key] = Entry(key, value, Origin("file", f"{file}:{at}"))
    if peer == "trl" and any("." in key for key in entries) and not entries.keys() & peer_of(peer).detect.keys():
        return None  # another program whose file has such a name: TRL's options have no dots
    return Table(tuple(entries.values()), Origin("file", f"{file}:{line}"))


def _options(words: list[tuple[str, int]], file: str) -> Iterator[tuple[str, Node, int]]:
    key, line, values = "", 0, list[Scalar]()

    def finished() -> Iterator[tuple[str, Node, int]]:
        if not key:
            return
        origin = Origin("file", f"{file}:{line}")
        if not values:
            off = key.startswith("no_")
            yield key, Scalar("true", True, origin), line
            if off:
                return
        elif len(values) == 1:
            yield key, values[0], line
        else:
            yield key, Listing(tuple(values), origin), line

    for word, at in words:
        if word.startswith("--") and len(word) > 2:
            yield from finished()
            name, equals, value = word[2:].partition("=")
            key, line, values = name.replace("-", "_"), at, []
            if equals:
                values.append(Scalar(value, True, Origin("file", f"{file}:{at}")))
        elif word.endswith(".py"):  # the program that a launcher starts, and no value of the option before it
            yield from finished()
            key = ""
        elif key and word != "...":  # in pages, for what else may follow
            values.append(Scalar(word, True, Origin("file", f"{file}:{at}")))
    yield from finished()
