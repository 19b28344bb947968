"""`llmtune explain CODE`: the meaning of an exit code or a kind of error, with an example and the way out."""

from __future__ import annotations

import json
import signal
from importlib import resources
from typing import Annotated, NamedTuple

import typer

from llmtune import errors
from llmtune.errors import LlmtuneError, UsageError

__all__ = ["PAGES", "Page", "explain"]


class Page(NamedTuple):
    """An example and the next steps for one kind of error; its meaning is the docstring of its class."""

    kind: type[LlmtuneError]
    example: str
    next_steps: tuple[str, ...]


PAGES: tuple[Page, ...] = (
    Page(
        errors.UsageError,
        "unknown command `trian`",
        ("`llmtune --help` lists the commands, `llmtune COMMAND --help` what one takes",),
    ),
    Page(
        errors.ConfigError,
        "dev.yaml:14: unknown key `training.lerning_rate` (`1e-4`)",
        (
            "every problem of every file is in the one message, each with its line and the nearest key",
            "`llmtune config validate FILE` checks a file; "
            "`llmtune config show --origin` says where each value comes from",
            "`llmtune config show --commented` explains every key",
        ),
    ),
    Page(
        errors.DataError,
        "rows.jsonl:17: the row has no messages",
        (
            "`llmtune data report` says what becomes of every row",
            "`data.on_bad_row: skip` skips and counts rows that cannot be used, "
            "`data.overlong` says what happens to long ones",
        ),
    ),
    Page(
        errors.ModelError,
        "no model `smolm2-135m` is known, and no such folder or file exists",
        ("`llmtune list-models` lists the names; a folder, a .gguf file or a hub id works too",),
    ),
    Page(
        errors.TokenizerError,
        "the tokenizer has no chat template",
        ("set `model.chat_template` to a file or a shipped name, or `model.tokenizer` to another tokenizer",),
    ),
    Page(
        errors.AdapterError,
        "the adapter was made for another base model",
        ("name the base it was trained on with `--base`; the adapter's adapter_config.json says which",),
    ),
    Page(
        errors.CheckpointError,
        "no checkpoint of this run can be used",
        (
            "nothing was deleted: each checkpoint that failed is set aside beside the others, "
            "and the message says what is wrong with it",
            "start again from the base with `llmtune train`, or bring a copy of the checkpoint back",
        ),
    ),
    Page(
        errors.MachineError,
        "runs/a/state.json: cannot write: No space left on device (ENOSPC)",
        (
            "make room, or name another folder with `run.output_dir`; the newest checkpoint is untouched",
            "`llmtune plan` says what memory and disk a run needs; then `llmtune resume` goes on",
        ),
    ),
    Page(
        errors.DivergedError,
        "the loss is not finite at step 120 (rows.jsonl:88)",
        (
            "lower `training.learning_rate` or lengthen the warm-up, and look at the rows that are named",
            "the last good checkpoint is named in the message; "
            "`llmtune resume RUN training.learning_rate=...` goes on from it",
        ),
    ),
    Page(
        errors.RankLostError,
        "rank 3 has not answered for 120 s",
        ("`llmtune resume` goes on from the newest checkpoint, also with another number of processes",),
    ),
    Page(
        errors.StoppedBySignal,
        "stopped by SIGTERM after step 412; saved in checkpoints/step-000412",
        ("`llmtune resume` goes on exactly there",),
    ),
)


def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="An exit code (2) or a kind of error (config).")
    ] = None,
) -> None:
    """Explain an exit code or a kind of error; without one, list them all."""
    if code is None:
        for page in PAGES:
            print(f"{_exit_code(page.kind):<6} {page.kind.kind:<10} {_summary(page.kind)}")
        return
    pages = [page for page in PAGES if code.lower() == page.kind.kind or _matches(code, page.kind)]
    if code == "0":
        print("0: everything asked for was done.")
    elif code == "1":
        print("1: a bug in llmtune. The message names a crash file; report it with that file, after reading it.")
    elif not pages:
        kinds = ", ".join(page.kind.kind for page in PAGES)
        raise UsageError(
            f"nothing is known by `{code}`",
            "command line",
            f"name an exit code (0 to 8, 128 + a signal), or one of {kinds}",
        )
    print("\n\n".join(_text(page) for page in pages), end="\n" if pages else "")


def _exit_code(kind: type[LlmtuneError]) -> str:
    return "128+n" if kind is errors.StoppedBySignal else str(kind.exit_code)


def _matches(code: str, kind: type[LlmtuneError]) -> bool:
    if not (code.isascii() and code.isdigit() and len(code) < 6) or code == "1":
        return False
    if kind is errors.StoppedBySignal:
        return int(code) - 128 in set(signal.Signals)
    return int(code) == kind.exit_code


def _summary(kind: type[LlmtuneError]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _text(page: Page) -> str:
    lines = [
        f"{page.kind.kind}: exit code {_exit_code(page.kind)}",
        "",
        _summary(page.kind),
        "",
        f"for example: {page.example}",
        "",
        "what to do:",
    ]
    lines += [f"  - {step}" for step in page.next_steps]
    cases = _cases(page.kind.kind)
    if cases:
        lines += ["", "some of the bad inputs that the tests try, and their answers:"]
    for case in cases:
        lines += ["", f"  {case['command']}", *(f"    {line}" for line in case["answer"].splitlines())]
    return "\n".join(lines)


def _cases(kind: str) -> list[dict[str, str]]:
    """Bad inputs of the tests with the answers they get; a test keeps the file up to date."""
    cases = json.loads((resources.files("llmtune.cli") / "explained.json").read_text(encoding="utf-8"))
    return [case for case in cases if case["kind"] == kind]
