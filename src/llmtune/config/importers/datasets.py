"""Rows by name: classes of data sets, LLaMA-Factory's `dataset_info.json`, `NAME#500`, splits and fractions."""

# ruff: noqa: ARG001 - every rule of the table has the same parameters
from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmtune.config.document import Listing, Node, Origin, Scalar, from_python, shown
from llmtune.config.importers.rules import RULES, VALUE_RULES, Context, Outcome, Result, Rule, plain_text, words
from llmtune.config.importers.source import Given
from llmtune.config.importers.special import SPECIAL_RULES
from llmtune.config.importers.tables import Row
from llmtune.config.translation import Change

__all__ = ["ALL_RULES", "READS_VALUE"]


def component(context: Context, given: Given, row: Row) -> Result:
    """A class or family by name: `torchtune.datasets.alpaca_dataset`, `alpaca.load_w_system`, `chat_template:x`."""
    text = plain_text(given.node)
    spellings = dict.fromkeys((text, text.rpartition(".")[2], re.split(r"[.:]", text)[0]))
    table = dict(part.partition("=")[::2] for part in row.text.split("; "))
    name = next((name for name in spellings if name in table), None)
    if name is None and "*" not in table:
        instead = (
            ": write rows of a format of docs/data.md" if row.argument.startswith("data.") else ", and has no name here"
        )
        return Result(Outcome.NONE, f"`{shown(given.node)}` is code of {context.peer.name}{instead}")
    if name is None and not table["*"]:
        return Result(Outcome.KEPT, "", (Change(row.argument, given.node),))
    node = Scalar(name or "*", True, given.node.origin)
    return words(context, Given(given.key, node), row._replace(rule="words"))


def adam(context: Context, given: Given, row: Row) -> Result:
    """An optimizer's class; Adam adds its decay to the gradient, so it is AdamW only where the decay is 0."""
    decay = context.lookup("optimizer.weight_decay") or context.lookup("optimizer.init_args.weight_decay")
    if plain_text(given.node).rpartition(".")[2] == "adam" and decay:
        said = f"Adam with decay {decay:g} adds it to the gradient: write `training.optimizer: adamw` to decouple it"
        return Result(Outcome.NONE, said)
    return component(context, given, row)


# --- LLaMA-Factory


def llama_factory_names(context: Context, given: Given, row: Row) -> Result:
    """Names of `dataset_info.json`, which lies in `dataset_dir`: `identity,alpaca_en_demo`."""
    info, folder = _dataset_info(context)
    items = given.node.items if isinstance(given.node, Listing) else (given.node,)
    names = [name.strip() for item in items for name in shown_whole(item).split(",") if name.strip()]
    changes: list[Change] = []
    missing = []
    for index, name in enumerate(names):
        entry = info.get(name)
        is_text = context.text("stage") == "pt"
        fields = _llama_factory_fields(entry, folder, is_text) if isinstance(entry, Mapping) else None
        if fields is None:
            missing.append(name)
            fields = {"path": name}
        if context.text("max_samples"):
            fields["max_samples"] = context.text("max_samples")
        changes += _changes(f"{row.argument}[{index}]", fields, given.node.origin)
    if missing and not info:
        said = f"no dataset_info.json was found in `{context.text('dataset_dir') or 'data'}`: write the files' paths"
        return Result(Outcome.NEEDS, said, tuple(changes))
    if missing:
        said = f"{', '.join(missing)} stands in no dataset_info.json: write the file's path"
        return Result(Outcome.NEEDS, said, tuple(changes))
    return Result(Outcome.COMPUTED, f"looked up in {folder}/dataset_info.json", tuple(changes))


def _dataset_info(context: Context) -> tuple[Mapping[str, object], str]:
    folder = context.values.get("dataset_dir")
    name = shown_whole(folder) if isinstance(folder, Scalar) and not folder.is_null else "data"
    for base in context.folders:
        path = Path(base, name)
        with contextlib.suppress(OSError, ValueError):
            info = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
            if isinstance(info, dict):
                return info, str(path)
    return {}, ""


_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_PAIR = {"chosen": "chosen", "rejected": "rejected"}
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}


