"""P12: a process is lost where it is silent, or waited for and at rest, and not while its work takes long."""

import json
import signal
import socket
import threading
import time
from functools import partial

import pytest
import torch

from llmtune.engine import rank_watch
from llmtune.engine.rank_messages import RankMessages
from llmtune.engine.rank_watch import ANSWER_S, BUSY, COMPUTES, WAITS, Peer, RankWatch
from llmtune.errors import MachineError, RankLostError
from training_helpers import Forked

TIMEOUT_S, WORK_S, EVERY_S = 4.0, 3.0, 0.1


def lost_after(seconds, answers, *, waits=True):
    """Stay, or wait, so long beside a process that `answers(seconds passed)`; 8 where it was lost."""
    rank_watch.ASK_EVERY_S = EVERY_S
    ours, theirs = socket.socketpair()
    watch = RankWatch(1, {ours: Peer(0, "here")}, timeout_s=TIMEOUT_S)
    began, questions = time.monotonic(), []

    def answer():
        for question in theirs.makefile("r"):
            questions.append(question)
            if (state := answers(time.monotonic() - began)) is not None:
                theirs.sendall(json.dumps({"answer": state}).encode() + b"\n")

    threading.Thread(target=answer, daemon=True).start()
    if waits:
        with watch.waiting():
            time.sleep(seconds)
    else:
        time.sleep(seconds)
    assert seconds / 4 <= len(questions) <= 1.5 * seconds / EVERY_S, "it is asked again at each answer"
    return 8 * watch._is_lost.is_set()


def busy_at_first(passed_s):
    return BUSY if passed_s < WORK_S else COMPUTES


def pauses(_passed_s):
    """Answer late, as a process whose interpreter is held for a while does."""
    time.sleep(0.6 * TIMEOUT_S)
    return COMPUTES


LATE_S = TIMEOUT_S + ANSWER_S + 1.5
BESIDE = {
    "just busy": (partial(lost_after, WORK_S + TIMEOUT_S / 2, busy_at_first), 0),
    "busy long ago": (partial(lost_after, WORK_S + LATE_S, busy_at_first), 8),
    "at rest": (partial(lost_after, LATE_S, lambda _: COMPUTES), 8),
    "waits itself": (partial(lost_after, LATE_S, lambda _: WAITS), 0),
    "at rest, nobody waits": (partial(lost_after, LATE_S, lambda _: COMPUTES, waits=False), 0),
    "pauses, nobody waits": (partial(lost_after, LATE_S, pauses, waits=False), 0),
    "silent, nobody waits": (partial(lost_after, LATE_S, lambda _: None, waits=False), 8),
}


def test_a_process_is_lost_where_it_is_silent_or_waited_for_and_at_rest():
    """The main one of a run may take the time-out again after its work: its message is read some time later."""
    children = {name: Forked(function) for name, (function, _) in BESIDE.items()}
    assert {name: child.wait(60) for name, child in children.items()} == {
        name: code for name, (_, code) in BESIDE.items()
    }


def test_a_process_that_was_stopped_itself_takes_nobody_for_silent():
    """As a scheduler suspends all processes of a job."""
    child = Forked(partial(lost_after, 9.0, lambda _: COMPUTES, waits=False))
    time.sleep(1)
    child.send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT_S + 1.5)
    child.send_signal(signal.SIGCONT)
    assert child.wait(60) == 0


class LateStore:
    """A store in which a message comes after so many waits that ended without it."""

    def __init__(self, *, after):
        self.after, self.waits = after, 0

    def wait(self, _keys, _timeout):
        self.waits += 1
        if self.waits <= self.after:
            time.sleep(0.2)
            raise torch.distributed.DistStoreError("wait timeout")

    def get(self, _key):
        return b'"told"'


def test_a_message_of_a_process_that_nobody_watches_is_waited_for_until_the_time_out():
    soon, late = (RankMessages(1, 2, LateStore(after=after), RankWatch(1, {}, timeout_s=1)) for after in (3, 30))
    assert soon.from_main(None) == "told"
    with pytest.raises(RankLostError):
        late.from_main(None)


def test_the_main_process_works_until_its_message_is_sent():
    """Its answer that it no longer works then means that the message is there."""
    watch, working = RankWatch(0, {}, timeout_s=1), []
    watch.end_start()

    class Store:
        def set(self, _key, _message):
            working.append(watch._state())

    messages = RankMessages(0, 2, Store(), watch)
    assert messages.on_main(lambda: 3) == 3

    def refuse():
        raise MachineError("no room")

    with pytest.raises(MachineError):
        messages.on_main(refuse)
    assert working == [BUSY, BUSY]
    assert watch._state() == COMPUTES
