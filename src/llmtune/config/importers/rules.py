"""How one value of another toolkit becomes values of ours: the rules that the tables name."""

# ruff: noqa: ARG001 - every rule of the table has the same parameters
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from llmtune.common.text import excerpt
from llmtune.config import aliases
from llmtune.config.alias_refusals import NOT_HERE, UNUSED
from llmtune.config.document import Entry, Listing, Node, Scalar, Table, from_python, shown
from llmtune.config.importers.arithmetic import Unknown, evaluate
from llmtune.config.importers.python_calls import is_code
from llmtune.config.importers.source import Given
from llmtune.config.importers.tables import Peer, Row
from llmtune.config.translation import Change

__all__ = [
    "NO_VALUE",
    "RULES",
    "VALUE_RULES",
    "Context",
    "Outcome",
    "Result",
    "Rule",
    "compute",
    "ignored",
    "is_off",
    "made",
    "none",
    "plain_text",
    "words",
    "words_of_row",
]


class Outcome(StrEnum):
    """What became of one key."""

    KEPT = "kept"
    COMPUTED = "computed"
    DROPPED = "dropped"
    NEEDS = "needs"
    NONE = "no equivalent"
    IGNORED = "did nothing"


class Result(NamedTuple):
    """What a rule makes of one value."""

    outcome: Outcome
    text: str = ""
    changes: tuple[Change, ...] = ()


@dataclass
class Context:
    """What a rule may look at beside its own value."""

    peer: Peer
    values: Mapping[str, Node]
    """Every value of the file by its key."""
    folders: tuple[str, ...] = ()
    """Folders in which a file that the config names may lie."""
    prefix: str = ""
    """What stands before the keys of the row's table, where they are read first."""

    def text(self, key: str) -> str:
        """The text of a key's value in lower case; empty where it is not set, or no single value."""
        node = self.values.get(self.prefix + key) or self.values.get(key)
        return node.text.lower() if isinstance(node, Scalar) and not node.is_null else ""

    def assumed(self, key: str) -> str:
        """The text of a key's value, or the peer's own default of it."""
        return self.text(key) or self.default(key)

    def default(self, key: str) -> str:
        """The peer's own default of a key; empty where its table does not say it."""
        assume = self.peer.assume
        return assume.get(self.prefix + key, assume.get(key, ""))

    def lookup(self, key: str) -> float | None:
        """The number under a key, or the peer's own default of it; None where the file gives something else there."""
        # Variables of a command line (`NPROC_PER_NODE=4`) have a `$` before their name.
        nodes = (self.values.get(name) for name in (self.prefix + key, key, f"${key}"))
        given = next(
            (node for node in nodes if node is not None and not (isinstance(node, Scalar) and node.is_null)), None
        )
        try:
            return float(self.default(key) if given is None else plain_text(given))
        except ValueError:
            return None


Rule = Callable[[Context, Given, Row], Result]

