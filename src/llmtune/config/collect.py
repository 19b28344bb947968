"""The tree of one layer -> settings by dotted key, with every problem and every note of that layer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_origin

from llmtune.common.secrets import SECRET_NAME, SECRET_SHAPES
from llmtune.common.text import excerpt
from llmtune.config import aliases, convert
from llmtune.config.alias_refusals import NOT_HERE, REFUSED_VALUES, UNUSED
from llmtune.config.checks import range_fix, range_problem
from llmtune.config.document import Entry, Listing, Node, Origin, Scalar, Table, shown
from llmtune.config.keys import FORMER_KEYS, LEAVES, SECTIONS, default_of
from llmtune.config.paths import path_problem
from llmtune.config.translation import NO, Translation
from llmtune.errors import Problem

__all__ = ["Findings", "Setting", "collect", "nearest_key"]

_FIX_SECRET = "remove it; log in with the tool's own login, or set its environment variable"  # noqa: S105 - advice, not a secret


@dataclass
class Setting:
    """The value that one layer gives to a key; `written` is the key as it is written there."""

    value: Any
    origin: Origin
    written: str
    weak: bool = False


MAX_PROBLEMS = 100
"""Problems that are shown; a data file given as a config has millions."""


@dataclass
class Findings:
    """Problems and notes of all layers; `failed` holds the keys whose value could not be used."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    hidden: int = 0
    """Problems beyond `MAX_PROBLEMS`, which are not shown."""
    toolkit: Problem | None = None
    """What the named file looks like, where it is another toolkit's and each of its keys is known here too."""

    @property
    def is_full(self) -> bool:
        """Whether another problem would only be counted."""
        return len(self.problems) >= MAX_PROBLEMS

    def problem(self, problem: str, where: str | None, fix: str | None = None) -> None:
        """Add one problem, once."""
        row = Problem(problem, where, fix)
        if self.is_full:
            self.hidden += 1
        elif row not in self.problems:
            self.problems.append(row)

    def note(self, note: str) -> None:
        """Add one note, once."""
        if len(self.notes) < MAX_PROBLEMS and note not in self.notes:
            self.notes.append(note)


def collect(table: Table, findings: Findings) -> dict[str, Setting]:
    """Read one layer: every known key with its converted value; everything else becomes a problem in `findings`."""
    reader = _Reader(findings)
    reader.walk(table, "")
    reader.join_betas()
    reader.join_sources()
    return reader.settings


