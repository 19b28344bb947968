"""Print how a run ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.cli.failure import print_line

if TYPE_CHECKING:
    from llmtune.training.training_run import Result

__all__ = ["show_result"]


def show_result(result: Result) -> None:
    """Print how the run ended; its folder goes to stdout, all else to stderr."""
    if result.folder is None:
        return
    from llmtune.plan.summary import comparison_lines
    from llmtune.training.progress import final_lines, summary_lines

    print_line(f"{result.state} after step {result.step}")
    for line in summary_lines(result.metrics, result.eval_state):
        print_line(line)
    if result.final_step is not None:
        has_best = (result.folder / "checkpoints" / "best").is_dir()
        for line in final_lines(result.eval_state, final_step=result.final_step, run=result.folder, has_best=has_best):
            print_line(line)
    if result.plan is not None:
        for line in comparison_lines(
            result.plan, steps=result.step, seconds=result.seconds, memory_bytes=result.memory_bytes
        ):
            print_line(line)
    if result.state == "finished":
        print_line(f"try it: llmtune generate {result.folder} 'your question'")
    print(result.folder)