OFF = ("", "null", "none", "false", "no", "off", "0", "0.0", "-1", "disabled")
NO_VALUE = "not set"
REPORTS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Trackers that other toolkits call by the same name."""


def is_off(node: Node) -> bool:
    """Whether a value switches something off, or is empty."""
    if isinstance(node, Scalar):
        return node.is_null or node.text.lower() in OFF
    return not (node.items if isinstance(node, Listing) else node.entries)


def plain_text(node: Node) -> str:
    """A single value in lower case, else nothing."""
    return node.text.lower() if isinstance(node, Scalar) else ""


# --- the rules


def keep(context: Context, given: Given, row: Row) -> Result:
    """The same value under our name."""
    return Result(Outcome.KEPT, row.text, (Change(row.argument, given.node),))


def alias(context: Context, given: Given, row: Row) -> Result:
    """As the alias of that name in our own configs is read."""
    name = row.argument or given.name.rpartition(".")[2]
    translation = aliases.translation_of(name)
    assert translation is not None, f"no alias is called {name}"
    changes = tuple(translation(given.node))
    if not changes:
        return Result(Outcome.DROPPED, "it asks for what happens here anyway")
    same = len(changes) == 1 and changes[0].value is given.node
    return Result(Outcome.KEPT if same else Outcome.COMPUTED, row.text, changes)


def drop(context: Context, given: Given, row: Row) -> Result:
    """A value that changes nothing that is trained here."""
    return Result(Outcome.DROPPED, row.text or UNUSED.get(given.name.rpartition(".")[2], ""))


def ignored(context: Context, given: Given, row: Row) -> Result:
    """A key that the peer reads past."""
    return Result(Outcome.IGNORED, row.text or f"{context.peer.name} has no such key and reads past it")


def none(context: Context, given: Given, row: Row) -> Result:
    """A feature that does not exist here; nothing is lost where it is off."""
    if is_off(given.node):
        return Result(Outcome.DROPPED, "off")
    return Result(Outcome.NONE, row.text)


def needs(context: Context, given: Given, row: Row) -> Result:
    """Something that is done in another place here."""
    if is_off(given.node):
        return Result(Outcome.DROPPED, "off")
    leaf = given.name.rpartition(".")[2]
    return Result(Outcome.NEEDS, row.text or ": ".join(NOT_HERE.get(leaf, ())))


def words_of_row(row: Row) -> dict[str, str]:
    """The words of a row of the rule `words`: `a=b; c=d`, in lower case."""
    return (
        dict(part.partition("=")[::2] for part in row.text.split("; "))
        if row.rule in ("words", "holds", "component", "adam")
        else {}
    )


def words(context: Context, given: Given, row: Row) -> Result:
    """Each word has its translation.

    `word=value` gives the row's own key, `word=key:value+key:value` others, `word=` none. `word=!text` is no
    equivalent, `word=?text` is done by hand. `*` stands for every other word, which `*=` keeps as it is. A value with
    `?` behind it gives way.
    """
    table = words_of_row(row)
    text = shown(given.node).lower() if is_code(shown(given.node)) else plain_text(given.node)
    if isinstance(given.node, Listing) and len(given.node.items) == 1:
        text = plain_text(given.node.items[0])
    value = table.get(text, table.get("*"))
    if value is None:
        known = ", ".join(f"`{word}`" for word in table if word != "*")
        return Result(Outcome.NONE, f"`{excerpt(shown(given.node))}` does not exist here (only {known})")
    if value.startswith(("!", "?")):
        return Result(Outcome.NONE if value.startswith("!") else Outcome.NEEDS, value[1:])
    if text not in table and not value:
        return Result(Outcome.KEPT, "", (Change(row.argument, given.node),))
    if not value:
        return Result(Outcome.DROPPED, "it asks for what happens here anyway")
    pairs = [part.partition(":") for part in value.split("+")] if ":" in value else [(row.argument, ":", value)]
    changes = tuple(
        Change(key, made(word.rstrip("?"), given), text in OFF or word.endswith("?")) for key, _, word in pairs
    )
    same = len(pairs) == 1 and pairs[0][2].rstrip("?") == text
    return Result(Outcome.KEPT if same else Outcome.COMPUTED, "", changes)


def made(text: str, given: Given) -> Node:
    """A value as it would stand in a config, at the place of the value it is made of; `a,b` in brackets is a list."""
    origin = given.node.origin
    if text.startswith("["):
        return Listing(tuple(Scalar(item.strip(), False, origin) for item in text[1:-1].split(",")), origin)
    return Scalar(text, True, origin)


def compute(context: Context, given: Given, row: Row) -> Result:
    """Arithmetic over the file's own keys."""
    try:
        value, said = evaluate(row.text, context.lookup)
    except Unknown as unknown:
        return Result(Outcome.NEEDS, f"`{unknown}` is needed for {row.text}: write `{row.argument}` by hand")
    same = plain_text(given.node) in (f"{value!r}", f"{value:g}")
    outcome = Outcome.KEPT if same else Outcome.COMPUTED
    return Result(outcome, "" if same else f"{said} = {value:g}", (Change(row.argument, made(f"{value!r}", given)),))