def _llama_factory_fields(entry: Mapping[str, object], folder: str, is_text: bool) -> dict[str, object] | None:
    """The keys of one of our sources for an entry of `dataset_info.json`; None where it names no rows.

    `is_text`: for pre-training, which reads the prompt's column alone.
    """
    columns = _texts(entry.get("columns"))
    tags = _texts(entry.get("tags"))
    is_chat = entry.get("formatting", "alpaca") in ("sharegpt", "openai")
    path = entry.get("file_name")
    fields: dict[str, object] = {"path": str(Path(folder, str(path))) if path else entry.get("hf_hub_url")}
    if not fields["path"]:
        return None
    fields |= {ours: entry[name] for name, ours in (("subset", "config"), ("split", "split")) if name in entry}
    if is_text:
        prompt = columns.get("prompt", "instruction")
        return fields | {"format": "text"} | ({"text_column": prompt} if prompt != "text" else {})
    fields["format"] = "messages" if tags.get("role_tag") == "role" else ("sharegpt" if is_chat else "alpaca")
    named: dict[str, str] = {}
    if is_chat:
        named |= {"messages": columns["messages"]} if "messages" in columns else {}
        named |= {ours: tags[tag] for ours, tag in (("role", "role_tag"), ("content", "content_tag")) if tag in tags}
        named |= {name: columns[name] for name in ("tools", "system") if columns.get(name, name) != name}
        fields["roles"] = {tags[tag]: role for tag, role in _ROLES.items() if tags.get(tag, role) != role}
    else:
        named |= {ours: columns[name] for name, ours in _ALPACA.items() if columns.get(name, ours) != ours}
    if entry.get("ranking"):
        fields["format"] = "preference"
        named |= {ours: columns[name] for name, ours in _PAIR.items() if columns.get(name, ours) != ours}
    if "kto_tag" in columns:
        fields["format"] = "unpaired"
        named |= {"label": columns["kto_tag"]} if columns["kto_tag"] not in ("label", "kto_tag") else {}
    usual = ("messages", "conversations")
    fields["columns"] = {ours: theirs for ours, theirs in named.items() if ours != theirs and theirs not in usual}
    return {name: value for name, value in fields.items() if value}


def _texts(value: object) -> dict[str, str]:
    return {str(key): str(item) for key, item in value.items()} if isinstance(value, Mapping) else {}


# --- ms-swift


_SWIFT = re.compile(r"(?P<path>[^#]*?)(?::(?P<config>[\w.,-]+))?(?:#(?P<max_samples>\d+))?")


def swift_names(context: Context, given: Given, row: Row) -> Result:
    """`NAME:SUBSET#500`: a data set, its configuration and a number of its rows (drawn at random in ms-swift)."""
    items = given.node.items if isinstance(given.node, Listing) else (given.node,)
    changes: list[Change] = []
    counted = False
    for index, item in enumerate(items):
        text, _, count = shown_whole(item).partition("#")
        match = _SWIFT.fullmatch(shown_whole(item))
        fields = {name: text for name, text in match.groupdict().items() if text} if match else {}
        if Path(text).suffix:  # a file may hold a colon
            fields = {"path": text} | ({"max_samples": count} if count.isdigit() else {})
        counted = counted or "max_samples" in fields
        changes += _changes(f"{row.argument}[{index}]", fields, given.node.origin)
    said = "`#N`: the first N rows here, N random ones in ms-swift" if counted else ""
    return Result(Outcome.COMPUTED if counted else Outcome.KEPT, said, tuple(changes))


def train_and_eval_set(context: Context, given: Given, row: Row) -> Result:
    """One data set; where the peer evaluates at all, a split is held out: the argument names the split's key."""
    changes = [Change("data.train[].path", given.node)]
    strategy = context.text("eval_strategy") or context.text("evaluation_strategy")
    if strategy in ("steps", "epoch"):
        split = context.assumed(row.argument) or "test"
        changes += _changes("data.eval[0]", {"path": shown_whole(given.node), "split": split}, given.node.origin)
    return Result(Outcome.KEPT, "", tuple(changes))


def split_fraction(context: Context, given: Given, row: Row) -> Result:
    """A fraction of the rows of one set: a slice of its split."""
    try:
        fraction = float(plain_text(given.node))
    except ValueError:
        return Result(Outcome.NONE, "it must be a number")
    if fraction == 1:
        return Result(Outcome.DROPPED, "all rows")
    base = given.key.rpartition(".")[0]
    split = context.text(f"{base}.split") or "train"
    node = Scalar(f"{split}[:{100 * fraction:g}%]", True, given.node.origin)
    said = f"{fraction:g} of the rows: the first ones here, random ones in {context.peer.name}"
    return Result(Outcome.COMPUTED, said, (Change(row.argument, node),))


