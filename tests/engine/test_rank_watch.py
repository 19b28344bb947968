"""P12: a process is lost where it is silent, or waited for and at rest, and not while its work takes long."""

import json
import signal
import socket
import threading
import time
from functools import partial

import pytest

from llmtune.engine.rank_messages import RankMessages
from llmtune.engine.rank_watch import ANSWER_S, BUSY, COMPUTES, WAITS, Peer, RankWatch
from llmtune.errors import MachineError, RankLostError
from training_helpers import Forked

TIMEOUT_S, WORK_S = 2.0, 3.0


def lost_after(seconds, answers, *, waits=True):
    """Stay, or wait, so long beside a process that `answers(seconds passed)`; 8 where it was lost."""
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
    assert seconds / 4 <= len(questions) <= 3 * seconds, "it is asked again at each answer"
    return 8 * watch._is_lost.is_set()


def busy_at_first(passed_s):
    return BUSY if passed_s < WORK_S else COMPUTES


LATE_S = TIMEOUT_S + ANSWER_S + 1.5
BESIDE = {
    "just busy": (partial(lost_after, WORK_S + TIMEOUT_S / 2, busy_at_first), 0),
    "busy long ago": (partial(lost_after, WORK_S + LATE_S, busy_at_first), 8),
    "at rest": (partial(lost_after, LATE_S, lambda _: COMPUTES), 8),
    "waits itself": (partial(lost_after, LATE_S, lambda _: WAITS), 0),
    "at rest, nobody waits": (partial(lost_after, LATE_S, lambda _: COMPUTES, waits=False), 0),
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
    child = Forked(partial(lost_after, 8.0, lambda _: COMPUTES, waits=False))
    time.sleep(1)
    child.send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT_S + 1.5)
    child.send_signal(signal.SIGCONT)
    assert child.wait(60) == 0


class LateStore:
    """A store whose time-out ends at the first reading; the message has come meanwhile, or not."""

    def __init__(self, *, has_message):
        self.has_message, self.readings = has_message, 0

    def get(self, _key):
        self.readings += 1
        if self.readings == 1:
            raise RuntimeError("wait timeout")
        return b'"told"'

    def check(self, _keys):
        return self.has_message


def test_a_message_that_came_while_the_time_out_ended_is_read():
    """The main process has ended its work by then, and says so."""
    there, missing = (RankMessages(1, 2, LateStore(has_message=has), RankWatch(1, {}, timeout_s=1)) for has in (1, 0))
    assert there.from_main(None) == "told"
    with pytest.raises(RankLostError):
        missing.from_main(None)


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
