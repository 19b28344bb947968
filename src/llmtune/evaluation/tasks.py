"""Benchmarks of lm-eval on a model that is loaded already (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import MachineError, UsageError, in_one_line

if TYPE_CHECKING:
    from llmtune.evaluation.inference_model import InferenceModel

__all__ = ["run_tasks"]

Results = dict[str, dict[str, float]]


def run_tasks(
    loaded: InferenceModel,
    tasks: Sequence[str],
    *,
    chat_template: bool,
    batch_size: int,
    limit: int | None = None,
) -> Results:
    """Return task -> metric -> value of the tasks: names of lm-eval, or YAML files of tasks.

    chat_template: prompts are written as chats, with the system prompt and the template arguments of training. limit:
    documents of each task.

    Raises MachineError where lm-eval is not installed, UsageError for a task that it does not know or cannot run.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        fix = 'pip install "llmtune[tasks]"'
        raise MachineError(f"--tasks needs lm-eval: {in_one_line(error)}", where="--tasks", fix=fix) from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"there is no file `{missing[0]}`", where="--tasks", fix="name a YAML file of a task")
    defaults = loaded.defaults
    try:
        folders = sorted({str(file.parent.resolve()) for file in files})
        # The index of its own tasks takes long to read, and files alone need none of them.
        manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
        model = HFLM(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=batch_size,
            chat_template_args=dict(defaults.template_args) if chat_template else None,
        )
        found: Mapping[str, Any] = simple_evaluate(
            model=model,
            tasks=[str(_name_of(manager, task)) for task in tasks],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,  # its standard errors by formula; drawing takes longer than the tasks
            apply_chat_template=chat_template,
            system_instruction=defaults.system if chat_template else None,
            log_samples=False,
        )["results"]
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        fix = "check its name or file (`lm-eval ls tasks`); data from a hub needs a network"
        raise UsageError(f"lm-eval does not run this: {in_one_line(error)}", where="--tasks", fix=fix) from error
    return {task: _numbers(metrics) for task, metrics in found.items()}


def _name_of(manager: Any, task: str) -> str:
    """Return the name of a task, of a file that of the task it describes."""
    if not task.endswith((".yaml", ".yml")):
        return task
    path = Path(task).resolve()
    index = manager.task_index
    return next((name for name, entry in index.items() if _path_of(entry) == path), task)


def _path_of(entry: Any) -> Path | None:
    path = entry.get("yaml_path") if isinstance(entry, dict) else getattr(entry, "yaml_path", None)
    return Path(path).resolve() if isinstance(path, (str, Path)) else None


def _numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a task; `acc,none` is called `acc`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
