"""Keyword arguments of the calls of a training script or notebook, read from its syntax tree. Nothing is run."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator

from llmtune.config.document import Entry, Origin, Table, Unreadable, from_python

__all__ = ["CODE", "is_code", "notebook_table", "script_table"]

CODE = "`"
"""A value that only running the script would tell is kept as its expression, with this mark before it."""

_CALLS: tuple[tuple[str, str], ...] = (
    (r"(Fast\w*Model|Fast\w+)\.from_pretrained", ""),
    (r"\w+\.get_peft_model", ""),
    (r"(\w*TrainingArguments|SFTConfig|DPOConfig|ORPOConfig|KTOConfig|CPOConfig|GRPOConfig|RewardConfig)", ""),
    (r"((?:SFT|DPO|ORPO|KTO|CPO|GRPO|Reward|Unsloth)\w*Trainer)", ""),
    (r"load_dataset", "load_dataset."),
    (r"train_on_responses_only", "train_on_responses_only."),
    (r"get_chat_template", "get_chat_template."),
)
"""Names of calls whose keywords count, and the prefix of their keys."""
_POSITIONS = {"load_dataset.": ("path", "name"), "": ("model_name",)}


def is_code(text: str) -> bool:
    """Whether a value is an expression that was not evaluated."""
    return text.startswith(CODE)


def script_table(text: str, file: str) -> Table:
    """Return the keywords of the calls of a script; empty where it has none of them, or is not Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return Table((), Origin("file", file))
    return _table([(tree, f"{file}:{{line}}")], file)


def notebook_table(text: str, file: str) -> Table:
    """Return the keywords of the calls of a notebook's code cells, in their order.

    Raises:
        Unreadable: it is not a notebook.
    """
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise Unreadable("this is not a notebook", file, "save it as .ipynb") from error
    trees = []
    for number, source in enumerate(sources, 1):
        # Commands of the notebook itself are no Python.
        plain = re.sub(r"^\s*[!%].*$", "pass", source, flags=re.MULTILINE)
        try:
            trees.append((ast.parse(plain), f"{file}:cell {number}"))
        except (SyntaxError, ValueError):
            continue
    return _table(trees, file)


def _table(trees: list[tuple[ast.Module, str]], file: str) -> Table:
    constants: dict[str, object] = {}
    entries: dict[str, Entry] = {}
    for tree, _ in trees:
        for statement in ast.walk(tree):
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                value = _value(statement.value, constants)
                if not (isinstance(value, str) and is_code(value)):
                    constants.setdefault(statement.targets[0].id, value)
    loaded: list[str] = []
    for tree, place in trees:
        for key, node, line in _keywords(tree, loaded):
            origin = Origin("file", place.format(line=line))
            value = _value(node, constants)
            # The first call counts: later ones load the model again to try it.
            entries.setdefault(key, Entry(key, from_python(value, origin), origin))
    is_training = any(key in entries for key in ("$trainer", "r", "output_dir")) and "$fast_model" in entries
    return Table(tuple(entries.values()) if is_training else (), Origin("file", file))


def _keywords(tree: ast.Module, loaded: list[str]) -> Iterator[tuple[str, ast.expr, int]]:
    """Each keyword of the calls with its key and line; `loaded` grows by each data set that is loaded."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        name = ast.unparse(call.func)
        prefix = next((prefix for pattern, prefix in _CALLS if re.fullmatch(pattern, name.split("(")[0])), None)
        if prefix is None:
            continue
        if name.startswith("Fast"):
            yield "$fast_model", ast.Constant(name), call.lineno
        if name.endswith("Trainer"):
            yield "$trainer", ast.Constant(name), call.lineno
        if name.endswith(("Config", "Arguments")):
            yield "$arguments", ast.Constant(name), call.lineno
        if prefix == "train_on_responses_only.":
            yield "$train_on_responses_only", ast.Constant(True), call.lineno
        positions = _POSITIONS.get(prefix, ()) if prefix or name.endswith("from_pretrained") else ()
        if prefix == "load_dataset.":
            # A further data set has keys of its own: the file of one and the split of another are no data set.
            text = ast.unparse(call)
            if text not in loaded:
                loaded.append(text)
            prefix = f"load_dataset[{loaded.index(text)}]." if text != loaded[0] else prefix
        for keyword, argument in zip(positions, call.args, strict=False):
            yield prefix + keyword, argument, call.lineno
        for item in call.keywords:
            if item.arg is not None:
                yield prefix + item.arg, item.value, item.value.lineno


def _value(node: ast.expr, constants: dict[str, object]) -> object:
    """The value of a literal or of a name that was set to one, else the expression as text."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return CODE + ast.unparse(node)
    return value if isinstance(value, str | int | float | bool | list | tuple | dict | None) else CODE + str(value)
