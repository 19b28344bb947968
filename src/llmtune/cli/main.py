"""`llmtune`: the program, and the one place where errors become messages and exit codes; its table is in `commands`."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from llmtune.cli.commands import COMMANDS, GROUPS, PANELS, Command
from llmtune.cli.failure import report_crash, report_error
from llmtune.cli.process import check_arguments, escape_unencodable_output, forbid_telemetry, open_closed_streams
from llmtune.cli.usage import usage_error
from llmtune.common.environment import go_offline
from llmtune.common.text import print_line
from llmtune.errors import LlmtuneError, MachineError, UsageError
from llmtune.runs.signals import signals_as_errors
from llmtune.version import __version__

__all__ = ["COMMANDS", "Command", "build", "main"]


Click = Any
"""A command, context or parameter of click, or of typer's copy of click: that depends on the version of typer."""


class LazyGroup(TyperGroup):
    """A group of commands from the table, each imported when it is called."""

    rows: tuple[Command, ...] = ()
    prefix = ""

    def names(self) -> list[str]:
        """Return the words that may follow, in the order of the table."""
        return list(dict.fromkeys(row.words.removeprefix(self.prefix).split()[0] for row in self.rows))

    def list_commands(self, ctx: Click) -> list[str]:  # noqa: ARG002
        """Return the names of the commands, in the order of the table."""
        return self.names()

    def get_command(self, ctx: Click, cmd_name: str) -> Click:  # noqa: ARG002
        """Return the command of that name, importing its module; None where there is none."""
        words = self.prefix + cmd_name
        for row in self.rows:
            if row.words == words:
                return _load(row)
        inner = tuple(row for row in self.rows if row.words.startswith(words + " "))
        return _group(words, inner) if inner else None

    def parse_args(self, ctx: Click, args: list[str]) -> list[str]:
        """Answer a bare `llmtune` or `llmtune config` with its help."""
        # Without this a bare group would be a usage error, and the help is what such a user needs.
        unparsed: list[str] = super().parse_args(ctx, args or ["--help"])
        return unparsed

    def resolve_command(self, ctx: Click, args: list[str]) -> Click:
        """Return the command that the arguments begin with.

        Raises:
            UsageError: there is none; names the nearest one.
        """
        name = args[0]
        # Before click looks, which would answer without the nearest name.
        if not name.startswith("-") and name not in self.names():
            raise unknown_command(self.prefix, name, self.names())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Click, formatter: Click) -> None:  # noqa: ARG002
        """Write the help lines from the table, under their headings."""
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
        for name in self.names():
            words = self.prefix + name
            row = next(row for row in self.rows if row.words == words or row.words.startswith(words + " "))
            panels[row.panel].append((name, row.help if row.words == words else GROUPS[words]))
        for panel, lines in panels.items():
            if not lines:
                continue
            with formatter.section(panel):
                formatter.write_dl(lines)


MAY_BE_EMPTY = ("prompts", "system", "overrides")
"""Parameters of commands of which an empty text is a value, or has a message of its own."""
MAY_BE_BLANK = ("stop",)
"""Parameters of which spaces and line ends are a value."""


class StrictCommand(TyperCommand):
    """A command that refuses what the parser lets pass: options given twice, and values that are empty."""

    def parse_args(self, ctx: Click, args: list[str]) -> list[str]:
        """Parse the arguments. Raises UsageError for a repeated option that takes one value, and for an empty value."""
        # A first parsing only for the order of options and for empty texts, which the result no longer holds.
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            is_single = parameter.param_type_name == "option" and not (
                parameter.multiple or getattr(parameter, "is_flag", False)
            )
            if is_single and order.count(parameter) > 1:
                raise UsageError(f"`{parameter.opts[0]}` is given twice", "command line", "give it once")
            value = given.get(parameter.name)
            texts = value if isinstance(value, (list, tuple)) else [value]
            # An empty path would be the working folder, and an empty choice none at all.
            blank = [text for text in texts if isinstance(text, str) and not text.strip()]
            refused = [text for text in blank if not text or parameter.name not in MAY_BE_BLANK]
            if refused and parameter.name not in MAY_BE_EMPTY:
                name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
                fix = "give it a value, or leave it out; a variable of the shell may be unset"
                raise UsageError(f"the value of `{name or parameter.name}` is empty", "command line", fix)
        unparsed: list[str] = super().parse_args(ctx, args)
        return unparsed


def unknown_command(prefix: str, name: str, names: Sequence[str]) -> UsageError:
    """Return the error for a command that does not exist, with the nearest of `names`."""
    in_a_group = [row.words for row in COMMANDS if row.words.split()[-1] == name]
    nearest = in_a_group or [prefix + match for match in difflib.get_close_matches(name, names, n=1, cutoff=0.6)]
    fix = f"did you mean `llmtune {nearest[0]}`?" if nearest else f"`llmtune {prefix}--help` lists the commands"
    return UsageError(f"unknown command `{prefix}{name}`", "command line", fix)


