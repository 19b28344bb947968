"""`llmtune init`: a commented config for the user's rows and device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune import durable
from llmtune.cli.data import Survey, survey
from llmtune.cli.options import NoCuda, TrustRemoteCode
from llmtune.common.decisions import Decision
from llmtune.common.text import print_line
from llmtune.config.dump import value_text
from llmtune.config.layers import load_config, parse_config
from llmtune.errors import DataError, UsageError

if TYPE_CHECKING:
    from llmtune.plan.hardware import Target

__all__ = ["init"]

EXAMPLE = "example:records/train"
MODEL = "smollm2-135m-instruct"
METHODS = ("dpo", "kto", "classification", "sft")
"""Tried in this order: rows that judge answers are also rows with answers, and those with labels also have texts."""
ROUND_TO = 64
"""Tokens to a multiple of which the longest row is rounded up."""


def init(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Your rows: a file, a folder, a glob, or a source as in a config (`{path: FILE, columns: ...}`); rows "
            "of ours when not given.",
        ),
    ] = EXAMPLE,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Write the config here.")] = Path(
        "llmtune.yaml"
    ),
    model: Annotated[str, typer.Option("--model", "-m", help="A name, a folder, a .gguf file, a hub id.")] = MODEL,
    no_cuda: NoCuda = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Look at your rows and this device, and write a commented config that trains."""
    if output.exists():
        raise UsageError(f"`{output}` exists already", "--output", "choose another name, or move it away")
    method, found = _look(file, model, trust_remote_code=trust_remote_code)
    from llmtune.data.dataset.make_dataset import raise_problems
    from llmtune.plan.hardware import find_target

    raise_problems(found.data)
    target = find_target(None, no_cuda=no_cuda)
    choices = list(_choices(file, model, method, found, target))
    text = _yaml(file, choices)
    parse_config(text, str(output))  # what is written is a config
    durable.write_text(output, text)
    for choice in choices:
        if choice.reason:
            print_line(f"{choice.key}: {value_text(choice.value)} ({choice.reason})")
    print_line(f"written to {output}; next: `llmtune plan --config {output}`, `llmtune train --config {output}`")


def _look(file: str, model: str, *, trust_remote_code: bool) -> tuple[str, Survey]:
    """The first method that these rows are for, and what its examples are like."""
    from llmtune.data.dataset.make_dataset import raise_problems

    refused: DataError | None = None
    for method in METHODS:
        overrides = {
            "data.train": _sources(file),
            "model.name": model,
            "objective.method": method,
            # A cut row still counts as a long one, and the longest decide the length.
            "data.overlong": "truncate_right",
        }
        texts = [f"{key}={value_text(value)}" for key, value in overrides.items()]
        try:
            found = survey(load_config(None, overrides=texts, environ={}), trust_remote_code=trust_remote_code)
            if len(found.data.train):
                return method, found
            raise_problems(found.data)
        except DataError as error:
            refused = error
    assert refused is not None
    problem, where, fix = refused.problems[0]
    named = re.search(r"`(columns: \{.*?\})`", fix or "")
    if named is not None and len(refused.problems) == 1:
        refused = DataError(problem, where, f"`llmtune init '{{path: {file}, {named[1]}}}'`, or {fix}")
    raise refused


def _sources(file: str) -> tuple[object, ...]:
    """The value of `data.train` for FILE, which may be a source as it stands in a config."""
    if not file.startswith("{"):
        return (file,)
    return load_config(None, overrides=[f"data.train=[{file}]"], environ={}).config.data.train


def _choices(file: str, model: str, method: str, found: Survey, target: Target) -> Iterator[Decision]:
    lengths = found.data.train.lengths
    rows = len(lengths) // (2 if method == "dpo" else 1)
    limit = found.resolved.config.data.max_length
    longest = int(lengths.max()) if len(lengths) else limit
    form = next((d.value for d in found.data.decisions if d.key == "data.format"), "auto")
    on_gpu = target.kind == "cuda"
    yield Decision("run.name", "{model}-{config}-{timestamp}", "")
    yield Decision("model.name", model, "`llmtune list-models` lists others; a folder or a hub id works too")
    yield Decision("adapter.method", "lora", "small matrices beside the frozen model: little memory, a small file")
    yield Decision("adapter.r", 16, "the rank; more for much new to learn")
    yield Decision("data.train", _sources(file), f"{rows:,} {'row' if rows == 1 else 'rows'} of the format {form}")
    if rows >= 50:
        yield Decision("data.test_size", 0.1, "a tenth of the rows is held out and measured")
    if longest >= limit:
        yield Decision("data.max_length", limit, f"{int((lengths >= limit).sum()):,} of the rows are as long or longer")
        if form == "text":
            yield Decision("data.overlong", "split", "longer texts become several")
        else:
            yield Decision("data.overlong", "truncate_right", "what is longer is cut; `llmtune data report` names it")
    else:
        length = min(-(-longest // ROUND_TO) * ROUND_TO, limit)
        yield Decision("data.max_length", length, f"the longest row has {longest:,} tokens")
    if method == "sft" and len(lengths) and float(lengths.mean()) * 3 < longest:
        yield Decision("data.packing", "best_fit", f"most rows are short: {lengths.mean():.0f} tokens on average")
    if method != "sft":
        said = "a label to each text" if method == "classification" else "rows that judge answers"
        yield Decision("objective.method", method, said)
    yield Decision("training.epochs", 3 if rows < 2000 else 1, f"passes over {rows:,} {'row' if rows == 1 else 'rows'}")
    if on_gpu:
        yield Decision("training.batch_size", "auto", f"as many rows at once as fit on {target.name}")
    else:
        yield Decision("training.batch_size", 4, f"rows at once on {target.name}")
    yield Decision("training.lr_schedule", "cosine", "from the peak to 0 along a cosine")
    if rows >= 400:  # of a few steps, warm-up would waste the first one at a rate of 0
        yield Decision("training.warmup_ratio", 0.03, "the first 3 % of the steps rise to the peak")
    if rows >= 50:
        yield Decision("evaluation.every_epochs", 0.5, "held-out loss twice an epoch")


def _yaml(file: str, choices: list[Decision]) -> str:
    lines = [f"# Made by `llmtune init {file}`. Every key: `llmtune config show --commented`."]
    section = ""
    for key, value, reason in choices:
        name, _, leaf = key.partition(".")
        if name != section:
            lines += ["", f"{name}:"]
            section = name
        lines.append(f"  {leaf}: {value_text(value)}" + (f"  # {reason}" if reason else ""))
    return "\n".join(lines) + "\n"
