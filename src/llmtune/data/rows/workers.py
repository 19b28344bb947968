"""Tokenize in several processes, in order, so that nothing depends on how many there are.

Each worker is a fresh Python that holds the renderer and answers batches over a socket of its own. It ends by itself
when this process is gone, however that went, because the socket closes. A worker that dies costs its batch one more
try, in this process.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from llmtune.data.reading.data_files import DataFile
from llmtune.data.reading.parse import BadRow
from llmtune.data.reading.readers import Record
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.row_result import RowResult, RowRules, outcome_of

__all__ = ["Batch", "Job", "available_cores", "run_batches", "tokenize_batches"]

Batch = list[tuple[int, Record | BadRow]]
"""Records with the index of their file."""

BATCHES_IN_PROCESS = 4
"""Batches for which no other process is asked: starting one takes about a second."""


class Job(NamedTuple):
    """Everything a worker has to know once."""

    files: tuple[DataFile, ...]
    formats: tuple[str, ...]
    renderer: Renderer
    rules: RowRules

    def run(self, batch: Batch) -> list[RowResult]:
        """The outcomes of a batch, in its order."""
        return [
            outcome_of(index, self.files[index], record, self.formats[index], self.renderer, self.rules)
            for index, record in batch
        ]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenize_batches(job: Job, batches: Iterable[Batch], workers: int) -> Iterator[list[RowResult]]:
    """Yield the outcomes of every batch, in order, using `workers` processes where there is enough to do."""
    remaining = iter(batches)
    first = list(itertools.islice(remaining, BATCHES_IN_PROCESS + 1))
    everything = itertools.chain(first, remaining)
    if workers <= 1 or len(first) <= BATCHES_IN_PROCESS:
        yield from map(job.run, everything)
    else:
        yield from run_batches(job, everything, workers)


def run_batches(job: Job, batches: Iterator[Batch], workers: int) -> Iterator[list[RowResult]]:
    """Yield the outcomes of every batch, in order, from `workers` processes. They are gone when the generator is.

    Until the first of them answers, which takes it about a second, this process works too.
    """
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_worker()) for _ in range(workers)]
        bare = job._replace(files=tuple(replace(file, dataset=None) for file in job.files))
        idle = deque(one for one in started if _send(one, bare))
        busy: dict[Connection, tuple[int, Batch]] = {}
        finished: dict[int, list[RowResult]] = {}
        given = taken = 0
        someone_answered = False
        while True:
            while idle and given - taken < 4 * workers:
                batch = next(batches, None)
                if batch is None:
                    break
                if _send(idle[0], batch):
                    busy[idle.popleft()] = (given, batch)
                else:
                    idle.popleft()
                    finished[given] = job.run(batch)
                given += 1
            if not idle and not busy and taken == given:  # every worker has died
                yield from map(job.run, batches)
                return
            if taken == given:
                return
            if taken in finished:
                yield finished.pop(taken)
                taken += 1
                continue
            answers = wait(list(busy), None if someone_answered or given - taken >= 4 * workers else 0)
            someone_answered = someone_answered or bool(answers)
            if not answers and (batch := next(batches, None)) is not None:
                finished[given] = job.run(batch)
                given += 1
            elif not answers:
                someone_answered = True  # nothing is left to do here: wait for them
            for one in answers:
                assert isinstance(one, Connection)
                number, batch = busy.pop(one)
                try:
                    finished[number] = one.recv()
                    idle.append(one)
                except (EOFError, OSError):
                    finished[number] = job.run(batch)


def _send(connection: Connection, message: Job | Batch) -> bool:
    try:
        connection.send(message)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _worker() -> Iterator[Connection]:
    here, there = socket.socketpair()
    with there:
        # -P: nothing in the working folder can take the place of a library. A session of its own: Ctrl-C is answered by
        # this process alone.
        command = [sys.executable, "-P", "-c", _SERVE, str(there.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            pass_fds=(there.fileno(),),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    connection = Connection(here.detach())
    try:
        yield connection
    finally:
        connection.close()
        process.kill()
        process.wait()


_SERVE = "import sys; from llmtune.data.rows.workers import serve; serve(sys.argv[1:])"


def serve(arguments: Sequence[str]) -> None:
    """Answer batches until the other side is gone."""
    connection = Connection(int(arguments[0]))
    with contextlib.suppress(EOFError, OSError):
        job: Job = connection.recv()
        while True:
            connection.send(job.run(connection.recv()))
