"""The user's callbacks: called after every evaluation and every save, and unable to change the run.

A callback is an object with one or both of these methods:

- `on_evaluate(step, metrics)` after an evaluation of the held-out rows, in every process. `metrics` are those of its
  line in metrics.jsonl.
- `on_save(step, folder)` after a folder was written completely, in the process that writes: a checkpoint
  (`checkpoints/step-000100`), `checkpoints/best` or `checkpoints/final`.

Each returns None, or `Stop(reason)`, which ends the training at the next step boundary, saved, to be resumed. Random
generators are restored afterwards; an exception is printed once and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from llmtune.api.metrics import Stop
from llmtune.common.text import PrintLine
from llmtune.engine.state import capture_rng, restore_rng
from llmtune.errors import UsageError

__all__ = ["CALLBACK_METHODS", "UserCallbacks", "check_callbacks"]

CALLBACK_METHODS = ("on_evaluate", "on_save")


def check_callbacks(callbacks: Iterable[object]) -> None:
    """Raise UsageError for an object without any of the methods."""
    for callback in callbacks:
        if not any(callable(getattr(callback, name, None)) for name in CALLBACK_METHODS):
            fix = "give an object with `on_evaluate(step, metrics)` or `on_save(step, folder)`"
            raise UsageError(f"{callback!r} is no callback", where="callbacks", fix=fix)


class UserCallbacks:
    """All callbacks of a run."""

    def __init__(self, callbacks: Iterable[object], *, device: torch.device, print_line: PrintLine) -> None:
        self._callbacks = tuple(callbacks)
        self._device, self._print_line = device, print_line
        self._warned: set[str] = set()
        self.stop: Stop | None = None
        """The newest `Stop` a callback returned."""

    def __len__(self) -> int:
        return len(self._callbacks)

    def on_evaluate(self, step: int, metrics: Mapping[str, object]) -> None:
        """Tell every callback of an evaluation after `step` updates."""
        self._call("on_evaluate", step, dict(metrics))

    def on_save(self, step: int, folder: Path) -> None:
        """Tell every callback of a folder that was written after `step` updates."""
        self._call("on_save", step, folder)

    def _call(self, name: str, step: int, argument: object) -> None:
        generators = capture_rng(self._device)
        for callback in self._callbacks:
            method = getattr(callback, name, None)
            if not callable(method):
                continue
            label = f"{type(callback).__name__}.{name}"
            try:
                result = method(step, argument)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything and never ends a run
                self._warn_once(f"{label} failed at step {step}: {type(error).__name__}: {error}", key=f"{label}:error")
                continue
            if isinstance(result, Stop):
                self.stop = result
            elif result is not None:
                kind = type(result).__name__
                self._warn_once(
                    f"{label} returns a {kind}, which is not used; return `Stop(reason)` or None", key=label
                )
        restore_rng(generators, self._device)

    def _warn_once(self, warning: str, *, key: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._print_line(f"warning: {warning}")