def folder_of_rows(context: Context, given: Given, row: Row) -> Result:
    """A folder with train, valid and test files, of which those for validation are held out."""
    fields = {"path": shown_whole(given.node)}
    changes = [
        *_changes("data.train[0]", fields | {"split": "train"}, given.node.origin),
        *_changes("data.eval[0]", fields | {"split": row.argument}, given.node.origin),
    ]
    return Result(Outcome.COMPUTED, f"its train rows are trained, its {row.argument} rows held out", tuple(changes))


def mlx_folder(context: Context, given: Given, row: Row) -> Result:
    """As `folder`; where `hf_dataset` names rows, mlx-lm does not look here."""
    if any(key.startswith("hf_dataset") for key in context.values):
        return Result(Outcome.IGNORED, "the rows of `hf_dataset` count")
    return folder_of_rows(context, given, row)


def mlx_hub_set(context: Context, given: Given, row: Row) -> Result:
    """A data set of the hub, of which mlx-lm trains and holds out the parts that it gives no other names for."""
    changes = [Change("data.train[].path", given.node)]
    for side, split in (("train", "train[:80%]"), ("eval", "train[-10%:]")):
        changes.append(Change(f"data.{side}[].split", Scalar(split, False, given.node.origin), True))
    return Result(Outcome.KEPT, "", tuple(changes))


def mixer(context: Context, given: Given, row: Row) -> Result:
    """One entry of the alignment handbook's `dataset_mixer`: a data set, and the share of its rows that is trained."""
    index = [key for key in context.values if key.startswith("dataset_mixer.")].index(given.key)
    try:
        fraction = float(plain_text(given.node))
    except ValueError:
        return Result(Outcome.NONE, "it must be a number")
    named = context.values.get("dataset_splits")
    splits = [shown_whole(item) for item in named.items] if isinstance(named, Listing) else ["train", "test"]
    changes: list[Change] = []
    for split in splits:
        side, part = ("train", f"[:{100 * fraction:g}%]" if fraction < 1 else "") if "train" in split else ("eval", "")
        fields = {"path": given.key.removeprefix("dataset_mixer."), "split": split + part}
        changes += _changes(f"data.{side}[{index}]", fields, given.node.origin)
    return Result(Outcome.COMPUTED, "", tuple(changes))


def column(context: Context, given: Given, row: Row) -> Result:
    """The column that a field of a row is read from; the name that the format looks for anyway is no change."""
    name = row.argument.rpartition(".")[2]
    usual = {"messages": ("messages", "conversations"), "role": ("role", "from"), "content": ("content", "value")}
    if plain_text(given.node) in usual.get(name, (name,)):
        return Result(Outcome.DROPPED, "it is looked for under this name anyway")
    return Result(Outcome.KEPT, "", (Change(row.argument, given.node),))


def roles(context: Context, given: Given, row: Row) -> Result:
    """The names that a role has in a data set: `roles.assistant: [gpt, model]`."""
    role = given.name.rpartition(".")[2]
    items = given.node.items if isinstance(given.node, Listing) else (given.node,)
    known = {"user": ("user", "human"), "assistant": ("assistant", "gpt"), "system": ("system",), "tool": ("tool",)}
    names = [name for item in items if (name := shown_whole(item)) and name not in known.get(role, ())]
    if not names:
        return Result(Outcome.DROPPED, "these names are read anyway")
    word = Scalar(role, True, given.node.origin)
    return Result(Outcome.COMPUTED, "", tuple(Change(f"{row.argument}.{name}", word) for name in names))


def _changes(prefix: str, fields: Mapping[str, object], origin: Origin) -> Iterator[Change]:
    for name, value in fields.items():
        yield Change(f"{prefix}.{name}", from_python(value, origin))


def shown_whole(node: Node) -> str:
    """A single value as it is written."""
    return node.text if isinstance(node, Scalar) else ""


DATASET_RULES: dict[str, Rule] = {
    "component": component,
    "adam": adam,
    "lf-names": llama_factory_names,
    "swift-names": swift_names,
    "train-and-eval": train_and_eval_set,
    "split-fraction": split_fraction,
    "folder": folder_of_rows,
    "mlx-folder": mlx_folder,
    "mlx-hub-set": mlx_hub_set,
    "mixer": mixer,
    "column": column,
    "roles": roles,
}
ALL_RULES: dict[str, Rule] = RULES | DATASET_RULES | SPECIAL_RULES
"""Every name that a table may write -> its rule."""
READS_VALUE = (*VALUE_RULES, *DATASET_RULES.values())
"""Rules that need a value that is already there."""