class _Reader:
    """Walks one tree and collects its settings.

    `parts` are values of a list that another toolkit writes one by one: Adam's betas, a data set's split.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.settings: dict[str, Setting] = {}
        self.parts: dict[str, Setting] = {}

    def walk(self, table: Table, prefix: str) -> None:
        """Take every key of a table; `prefix` is the dotted name of its section."""
        for entry in table.entries:
            key = f"{prefix}.{entry.key}" if prefix else entry.key
            # `extends` was followed before; `x-` keys are the user's own place for YAML anchors.
            if key == "extends" or (not prefix and entry.key.startswith("x-")):
                continue
            self.entry(key, entry)

    def entry(self, key: str, entry: Entry) -> None:
        """Read one key: one of ours, a section, a secret, another toolkit's, or unknown. Problems go to `findings`."""
        value, origin = entry.value, entry.origin
        leaf = key.rpartition(".")[2]
        # The order of these tests decides: a known key is never taken for a secret or another toolkit's.
        if key in LEAVES and (rule := aliases.many_keys(key, value)) is not None:
            self.apply(key, rule, value, origin)
        elif key in LEAVES:
            self.settle(key, key, value, origin)
        elif key in SECTIONS:
            self.section(key, value, origin)
        elif key in FORMER_KEYS:
            self.findings.note(f"{origin.where}: `{key}` is no longer a key and is not used: {FORMER_KEYS[key]}")
        elif leaf in UNUSED and aliases.translation_of(key) is None:
            self.findings.note(f"{origin.where}: `{excerpt(key)}` is not used here: {UNUSED[leaf]}")
        elif self.findings.is_full:
            self.findings.hidden += 1
        elif SECRET_NAME.search(key) and aliases.translation_of(key) is None:
            self.findings.problem(f"`{excerpt(key)}` would keep a secret in a config", origin.where, _FIX_SECRET)
        elif leaf in NOT_HERE and _asks_for_nothing(value):
            self.findings.note(f"{origin.where}: `{excerpt(key)}: {shown(value)}` asks for what happens here anyway")
        elif leaf in NOT_HERE:
            reason, fix = NOT_HERE[leaf]
            self.findings.problem(
                f"`{excerpt(key)}` (`{shown(value)}`) is not a config key: {reason}", origin.where, fix
            )
        elif isinstance(value, Table) and (inner := aliases.section_prefix(key)) is not None:
            self.walk(value, inner)
        elif (translation := aliases.translation_of(key)) is not None:
            self.apply(key, translation, value, origin)
        else:
            self.unknown(key, value, origin)

    def section(self, key: str, value: Node, origin: Origin) -> None:
        """Read the node under a section's name: a table, nothing, or a value that another toolkit writes there."""
        if isinstance(value, Table):
            self.walk(value, key)
        elif isinstance(value, Scalar) and value.is_null:
            return
        elif key in aliases.SECTION_VALUES and (isinstance(value, Scalar) or key == "data"):
            self.apply(key, aliases.SECTION_VALUES[key], value, origin)
        else:
            fix = f"its keys are {', '.join(_leaf_names(key))}"
            self.findings.problem(f"`{key}` is a section, not a value (`{shown(value)}`)", origin.where, fix)

    def apply(self, written: str, translation: Translation, value: Node, origin: Origin) -> None:
        """Settle the changes that a translation makes of a value, and note what the key is called here."""
        try:
            changes = translation(value)
        except convert.Mismatch as mismatch:
            self.findings.problem(
                f"`{excerpt(written)}` must be {mismatch.expected}, not `{shown(mismatch.node)}`",
                origin.where,
                mismatch.fix or _fix_of_expected(mismatch.expected),
            )
            return
        for change in changes:
            if "[" in change.key:
                self.parts[change.key] = Setting(change.value, origin, written)
                self.findings.note(
                    f"{origin.where}: `{excerpt(written)}` is a part of `{change.key.partition('[')[0]}` here"
                )
                continue
            self.settle(change.key, written, change.value, origin, change.weak)
        # Only a plain renaming is told as one ("is called"); everything else shows what became of the value.
        strong = [change for change in changes if not change.weak and "[" not in change.key]
        if len(strong) == 1 and strong[0].value is value:
            self.findings.note(f"{origin.where}: `{excerpt(written)}` is called `{strong[0].key}` here")
        elif changes and not any("[" in change.key for change in changes):
            ours = " and ".join(f"`{change.key}: {shown(change.value)}`" for change in (strong or changes))
            self.findings.note(f"{origin.where}: `{excerpt(written)}: {shown(value)}` is {ours} here")
        elif not changes:
            self.findings.note(
                f"{origin.where}: `{excerpt(written)}: {shown(value)}` asks for what happens here anyway"
            )

    def settle(self, key: str, written: str, value: Node, origin: Origin, weak: bool = False) -> None:
        """Convert and check one value, and keep it unless the same layer gives the key another value."""
        if isinstance(value, Scalar):
            origin = value.origin  # a value may stand on a line below its key, or where its anchor does
        spelling = aliases.own_spelling(key, value)
        if spelling is not None:
            self.findings.note(f"{origin.where}: `{key}: {shown(value)}` is written `{shown(spelling)}` here")
            value = spelling
        if _holds_secret(value):
            # Without the value, which would end up in a log.
            self.findings.problem(f"`{excerpt(written)}` holds what looks like a secret", origin.where, _FIX_SECRET)
            self.findings.failed.add(key)
            return
        try:
            converted = convert.convert(value, LEAVES[key])
        except convert.Mismatch as mismatch:
            self.findings.failed.add(key)
            for each in (mismatch, *mismatch.others):
                self.findings.problem(*_mismatch_problem(key, written, value, each, origin))
            return
        problem = range_problem(key, converted)
        if problem is not None:
            self.findings.failed.add(key)
            said = f"`{excerpt(written)}` {problem}, not `{shown(value)}`"
            self.findings.problem(said, origin.where, range_fix(key))
            return
        unusable = path_problem(key, converted)
        if unusable is not None:
            self.findings.failed.add(key)
            self.findings.problem(f"`{excerpt(written)}` {unusable[0]}: `{shown(value)}`", origin.where, unusable[1])
            return
        self.keep(key, Setting(converted, origin, written, weak))

    def keep(self, key: str, setting: Setting) -> None:
        """Keep a setting; a weak one gives way, and two that differ are a problem."""
        before = self.settings.get(key)
        # Weak: what another toolkit's name implies beside its own key, such as LoRA from `lora_r`.
        if before is None or (before.weak and not setting.weak):
            self.settings[key] = setting
        elif setting.weak or before.value == setting.value:
            return
        else:
            self.findings.failed.add(key)
            names = f"`{excerpt(before.written)}` ({before.origin}) and `{excerpt(setting.written)}`"
            problem = f"{names} both set `{key}`, to different values"
            self.findings.problem(problem, setting.origin.where, f"keep `{key}` alone")

    def join_betas(self) -> None:
        """Join Adam's betas that are given one by one; the other one keeps its default."""
        betas = [self.parts.get(f"training.betas[{index}]") for index in (0, 1)]
        first = next((beta for beta in betas if beta is not None), None)
        if first is None:
            return
        items = [
            beta.value if beta else Scalar(str(default), True, first.origin)
            for beta, default in zip(betas, default_of("training.betas"), strict=True)
        ]
        written = " and ".join(beta.written for beta in betas if beta)
        self.settle("training.betas", written, Listing(tuple(items), first.origin), first.origin)

    def join_sources(self) -> None:
        """Put a configuration and splits that are given beside one data set into that source.

        A split for evaluation makes a second source.
        """
        for key, part in self.parts.items():
            target, _, name = key.partition("[].")
            if not name:
                continue
            train = self.settings.get("data.train")
            if train is None or len(train.value) != 1 or "data.train" in self.findings.failed:
                fix = "write `data.train: [{path: ..., " + name + ": ...}]`"
                self.findings.problem(f"`{part.written}` needs one training source beside it", part.origin.where, fix)
                continue
            try:
                changed = replace(train.value[0], **{name: convert.convert(part.value, str | None)})
            except convert.Mismatch as mismatch:
                self.findings.problem(*_mismatch_problem(part.written, part.written, part.value, mismatch, part.origin))
                continue
            if target == "data.train":
                train.value = (changed,)
            else:
                self.keep("data.eval", Setting((changed,), part.origin, part.written))

    def unknown(self, key: str, value: Node, origin: Origin) -> None:
        """Report an unknown key with the nearest known one."""
        if isinstance(value, Table) and "." not in key:
            nearest = difflib.get_close_matches(key.lower(), SECTIONS, n=1, cutoff=0.6)
            listed = ", ".join(name for name in SECTIONS if "." not in name)
            fix = f"did you mean `{nearest[0]}`?" if nearest else f"the sections are {listed}"
            self.findings.problem(f"unknown section `{excerpt(key)}`", origin.where, fix)
            return
        self.findings.problem(f"unknown key `{excerpt(key)}` (`{shown(value)}`)", origin.where, nearest_key(key))