def positive(context: Context, given: Given, row: Row) -> Result:
    """A number; none or below zero stands for no limit."""
    try:
        number = float(plain_text(given.node))
    except ValueError:
        number = 1.0
    if number <= 0:
        return Result(Outcome.DROPPED, row.text or "no limit")
    return keep(context, given, row._replace(text=""))


def share(context: Context, given: Given, row: Row) -> Result:
    """A number of rows or a fraction of them: a whole set is no share."""
    return (
        Result(Outcome.DROPPED, "the whole set")
        if plain_text(given.node) in ("1", "1.0")
        else keep(context, given, row)
    )


def only_with(context: Context, given: Given, row: Row) -> Result:
    """A key that acts only where another has a value: `KEY=VALUE TARGET`."""
    condition, _, target = row.argument.partition(" ")
    key, _, value = condition.partition("=")
    if context.assumed(key) != value:
        return Result(Outcome.IGNORED, row.text or f"nothing reads it without `{key}: {value}`")
    return keep(context, given, row._replace(argument=target, text=""))


def unless(context: Context, given: Given, row: Row) -> Result:
    """A key that another one overrides: `KEY TARGET`."""
    key, _, target = row.argument.partition(" ")
    node = context.values.get(key)
    if node is not None and not is_off(node):
        return Result(Outcome.IGNORED, row.text)
    return keep(context, given, row._replace(argument=target, text=""))


def last_names(context: Context, given: Given, row: Row) -> Result:
    """Names of layers: `self_attn.q_proj` and `*.q_proj` are found by their end."""
    items = given.node.items if isinstance(given.node, Listing) else (given.node,)
    written = [shown(item) for item in items if isinstance(item, Scalar)]
    renamed = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    found = [renamed.get(name, name) for name in (name.strip("*").rpartition(".")[2] for name in written)]
    if not found and row.argument == "adapter.exclude_modules":
        return Result(Outcome.DROPPED, "off")
    if any("*" in name.removeprefix("*.") for name in written):  # `*_proj`: an ending is a whole name here
        parts = (re.escape(name.removeprefix("*.")).replace(r"\*", ".*") for name in written)
        return Result(
            Outcome.COMPUTED, "", (Change(row.argument, made("|".join(rf"(.*\.)?{part}" for part in parts), given)),)
        )
    if found == ["all-linear"] or not found:
        return Result(Outcome.KEPT, "", (Change(row.argument, made("all-linear", given)),))
    return Result(Outcome.COMPUTED, "", (Change(row.argument, made(f"[{', '.join(found)}]", given)),))


def chat_template(context: Context, given: Given, row: Row) -> Result:
    """Templates by name belong to the peer; the one of the tokenizer is used here, and a file is a file here too."""
    text = plain_text(given.node)
    if text in ("tokenizer_default", "tokenizer_default_fallback_chatml", "default"):
        return Result(Outcome.DROPPED, "the template of the tokenizer is used here too")
    if text == "chatml":
        return Result(Outcome.KEPT, "", (Change("model.chat_template", given.node),))
    if text.endswith((".jinja", ".j2", ".txt")):
        return Result(Outcome.KEPT, "", (Change("model.chat_template", made(shown(given.node), given)),))
    if "{%" in text or "{{" in text:
        return Result(Outcome.NEEDS, "write this template to a file and name that with `model.chat_template`")
    thinks = (Change("data.template_args", _no_thinking(given)),) if text.endswith("_nothink") else ()
    said = "the tokenizer's own template is used here: compare them with `llmtune data preview`"
    return Result(Outcome.COMPUTED if thinks else Outcome.NEEDS, said, thinks)


def _no_thinking(given: Given) -> Node:
    return from_python({"enable_thinking": False}, given.node.origin)


