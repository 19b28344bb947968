"""Notice within ten seconds that another process of the training, or its machine, has died, and later that it hangs.

Each process keeps a connection to the main one. The kernel closes that of a process that dies, and ends one whose
machine no longer acknowledges anything; for a stopped process it goes on acknowledging. So no busy or stopped process
is taken for a dead one, as a heartbeat sent from Python would do.

A process that hangs is found by questions, which a thread answers however busy its main thread is. A stopped process
does not answer. One that answers is lost only where others wait for it and it neither waits itself nor says that its
work may take long: the user's own code, drawing answers, an evaluation and a save take the time they need.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import Store

from llmtune.errors import Problem, RankLostError

__all__ = ["RankWatch", "watch_ranks"]

DEAD_AFTER_S = 7
"""Seconds without an acknowledgement after which a machine is lost."""
LEAVE_S = 2.0
"""Seconds in which the main thread may end by itself after another process was lost."""
ANSWER_S = 2.0
"""Seconds in which a process that runs answers, however busy it is."""
ASK_EVERY_S = 0.5
"""Seconds between an answer and the next question to a process that is late."""
LONGEST_REST_S = 1.0
"""Seconds of silence after which any other process is asked. For a question that is on its way the kernel counts
`DEAD_AFTER_S` from when it was sent, so both together stay below ten."""
BUSY, WAITS, COMPUTES = "busy", "waits", "computes"
"""What a process answers that it does: work that may take long, waiting for others, or a step."""
CONNECT_S = 10.0
LONGEST_HELLO = 1000
"""Bytes of the first line of a process that connects."""
SILENT = "stopped answering, and no connection broke: it is stopped, or its machine is"
AT_REST = "answers, and does not go on; if its step takes so long, raise distributed.timeout_s"
FIX = "see what the other process printed; `llmtune resume`, started in the same way, goes on"


class Peer(NamedTuple):
    """A process at the other end of a connection."""

    rank: int
    host: str

    def __str__(self) -> str:
        return f"process {self.rank} ({self.host})"


class RankWatch:
    """The connections of this process: the main one has one to each other process, the others have one to it.

    A thread reads them. When a process is lost it gives the main thread a moment to end by itself, waits for a save
    that is being written, and then ends this process with the exit code of RankLostError.
    """

    def __init__(
        self, rank: int, links: Mapping[socket.socket, Peer], *, timeout_s: float, prints: bool = True
    ) -> None:
        """`timeout_s`: seconds after which a silent process is lost. `prints`: reports the main one's loss here."""
        self._rank, self._links, self._prints = rank, dict(links), prints
        self._problem = ""
        self._is_lost, self._is_leaving = threading.Event(), threading.Event()
        # Often enough that what counts as silence is silence, and not the time in which nobody asked.
        self._timeout_s, self._ask_after_s = timeout_s, min(timeout_s / 4, LONGEST_REST_S)
        self._answers: dict[Peer, tuple[float, str]] = {}
        """When each process last answered, and what."""
        self._silent_s, self._stalled_s = (dict.fromkeys(self._links.values(), 0.0) for _ in range(2))
        """Seconds since a process was last heard of, and those of this wait since it last waited or was busy."""
        self._has_answer = threading.Condition()
        # Busy from the start on: rows and weights come in their own time to each machine.
        self._is_starting = True
        self._busy = self._working = self._waits = 0
        """Bodies of `busy`, `working` and `waiting` that the main thread is in: they may stand in each other."""
        self._received = dict.fromkeys(self._links, b"")
        if self._links:
            # A data worker that was forked would keep the connections of a dead process open.
            os.register_at_fork(after_in_child=self._close)
            threading.Thread(target=self._run, name="rank watch", daemon=True).start()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let others wait for this process as long as the body takes and it answers."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """Let others wait for this process as long as the body takes, and end it there only where it waits itself."""
        self._working += 1
        try:
            with self.busy():
                yield
        finally:
            self._working -= 1

    def end_start(self) -> None:
        """From here on this process is busy only in the body of `busy` or `working`; it was starting before."""
        self._is_starting = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """End this process where another, waited for in the body, does not go on for longer than the time-out.

        The body may wait in a library without a time-out of its own.
        """
        if self._waits == 0:
            self._stalled_s = dict.fromkeys(self._stalled_s, 0.0)
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def may_come(self, rank: int, waited_s: float) -> bool:
        """Whether what process `rank` sends may still come: nobody is lost, and one without a watch has time left."""
        is_watched = any(peer.rank == rank for peer in self._links.values())
        return not self._is_lost.is_set() and (is_watched or waited_s < self._timeout_s)

    def name_lost(self, error: RankLostError) -> None:
        """Name in `error` the process that is lost or silent, and leave the report to one of those that notice."""
        if not self._links and not self._is_lost.is_set():
            return  # nobody could be reached
        with self.waiting():  # as the others are told, who may ask for the one that is to blame
            # The kernel closes the connections of a dead process in any order: this one may be a moment behind.
            is_lost = self._is_lost.wait(1.0)
            states = {} if is_lost else dict(self._ask())
        if not is_lost:
            silent = [peer for peer in self._links.values() if peer not in states]
            at_rest = [peer for peer, state in states.items() if state != WAITS]
            if silent or at_rest:
                self._lose(f"{_joined(silent)} {SILENT}" if silent else f"{_joined(at_rest)} {AT_REST}")
            elif self._rank != 0:
                error.is_reported = True  # the main process sees the others, and names the one that is to blame
                return
        if self._is_lost.is_set():
            (problem,) = error.problems
            error.problems = (Problem(self._problem, problem.where, problem.fix),)
        error.is_reported = not self._prints

    def leave(self, *, failed: bool) -> None:
        """Tell the others that this process ends by itself; they end too where it `failed` alone."""
        # First the flag: the answer of the others, who end at once, must not look like a loss.
        if not self._is_leaving.is_set():
            self._is_leaving.set()
            for link in list(self._links):
                _send(link, {"left": "failed" if failed else "done"})

    def _ask(self) -> list[tuple[Peer, str]]:
        """Ask each process at the other end what it does; those that answer in time."""
        peers, began = list(self._links.values()), time.monotonic()
        if self._is_lost.is_set():
            return []
        for link in list(self._links):
            _send(link, {"question": "state"})

        def new() -> list[tuple[Peer, str]]:
            return [(peer, state) for peer, (at, state) in self._answers.items() if at >= began]

        # The thread that reads the answers takes this lock too, and waiting lets go of it.
        with self._has_answer:
            self._has_answer.wait_for(lambda: len(new()) == len(peers), ANSWER_S)
            return new()

    def _state(self) -> str:
        if self._waits:
            return WAITS
        return BUSY if self._busy or self._is_starting else COMPUTES

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link, selectors.EVENT_READ)
            last = time.monotonic()
            while self._links:
                ready = {key.fd for key, _ in selector.select(ASK_EVERY_S)}
                for link in [link for link in self._links if link.fileno() in ready]:
                    if not self._read(link):
                        selector.unregister(link)
                        del self._links[link]
                now = time.monotonic()
                # While this process was stopped itself, nobody else was silent.
                self._check_peers(min(now - last, 2 * ASK_EVERY_S), asks=not ready)
                last = now
                if self._is_lost.is_set():
                    self._leave_or_exit()
                    return

    def _check_peers(self, passed_s: float, *, asks: bool) -> None:
        """Lose a process that has not answered for the time-out; count how long each is waited for.

        `asks`: ask those that are late. Not at each answer: it wakes the selector, and both would do nothing else.
        """
        for link, peer in list(self._links.items()):
            self._silent_s[peer] += passed_s
            self._stalled_s[peer] += passed_s if self._waits else 0.0
            if self._silent_s[peer] > self._timeout_s:
                self._lose(f"{peer} {SILENT}")
            elif asks and max(self._silent_s[peer], self._stalled_s[peer]) > self._ask_after_s:
                _send(link, {"question": "state"})

    def _read(self, link: socket.socket) -> bool:
        """Read what has come, and return whether the process at the other end is still there."""
        peer = self._links[link]
        try:
            data = link.recv(2**16)
        # The kernel of a process that was killed with unread data says it this way.
        except ConnectionResetError:
            data = b""
        except OSError as error:
            self._lose(f"the machine of {peer} no longer answers ({error.strerror or 'timed out'})")
            return False
        if not data:
            self._lose(f"{peer} died: its connection was closed")
            return False
        # What is behind the last line end is the beginning of a message that comes later.
        *lines, self._received[link] = (self._received[link] + data).split(b"\n")
        stays = [self._answer(link, peer, json.loads(line)) for line in lines]
        return all(stays)

    def _answer(self, link: socket.socket, peer: Peer, message: Mapping[str, Any]) -> bool:
        """Do what a message asks for, and return whether its sender stays."""
        self._silent_s[peer] = 0.0
        if "question" in message:
            _send(link, {"answer": self._state()})
        elif "answer" in message:
            with self._has_answer:
                self._answers[peer] = time.monotonic(), message["answer"]
                self._has_answer.notify_all()
            if message["answer"] != COMPUTES:
                self._stalled_s[peer] = 0.0
            elif self._stalled_s[peer] > self._timeout_s and self._waits:
                self._lose(f"{peer} {AT_REST}")
        elif "lost" in message:
            self._lose(message["lost"], is_printed=message["printed"])
        elif message["left"] == "failed":
            self._lose(f"{peer} ended with an error", is_printed=True)  # by itself
        return "left" not in message

    def _lose(self, problem: str, *, is_printed: bool = False) -> None:
        if self._is_lost.is_set():
            return
        self._problem, self._prints = problem, self._prints and not is_printed
        self._is_lost.set()
        # The main process tells those that have no connection between them; one that is at rest still answers.
        for link in list(self._links):
            _send(link, {"lost": problem, "printed": is_printed or self._prints})

    def _leave_or_exit(self) -> None:
        """End this process, unless its main thread does so by itself; never in the middle of a save."""
        # A save is what the run goes on from: it is ended only where it waits for a process that will not come.
        while self._working and not self._waits:
            time.sleep(0.05)
        if self._is_leaving.wait(LEAVE_S):
            return
        if self._prints:
            error = RankLostError(self._problem, "distributed", FIX)
            with suppress(OSError):  # past Python's buffers, whose lock the main thread may hold
                os.write(2, f"error: {self._problem}\n  where: distributed\n  fix: {FIX}\n".encode())
            os._exit(error.exit_code)
        # Not `sys.exit`: this is not the main thread, which may wait in a library for ever.
        os._exit(RankLostError.exit_code)

    def _close(self) -> None:
        for link in self._links:
            link.close()


def _joined(peers: Sequence[Peer]) -> str:
    return " and ".join(map(str, peers))


def watch_ranks(
    store: Store, rank: int, world_size: int, *, address: str, timeout_s: float
) -> tuple[RankWatch, list[int]]:
    """Connect all processes with the main one, and return the watch and the processes that could not be reached.

    `address`: of the main process, as the others know it. The processes without a connection are not watched.
    """
    if rank != 0:
        return _connect(store, rank, address, timeout_s), []
    # Any program may connect to an open port; only processes of this run can read the token in the store.
    token, links, missing = secrets.token_hex(16), {}, set(range(1, world_size))
    kind = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    with socket.create_server(("", 0), backlog=world_size, **kind) as server:  # type: ignore[arg-type]
        here = {"host": socket.gethostname(), "port": server.getsockname()[1], "token": token}
        store.set("watch", json.dumps(here))
        deadline = time.monotonic() + CONNECT_S
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(OSError, ValueError, KeyError):  # a stranger: it is not let in
                link, _ = server.accept()
                link.settimeout(ANSWER_S)
                hello = _read_line(link)
                if hello["token"] == token:
                    links[link] = Peer(hello["rank"], hello["host"])
                    missing.discard(hello["rank"])
    first = {peer.host: peer.rank for peer in sorted(links.values(), reverse=True)}
    for link, peer in links.items():
        _keep_alive(link)
        _send(link, {"prints": first[peer.host] == peer.rank})
    return RankWatch(0, links, timeout_s=timeout_s), sorted(missing)


def _connect(store: Store, rank: int, address: str, timeout_s: float) -> RankWatch:
    there = json.loads(store.get("watch"))
    for name in (address, there["host"]):
        with suppress(OSError, ValueError):
            link = socket.create_connection((name, there["port"]), timeout=CONNECT_S / 2)
            _send(link, {"token": there["token"], "rank": rank, "host": socket.gethostname()})
            link.settimeout(2 * CONNECT_S)  # the main process waits for all before it answers
            prints = _read_line(link)["prints"]
            _keep_alive(link)
            return RankWatch(rank, {link: Peer(0, there["host"])}, timeout_s=timeout_s, prints=prints)
    return RankWatch(rank, {}, timeout_s=timeout_s)


def _read_line(link: socket.socket) -> Any:
    """Read one line of JSON and nothing behind it. Raises ValueError where the other side is no process of ours."""
    line = b""
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        line += byte
        if not byte or len(line) > LONGEST_HELLO:
            raise ValueError(line)
    return json.loads(line)


def _keep_alive(link: socket.socket) -> None:
    """Let the kernel ask every two seconds for a sign of life, and end the connection after `DEAD_AFTER_S`."""
    link.settimeout(ANSWER_S)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 1000 * DEAD_AFTER_S}
    for name, value in options.items():
        # The last one is Linux's: where it is missing the kernel counts the lost signs of life.
        if (option := getattr(socket, name, None)) is not None:
            link.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(link: socket.socket, message: Mapping[str, object]) -> None:
    with suppress(OSError):  # it is gone, and the thread that reads will notice
        link.sendall(json.dumps(message).encode() + b"\n")
