"""Refusals of the command-line parser as errors of llmtune: the value given, and the words that would have worked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmtune.config.aliases import NAMES
from llmtune.config.arguments import FLAGS
from llmtune.config.keys import LEAVES
from llmtune.errors import UsageError

__all__ = ["keys_meant_by", "usage_error"]


def usage_error(error: Any, arguments: Sequence[str], commands: Iterable[str]) -> UsageError:
    """Return click's error about `arguments` as a UsageError; `commands` are the words of every command."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    path = context.command_path if context is not None else " ".join(["llmtune", *_command_of(arguments, commands)])
    fix = f"`{path} --help` shows what it takes"
    # A list of choices comes on lines of its own, and a converter names its exception.
    problem = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    if option and context is not None and "overrides" in {parameter.name for parameter in context.command.params}:
        keys = keys_meant_by(option)
        if keys:
            text = _value_after((option,), arguments) or "VALUE"
            problem = f"no option `{option}`"
            edits = " or ".join(f"`{key}={text}`" for key in keys)
            fix = f"write {edits}: every key of the config stands without dashes"
    settings = [argument for argument in arguments if "=" in argument and argument.partition("=")[0] in LEAVES]
    if settings and problem.startswith("Got unexpected extra argument"):
        problem = f"`{path}` takes no KEY=VALUE, such as `{settings[0]}`"
        fix = f"write it into the config; {fix}"
    parameter = getattr(error, "param", None)
    value = _value_after(parameter.opts, arguments) if parameter is not None else None
    if value is not None and problem.startswith("Invalid value for") and value not in problem:
        problem = f"{problem}; it is `{value}`"
    return UsageError(problem, "command line", fix)


def keys_meant_by(option: str) -> list[str]:
    """Return the config keys that an option of another program means; empty where there is none.

    >>> keys_meant_by("--lr"), keys_meant_by("--warmup-ratio"), keys_meant_by("-m"), keys_meant_by("--colour")
    (['training.learning_rate'], ['training.warmup_ratio'], ['model.name'], [])
    """
    flags = {flag: key for key, flag in FLAGS.items()} | {
        "-m": "model.name",
        "-s": "data.max_samples",
        "-p": "tracking.project",
    }
    name = option.lstrip("-").replace("-", "_").lower()
    if option in flags:
        return [flags[option]]
    if name in LEAVES:
        return [name]
    if name in NAMES:
        return [NAMES[name]]
    return [key for key in LEAVES if key.rpartition(".")[2] == name]


def _value_after(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The value of the last of these options, given as `--name VALUE` or `--name=VALUE`."""
    last = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in names and (equals or (following is not None and not following.startswith("-"))):
            last = value if equals else following
    return last


def _command_of(arguments: Sequence[str], commands: Iterable[str]) -> list[str]:
    """The words of the command that these arguments begin with; empty where they begin with none."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    split_commands = (command.split() for command in commands)
    return next((command for command in split_commands if words[: len(command)] == command), [])