def _fix_of_expected(expected: str) -> str:
    """The fix for a value that a translation refuses: the first one that it takes."""
    taken = re.search(r"`([^`]+)`", expected)
    return f"write `{taken[1]}`, or take it out" if taken else "take it out, or write one of those"


def _asks_for_nothing(value: Node) -> bool:
    """Whether a switch that is not there is off: `false`, `null`, 0 or empty."""
    if isinstance(value, Scalar):
        return value.is_null or value.text.lower() in (*NO, "", "none", "0.0")
    return not (value.items if isinstance(value, Listing) else value.entries)


def _holds_secret(value: Node) -> bool:
    if isinstance(value, Scalar):
        return bool(SECRET_SHAPES.search(value.text))
    inner = value.items if isinstance(value, Listing) else tuple(entry.value for entry in value.entries)
    return any(_holds_secret(item) for item in inner)


def nearest_key(key: str) -> str:
    """Return the fix for an unknown key: the known key that was probably meant.

    >>> nearest_key("training.lerning_rate")
    'did you mean `training.learning_rate`?'
    >>> nearest_key("model.learning_rate")
    '`learning_rate` stands in another section: write `training.learning_rate`'
    >>> nearest_key("data.template_args.enable_thinking")
    'a mapping is written as one value: `data.template_args={enable_thinking: ...}`'
    """
    section, _, leaf = key.lower().replace("-", "_").rpartition(".")
    if section in LEAVES and get_origin(LEAVES[section]) is Mapping:
        return f"a mapping is written as one value: `{section}={{{leaf}: ...}}`"
    if any(key.startswith(f"{name}.") for name in ("data.train", "data.eval")):
        return f"a list is written as one value: `{key[: key.index('.', 5)]}=[a.jsonl,b.jsonl]`"
    elsewhere = [name for name in LEAVES if name.rpartition(".")[2] == leaf]
    if len(elsewhere) == 1:
        return f"`{leaf}` stands in another section: write `{elsewhere[0]}`"
    if elsewhere:
        return f"`{leaf}` stands in other sections: write " + " or ".join(f"`{name}`" for name in elsewhere)
    if (joined := key.lower().replace(".", "_")) in aliases.NAMES:
        return f"write `{aliases.NAMES[joined]}`"
    if leaf in aliases.NAMES:
        return f"write `{aliases.NAMES[leaf]}`"
    best = max(LEAVES, key=lambda name: _likeness(section, leaf, name))
    # Without a section more of the name must agree: many keys of other toolkits share a word with one of ours.
    if _likeness(section, leaf, best) >= (0.62 if section else 0.72):
        return f"did you mean `{best}`?"
    other = difflib.get_close_matches(leaf, aliases.NAMES, n=1, cutoff=0.75)
    if other:
        return f"did you mean `{aliases.NAMES[other[0]]}`?"
    names = _leaf_names(section)
    return f"the keys of `{section}` are {', '.join(names)}" if names else "`llmtune config schema` lists every key"


