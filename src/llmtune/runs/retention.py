"""Which checkpoints are kept: the newest by step, and those something depends on (P6)."""

from __future__ import annotations

from collections.abc import Collection

from llmtune import durable
from llmtune.errors import MachineError
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.folder import RunFolder

__all__ = ["apply"]


def apply(run: RunFolder, keep_last: int, *, protected_steps: Collection[int] = ()) -> list[str]:
    """Delete all but the `keep_last` checkpoints of the highest steps and those of `protected_steps`; return warnings, one line each.

    `keep_last` 0 keeps all. Nothing is deleted before the newest checkpoint has been re-read from the disk and found whole; a damaged one
    does not count among the kept. What cannot be deleted is a warning, never an error. Never by time: a clock set back changes nothing.
    """
    if keep_last == 0:
        return []
    found = checkpoints.all_checkpoints(run)
    doomed = [one for one in found[:-keep_last] if one.step not in protected_steps]
    if not doomed:
        return []
    newest = found[-1]
    problems = checkpoints.verify(newest, run_id=run.run_id, past_cache=True)
    if problems:
        return [f"kept {len(doomed)} older checkpoints, because the newest one is damaged: {problems[0].problem} ({newest.path.name})"]
    warnings = []
    for one in doomed:
        try:
            durable.remove_tree(one.path)
        except MachineError as error:
            warnings.append(f"an old checkpoint stays: {error.problems[0].problem} ({durable.printable(one.path)})")
    return warnings
