"""Decisions and errors of the main process, told to the other processes of a training.

They travel as JSON through the key-value store that the processes met at.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch.distributed.distributed_c10d import Store

from llmtune.engine.rank_watch import FIX, RankWatch
from llmtune.errors import ConfigError, LlmtuneError, Problem, RankLostError, in_one_line

__all__ = ["FIX_UNLIKE", "RankMessages", "lost_ranks_noticed"]

T = TypeVar("T")

FIX_UNLIKE = "start every process with the same command, files, environment and versions"

LONGEST_SILENT_WAIT_S = 30
"""Seconds after which the main process says for whom it waits."""

LONGEST_LEAVING_S = 10
"""Seconds that the main process waits at the end for the others to have read its last message."""


class RankMessages:
    """What the main process tells the others: each method must be called by all of them, in the same order.

    Raises RankLostError where another process is lost (see RankWatch).
    """

    def __init__(self, rank: int, world_size: int, store: Store, watch: RankWatch) -> None:
        self._rank, self._world_size, self._store = rank, world_size, store
        self.watch = watch
        self._count = 0

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Call `work` on the main process alone; the others wait and get None.

        Raises the LlmtuneError of `work`, on every process.
        """
        if self._rank != 0:
            failure = self._receive()
            if failure is not None:
                raise _error_of_main(failure)
            return None
        with self.watch.working():  # until it is sent
            try:
                result = work()
            except LlmtuneError as error:
                error.is_reported = False  # here, and in no other process: all end with it
                self._send({"kind": error.kind, "exit_code": error.exit_code, "problems": error.problems})
                raise
            self._send(None)
        return result

    def on_main_with_others(self, work: Callable[[Callable[[int], None]], T], share: Callable[[int], None]) -> T | None:
        """Call `work(ask)` as `on_main` does; in it, `ask(number)` lets every process call `share(number)`.

        Between two questions the others wait as long as the work takes.
        """

        def ask(number: int) -> None:
            self._send(number)
            with self.watch.waiting():
                share(number)

        def work_to_the_end() -> T:
            try:
                return work(ask)
            finally:
                self._send(None)

        if self._rank != 0:
            while (number := self._receive()) is not None:
                share(number)
        return self.on_main(work_to_the_end)

    def from_main(self, value: T) -> T:
        """Give the main process's `value`, which must be plain JSON; those of the others do not count."""
        if self._rank != 0:
            return self._receive()  # type: ignore[no-any-return]
        self._send(value)
        return value

    def check_alike(self, facts: Mapping[str, object], *, fix: str = FIX_UNLIKE) -> None:
        """Compare `facts` (plain JSON values) of every process with those of the main one.

        Raises ConfigError on all processes, with each key that differs, the process in which it does, and `fix`.
        """
        place = f"facts/{self._count}"
        own = {"facts": dict(facts), "host": socket.gethostname()}
        if self._rank != 0:
            with lost_ranks_noticed():
                self._store.set(f"{place}/{self._rank}", json.dumps(own))
        self.on_main(lambda: self._compare_facts(place, own["facts"], fix))

    def _compare_facts(self, place: str, facts: object, fix: str) -> None:
        problems, expected = [], json.loads(json.dumps(facts))  # JSON makes lists of tuples
        for rank in range(1, self._world_size):
            other = json.loads(self._get(f"{place}/{rank}", rank))
            found = other["facts"]
            problems += [
                Problem(
                    f"process {rank} ({other['host']}) differs from process 0: "
                    f"{key} is {found.get(key)!r} there and {expected.get(key)!r} here",
                    "distributed",
                    fix,
                )
                for key in sorted(expected.keys() | found.keys())
                if found.get(key) != expected.get(key)
            ]
        if problems:
            raise ConfigError.all(problems)

    def _send(self, message: object) -> None:
        self._count += 1
        with lost_ranks_noticed():
            self._store.set(f"message/{self._count}", json.dumps(message))

    def _receive(self) -> Any:
        self._count += 1
        return json.loads(self._get(f"message/{self._count}", 0))

    def _get(self, key: str, rank: int) -> bytes:
        """Read what process `rank` writes, and wait for it as long as it may come."""
        began, is_said = time.monotonic(), self._rank != 0  # the main process alone prints
        with lost_ranks_noticed(), self.watch.waiting():
            while True:
                try:
                    # In short waits: the store says nothing of a process that is lost.
                    self._store.wait([key], dt.timedelta(seconds=1))
                    return self._store.get(key)  # type: ignore[no-any-return]
                except torch.distributed.DistStoreError:
                    waited_s = time.monotonic() - began
                    if not self.watch.may_come(rank, waited_s):
                        raise
                if not is_said and waited_s > LONGEST_SILENT_WAIT_S:
                    with suppress(OSError):  # a closed terminal stops no training
                        os.write(2, f"waiting for process {rank}, which is still at work\n".encode())
                    is_said = True

    @contextmanager
    def errors_printed_once(self) -> Iterator[None]:
        """Let the first process that fails in the body report its error, and mark those of others as reported."""
        try:
            with _communication_errors_named():
                yield
        except RankLostError as error:
            self.watch.name_lost(error)
            self.watch.leave(failed=False)  # it is not the one to blame
            raise
        except LlmtuneError as error:
            is_shared = error.is_reported is not None  # all end with it
            if not is_shared:
                error.is_reported = False  # where the store went with the main process, twice is better than never
                with suppress(RuntimeError):
                    error.is_reported = self._store.add("reports", 1) > 1
            self.watch.leave(failed=not is_shared)
            raise
        except Exception:  # a bug too is a failure that the other processes are told of
            self.watch.leave(failed=True)
            raise

    def close(self, *, wait_for_main: bool) -> None:
        """Tell the others that this process ends; `wait_for_main`: not before the main one does."""
        with suppress(RuntimeError):  # the main process is gone, and its store with it
            if self._rank == 0:
                self._store.set("closed", "")
                if wait_for_main:  # the store ends with this process, and the others may still read in it
                    others = [f"left/{rank}" for rank in range(1, self._world_size)]
                    self._store.wait(others, dt.timedelta(seconds=LONGEST_LEAVING_S))
            elif wait_for_main:
                self._store.wait(["closed"])
                self._store.set(f"left/{self._rank}", "")
        self.watch.leave(failed=False)


@contextmanager
def _communication_errors_named() -> Iterator[None]:
    """Turn an error of torch's communication into RankLostError, and let every other pass.

    With sharded weights a forward or backward pass waits for others inside torch, where no call of ours stands.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        with lost_ranks_noticed():
            raise


@contextmanager
def lost_ranks_noticed() -> Iterator[None]:
    """Raise RankLostError for the RuntimeError of torch where another process has died or is silent."""
    try:
        yield
    # A RuntimeError too, and of this process alone.
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo raises nothing narrower
        problem = f"another process of this training died or stopped answering ({in_one_line(error)})"
        raise RankLostError(problem, where="distributed", fix=FIX) from error


def _error_of_main(failure: Mapping[str, Any]) -> LlmtuneError:
    kinds: list[type[LlmtuneError]] = [LlmtuneError]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
    # One that is made in another way (StoppedBySignal) stays a general one, with its exit code.
    alike = (kind for kind in kinds if kind.kind == failure["kind"] and kind.__init__ is LlmtuneError.__init__)
    error = next(alike, LlmtuneError).all(Problem(*problem) for problem in failure["problems"])
    error.exit_code, error.is_reported = failure["exit_code"], True
    return error