def _leaf_names(section: str) -> list[str]:
    return [key.rpartition(".")[2] for key in LEAVES if key.rpartition(".")[0] == section]


def _likeness(section: str, leaf: str, name: str) -> float:
    own_section, _, own_leaf = name.rpartition(".")
    likeness = difflib.SequenceMatcher(None, leaf, own_leaf).ratio()
    if section and section == own_section:
        likeness += 0.15
    elif section:
        likeness += 0.1 * difflib.SequenceMatcher(None, section, own_section).ratio()
    return likeness


def _mismatch_problem(
    key: str, written: str, value: Node, mismatch: convert.Mismatch, origin: Origin
) -> tuple[str, str, str | None]:
    text = mismatch.node.text.lower() if isinstance(mismatch.node, Scalar) else ""
    known = REFUSED_VALUES.get(key, {})
    refused = next((row for pattern, row in known.items() if re.fullmatch(pattern, text)), None)
    if refused is not None:
        where = mismatch.node.origin.where or origin.where
        return f"`{excerpt(written)}: {shown(value)}` is not taken: {refused[0]}", where, refused[1]
    subject = f"`{excerpt(written)}`" if written == key else f"`{excerpt(written)}` (`{key}` here)"
    fix = mismatch.fix
    choices = re.findall(r"`([^`]+)`", mismatch.expected)
    if fix is None and isinstance(mismatch.node, Scalar) and choices:
        nearest = difflib.get_close_matches(mismatch.node.text.lower(), choices, n=1, cutoff=0.5)
        fix = f"did you mean `{nearest[0]}`?" if nearest else None
    if fix is None and re.fullmatch(r"[+-]?\d+,\d+", text):
        fix = f"write it with a point: `{key}={text.replace(',', '.')}`"
    if fix is None and key in LEAVES:
        fix = range_fix(key)
    outer = f" (in `{shown(value)}`)" if mismatch.node is not value else ""
    problem = f"{subject} must be {mismatch.expected}, not `{shown(mismatch.node)}`{outer}"
    return problem, mismatch.node.origin.where or origin.where, fix