def template_args(context: Context, given: Given, row: Row) -> Result:
    """One argument of the chat template: the key's last name."""
    entry = Entry(given.name.rpartition(".")[2], given.node, given.node.origin)
    return Result(Outcome.COMPUTED, "", (Change("data.template_args", Table((entry,), given.node.origin)),))


def pattern(context: Context, given: Given, row: Row) -> Result:
    """One entry of a mapping: what stands behind the row's own name."""
    name = given.key.removeprefix(row.key.rstrip("*"))
    if isinstance(given.node, Table) or not name:
        return Result(Outcome.DROPPED, "off") if is_off(given.node) else keep(context, given, row)
    table = Table((Entry(name, given.node, given.node.origin),), given.node.origin)
    return Result(Outcome.KEPT, row.text, (Change(row.argument, table),))


def reference(context: Context, given: Given, row: Row) -> Result:
    """A second model that answers are compared with; the one that training starts from is the reference anyway."""
    trained = [key for key, found in context.peer.rows.items() if found.argument == "model.name"]
    if plain_text(given.node) in (context.text(key) for key in trained):
        return Result(Outcome.DROPPED, "training starts from it, so it is the reference anyway")
    changes = (Change("objective.reference_model", given.node), Change("objective.reference", made("model", given)))
    return Result(Outcome.COMPUTED, "", changes)


def devices(context: Context, given: Given, row: Row) -> Result:
    """A number of processes: chosen where the command runs; the step of all of them is the arithmetic's."""
    if plain_text(given.node) in ("1", "auto"):
        return Result(Outcome.DROPPED, "one process, as here")
    return Result(Outcome.NEEDS, f"start it with `llmtune train --devices {shown(given.node)}`")


def holds(context: Context, given: Given, row: Row) -> Result:
    """As `words`, for the first word that the value holds."""
    text = plain_text(given.node)
    word = next((word for word in words_of_row(row) if word in text), "*")
    return words(context, Given(given.key, Scalar(word, True, given.node.origin)), row._replace(rule="words"))


def trackers(context: Context, given: Given, row: Row) -> Result:
    """Trackers by name, one or several; one that does not exist here is named, and changes nothing that is trained."""
    items = given.node.items if isinstance(given.node, Listing) else (given.node,)
    names = [name for item in items for name in re.split(r"[\s,`\"']+", plain_text(item)) if name not in ("", "none")]
    known = [name for name in REPORTS if name in names or "all" in names]
    others = [name for name in names if name not in (*REPORTS, "all", "false", "true")]
    said = f"{', '.join(others)} is no tracker here; nothing that is trained changes" if others else ""
    node = made(f"[{', '.join(('console', 'jsonl', *known))}]", given)
    return Result(Outcome.COMPUTED, said, (Change("tracking.trackers", node),))


def each_of(context: Context, given: Given, row: Row) -> Result:
    """A list in which every item must hold one of the argument's words; then it changes nothing here."""
    items = given.node.items if isinstance(given.node, Listing) else (given.node,)
    others = [shown(item) for item in items if not any(word in shown(item) for word in row.argument.split())]
    if others:
        return Result(Outcome.NONE, f"{', '.join(others)} does not exist here")
    return Result(Outcome.DROPPED, row.text)


RULES: dict[str, Rule] = {
    "keep": keep,
    "alias": alias,
    "words": words,
    "compute": compute,
    "positive": positive,
    "share": share,
    "only-with": only_with,
    "unless": unless,
    "last-names": last_names,
    "chat-template": chat_template,
    "template-args": template_args,
    "pattern": pattern,
    "reference": reference,
    "devices": devices,
    "each-of": each_of,
    "trackers": trackers,
    "holds": holds,
    "drop": drop,
    "none": none,
    "needs": needs,
    "ignored": ignored,
}
"""Name in a table -> rule; `DATASET_RULES` has those about rows, `SPECIAL_RULES` those of one toolkit."""

VALUE_RULES = (
    *(keep, alias, words, compute, positive, share, only_with, last_names, chat_template, template_args, pattern),
    *(reference, trackers),
)
"""Rules that read the value, and so cannot read one that is not there yet."""
