"""The options of `llmtune evaluate --tasks`, and how its results are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.errors import UsageError

if TYPE_CHECKING:
    from llmtune.evaluation.inference_model import InferenceModel

__all__ = ["ChatTemplate", "Limit", "Tasks", "print_tasks", "refuse_beside_tasks", "run_tasks"]

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks", metavar="NAME|FILE.yaml", help="A benchmark of lm-eval instead of rows; may be given again."
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="With --tasks: prompts are written as chats, as in training."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="With --tasks: so many documents of each.")]


def run_tasks(
    loaded: InferenceModel, tasks: Sequence[str], *, chat_template: bool, batch_size: int, limit: int | None
) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value (see `llmtune.evaluation.tasks`); a comma separates names too."""
    from llmtune.evaluation.tasks import run_tasks as run

    names = [name for text in tasks for name in text.split(",") if name]
    return run(loaded, names, chat_template=chat_template, batch_size=batch_size, limit=limit)


def refuse_beside_tasks(given: Mapping[str, object]) -> None:
    """Raise UsageError for options, by name, that are about held-out rows."""
    for option in (option for option, value in given.items() if value):
        raise UsageError(
            f"{option} is about held-out rows, and --tasks brings its own", option, "leave one of them out"
        )


def print_tasks(results: Mapping[str, Mapping[str, float]], *, as_json: bool) -> None:
    """Print a line for each task and metric, or one JSON object."""
    if as_json:
        print(json.dumps(results))
        return
    width = max((len(task) for task in results), default=0)
    for task, metrics in results.items():
        for name, value in metrics.items():
            print(f"{task:{width}}  {name:20} {value:.6g}")
