"""Tokenize batches of records in several processes, in order, so that results do not depend on their number.

Each worker is a fresh Python process that holds the renderer and answers batches over its own socket. It ends by itself
when this process is gone, even after a kill, because the socket closes. A batch whose worker dies is tokenized in this
process.
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

from llmtune.data.dataset.row_result import RowResult, RowRules, process_record
from llmtune.data.reading.data_file import DataFile
from llmtune.data.reading.parse import BadRow, Record
from llmtune.data.rendering.renderer import Renderer

__all__ = ["Batch", "Job", "run_batches", "tokenize_batches"]

Batch = list[tuple[int, Record | BadRow]]
"""Records with the index of their file."""

BATCHES_IN_PROCESS = 4
"""With no more batches than this no other process is started: that takes about a second."""


class Job(NamedTuple):
    """Everything a worker receives once, before the batches."""

    files: tuple[DataFile, ...]
    formats: tuple[str, ...]
    renderer: Renderer
    rules: RowRules

    def run(self, batch: Batch) -> list[RowResult]:
        """Process the records of a batch, in its order."""
        return [
            process_record(index, self.files[index], record, self.formats[index], self.renderer, self.rules)
            for index, record in batch
        ]


def tokenize_batches(job: Job, batches: Iterable[Batch], workers: int) -> Iterator[list[RowResult]]:
    """Yield the results of every batch, in order, using `workers` processes where there is enough to do."""
    remaining = iter(batches)
    # One more than the limit shows that there is enough work, without reading the whole data.
    first = list(itertools.islice(remaining, BATCHES_IN_PROCESS + 1))
    all_batches = itertools.chain(first, remaining)
    if workers <= 1 or len(first) <= BATCHES_IN_PROCESS:
        yield from map(job.run, all_batches)
    else:
        yield from run_batches(job, all_batches, workers)


def run_batches(job: Job, batches: Iterator[Batch], workers: int) -> Iterator[list[RowResult]]:
    """Yield the results of every batch, in order, from `workers` processes; they are gone when the generator is.

    Until the first of them answers, after about a second, this process works too.
    """
    most_ahead = 4 * workers  # bounds the results that wait in memory for an earlier batch
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(_worker()) for _ in range(workers)]
        # An opened data set cannot be pickled, and a worker parses records only.
        sent_job = job._replace(files=tuple(replace(file, dataset=None) for file in job.files))
        idle = deque(connection for connection in connections if _send(connection, sent_job))
        busy: dict[Connection, tuple[int, Batch]] = {}
        finished: dict[int, list[RowResult]] = {}
        sent = yielded = 0
        has_answer = False
        while True:
            while idle and sent - yielded < most_ahead:
                batch = next(batches, None)
                if batch is None:
                    break
                if _send(idle[0], batch):
                    busy[idle.popleft()] = (sent, batch)
                else:
                    idle.popleft()
                    finished[sent] = job.run(batch)
                sent += 1
            if not idle and not busy and yielded == sent:  # every worker has died
                yield from map(job.run, batches)
                return
            if yielded == sent:
                return
            if yielded in finished:
                yield finished.pop(yielded)
                yielded += 1
                continue
            answers = wait(list(busy), None if has_answer or sent - yielded >= most_ahead else 0)
            has_answer = has_answer or bool(answers)
            if not answers and (batch := next(batches, None)) is not None:
                finished[sent] = job.run(batch)
                sent += 1
            elif not answers:
                has_answer = True  # no batch is left for this process: wait for the workers
            for connection in answers:
                assert isinstance(connection, Connection)
                number, batch = busy.pop(connection)
                try:
                    finished[number] = connection.recv()
                    idle.append(connection)
                except (EOFError, OSError):
                    # The worker died (killed for memory, say); the batch is whole here, so no row is lost.
                    finished[number] = job.run(batch)


def _send(connection: Connection, message: Job | Batch) -> bool:
    try:
        connection.send(message)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _worker() -> Iterator[Connection]:
    # A fresh process and not a fork: torch's threads may be running in this one.
    parent_end, child_end = socket.socketpair()
    with child_end:
        # -P: a file in the working folder cannot replace a library. A new session: Ctrl-C reaches this process alone.
        command = [sys.executable, "-P", "-c", _SERVE, str(child_end.fileno())]
        # The processes are the parallelism; threads inside each would fight for the same cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            pass_fds=(child_end.fileno(),),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    connection = Connection(parent_end.detach())
    try:
        yield connection
    finally:
        connection.close()
        process.kill()
        process.wait()


_SERVE = "import sys; from llmtune.data.dataset.workers import serve; serve(sys.argv[1:])"


def serve(arguments: Sequence[str]) -> None:
    """Answer batches until the parent process is gone."""
    connection = Connection(int(arguments[0]))
    with contextlib.suppress(EOFError, OSError):
        job: Job = connection.recv()
        while True:
            connection.send(job.run(connection.recv()))
