"""Other toolkits' names for our keys: how a key of theirs is read, each with one line that says the name used here.

The tables are in three files: `alias_names` holds names with the same value, `alias_values` names whose values are
written otherwise here, `alias_refusals` names that have no equivalent, and what to do. A name with a dot is a key in a
section of that name. The keys of `FLAT_SECTIONS` are read as if they were written at the top of the file.
"""

from __future__ import annotations

from llmtune.config.alias_names import FLAT_SECTIONS, LORA_SECTIONS, NAMES_OF, SECTION_NAMES
from llmtune.config.alias_values import LISTS, LORA_ONLY, MANY_KEYS, SECTION_VALUES, TRANSLATIONS_TO, VALUES
from llmtune.config.document import Listing, Node, Scalar
from llmtune.config.keys import LEAVES, SECTIONS
from llmtune.config.translation import Rule, Translation, names_in

__all__ = [
    "NAMES",
    "SECTION_VALUES",
    "TRANSLATED",
    "many_keys",
    "other_names",
    "own_spelling",
    "section_prefix",
    "translation_of",
]


def translation_of(key: str) -> Translation | None:
    """Return the translation of another toolkit's key, by its whole name or by its last part inside the right section.

    None where no table has it.
    """
    section, _, leaf = key.rpartition(".")
    names = [key, key.lower()]
    if section in FLAT_SECTIONS or (section in SECTIONS and _KEYS.get(leaf, "").startswith(f"{section}.")):
        names.append(leaf)
    for name in names:
        if name in TRANSLATED:
            return TRANSLATED[name]
        if name in NAMES:
            return Rule(NAMES[name])
    return None


def section_prefix(key: str) -> str | None:
    """The prefix under which the content of another toolkit's section is read, or None where it is not one."""
    if key in FLAT_SECTIONS:
        return ""
    return key if any(name.startswith(f"{key}.") for name in (*NAMES, *TRANSLATED)) else None


def other_names(key: str) -> list[str]:
    """Return every other name of one of our keys, in the order of the tables; other toolkits' sections are left out."""
    return [name for name, target in _KEYS.items() if target == key]


def own_spelling(key: str, node: Node) -> Node | None:
    """Return a value of one of our keys as it is written here, where other toolkits write it otherwise, else None."""
    if not isinstance(node, Scalar):
        return None
    spelling = VALUES.get(key, {}).get("null" if node.is_null else node.text.lower())
    if spelling is not None:
        return Scalar(spelling, spelling == "null", node.origin)
    names = names_in(node) if key in LISTS else ()
    return Listing(names, node.origin) if names else None


def many_keys(key: str, node: Node) -> Rule | None:
    """Return the rule for a value of one of our keys that sets other keys too in other toolkits, else None."""
    rule = MANY_KEYS.get(key)
    is_known = rule is not None and isinstance(node, Scalar) and len(rule.words.get(node.text.lower(), ())) > 1
    return rule if is_known else None


NAMES: dict[str, str] = {
    **{name: key for key, names in NAMES_OF.items() for name in names.split()},
    **SECTION_NAMES,
    **{
        f"{section}.{key.rpartition('.')[2]}": key
        for section in ("architecture", "model_config")
        for key in LEAVES
        if key.startswith("model.architecture.")
    },
    **{
        f"{section}.{name}": f"adapter.{name.replace('rank', 'r')}"
        for section in LORA_SECTIONS
        for name in ("r", "rank", "alpha", "dropout", "rslora", "dora")
    },
}
"""Names of the same value, those of sections among them -> our keys."""

_LORA_NAMES = {
    **{name: key for name, key in NAMES.items() if key.startswith("adapter.")},
    **{
        f"{section}.{name}": key
        for section in LORA_SECTIONS
        for name, key in NAMES.items()
        if key.startswith("adapter.") and "." not in name
    },
}
TRANSLATED: dict[str, Translation] = {
    # A LoRA setting turns LoRA on in toolkits that have no other switch.
    **{name: Rule(key, implies={"adapter.method": "lora"}) for name, key in _LORA_NAMES.items()},
    **{name: rule for rules in TRANSLATIONS_TO.values() for name, rule in rules.items()},
    **{f"{section}.{name}": rule for section in LORA_SECTIONS for name, rule in LORA_ONLY.items()},
}
"""Names whose values are translated."""

_KEYS = {
    **{name: key for name, key in NAMES.items() if "." not in name},
    **{name: key for key, rules in TRANSLATIONS_TO.items() if key in LEAVES for name in rules if name not in SECTIONS},
}
"""Every name at the top of a file -> our key."""