def _group(words: str, rows: tuple[Command, ...]) -> Click:
    help_text = (
        GROUPS[words] if words else "Fine-tune a language model from one config, with training that can be checked."
    )
    group_class = type("Group", (LazyGroup,), {"rows": rows, "prefix": f"{words} " if words else ""})
    app = typer.Typer(
        cls=group_class,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=_CONTEXT,
    )
    callback = _top if not words else _inner
    app.callback(help=help_text)(callback)
    return typer.main.get_command(app)


def _load(row: Command) -> Click:
    module_name, _, function_name = row.target.partition(":")
    function = getattr(importlib.import_module(f"llmtune.cli.{module_name}"), function_name)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    # `\b` keeps the lines as they are.
    examples = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in row.examples)
    app.command(name=row.words.split()[-1], cls=StrictCommand, context_settings=_CONTEXT, epilog=examples)(function)
    command = typer.main.get_command(app)
    names = {option for parameter in command.params for option in parameter.opts}
    for parameter in _switches_everywhere():
        # A command that has the option itself keeps its own.
        if not names & set(parameter.opts):
            command.params.append(parameter)
    return command


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}
_OFFLINE = "Make no connection; use only what is on this machine."
_DEBUG = "Show the traceback of an error."


def _switches_everywhere() -> list[Click]:
    """The options that every command takes; `main` acts on them before parsing, so no function has them."""

    def switches(
        offline: bool = typer.Option(False, "--offline", help=_OFFLINE),
        debug: bool = typer.Option(False, "--debug", help=_DEBUG),
    ) -> None:
        pass

    app = typer.Typer(add_completion=False)
    app.command()(switches)
    parameters: list[Click] = typer.main.get_command(app).params
    for parameter in parameters:
        parameter.expose_value = False
    return parameters


def _show_version(is_given: bool) -> None:
    if is_given:
        print(f"llmtune {__version__}")
        raise typer.Exit


def _top(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_show_version, is_eager=True),
    offline: bool = typer.Option(False, "--offline", help=_OFFLINE),
    debug: bool = typer.Option(False, "--debug", help=_DEBUG),
) -> None:
    """Both switches act before anything is parsed; they are here for the help."""


def _inner() -> None:
    """Groups have no options of their own."""


def build(commands: tuple[Command, ...] = COMMANDS) -> Click:
    """Return the program as a command object."""
    assert all(words.split()[0] in GROUPS for words in (row.words for row in commands) if " " in words), (
        "a group needs its line in GROUPS"
    )
    return _group("", commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run llmtune; always ends in `SystemExit` with one of the documented exit codes."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # After `--` every word is data: a prompt may be `--offline`.
    before_dashes = words[: words.index("--")] if "--" in words else words
    open_closed_streams()
    escape_unencodable_output()
    forbid_telemetry()
    if "_LLMTUNE_COMPLETE" in os.environ:
        from llmtune.cli.completion import answer_shell

        sys.exit(answer_shell(build()))
    if "--offline" in before_dashes:
        go_offline()
    code = run(words, debug="--debug" in before_dashes)
    _flush_output()
    sys.exit(code)


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code; every failure becomes one message on stderr."""
    try:
        check_arguments(arguments)
        with signals_as_errors():
            outcome: object
            try:
                # Not by `program.main`, which prints messages and exits by itself.
                with build().make_context("llmtune", list(arguments), obj=tuple(arguments)) as context:
                    outcome = context.command.invoke(context)
            except typer.Exit as end:
                outcome = end.exit_code
        # bool is an int: a command that returned False has not asked for exit code 0.
        code = outcome if isinstance(outcome, int) and not isinstance(outcome, bool) else 0
        if sys.stdout is not None:
            # Here, where a closed pipe is still caught, and not while Python ends.
            sys.stdout.flush()
    except LlmtuneError as error:
        code = report_error(error, debug=debug)
    except (KeyboardInterrupt, typer.Abort):
        print_line("stopped")
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has ended (`llmtune ... | head`).
        _discard_output()
        code = 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001 - the one place where anything becomes a message and an exit code
        if isinstance(error, _CLICK_ERROR):
            code = report_error(usage_error(error, arguments, (row.words for row in COMMANDS)), debug=debug)
        # Not our bug: the machine is full, and a crash file would hide that.
        elif isinstance(error, MemoryError) or getattr(error, "errno", None) in _MACHINE_ERRORS:
            _discard_output()
            code = report_error(_machine(error), debug=debug)
        else:
            code = report_crash(error, arguments, debug=debug)
    return code


_CLICK_ERROR = typer.BadParameter.__mro__[2]  # click's or typer's own copy of it
assert _CLICK_ERROR.__name__ == "ClickException"
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def _flush_output() -> None:
    """Flush both streams; discard the output of one that is closed, or Python would exit with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _discard_output(stream)


def _discard_output(stream: TextIO | None = None) -> None:
    """Point stdout (or another stream) at /dev/null, so that buffered text cannot fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def _machine(error: Exception) -> LlmtuneError:
    if isinstance(error, OSError):
        where = str(error.filename) if error.filename else "standard output"
        return MachineError(
            f"the machine refuses: {error.strerror}",
            where,
            "make room or choose another place, then run the same command again",
        )
    return MachineError(
        "the memory is used up", "this machine", "`llmtune plan` says what a run needs and what to change"
    )
