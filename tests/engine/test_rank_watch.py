"""P12: a process that waits for the main one loses it after the time-out, and not while it works or has just worked."""

import json
import socket
import threading
import time
from functools import partial

import pytest

from llmtune.engine.rank_messages import RankMessages
from llmtune.engine.rank_watch import Peer, RankWatch
from llmtune.errors import MachineError, RankLostError
from training_helpers import Forked

TIMEOUT_S, WORK_S = 3.0, 4.0


def waits(seconds):
    """Wait so long for a main process that works for WORK_S; 8 where it was lost."""
    ours, theirs = socket.socketpair()
    watch = RankWatch(1, {ours: Peer(0, "here")}, timeout_s=TIMEOUT_S)
    works_until, questions = time.monotonic() + WORK_S, []

    def answer_as_main():
        for question in theirs.makefile("r"):
            questions.append(question)
            theirs.sendall(json.dumps({"answer": time.monotonic() < works_until}).encode() + b"\n")

    threading.Thread(target=answer_as_main, daemon=True).start()
    with watch.waiting():
        time.sleep(seconds)
    assert seconds / 2 <= len(questions) <= 3 * seconds, "it is asked again at each answer"
    return 8 * watch._is_lost.is_set()


def test_a_main_process_that_has_worked_longer_than_the_time_out_may_take_it_again():
    """Its message is read some time after it has ended its work."""
    soon, late = (Forked(partial(waits, WORK_S + seconds)) for seconds in (TIMEOUT_S / 2, TIMEOUT_S + 1.5))
    assert (soon.wait(60), late.wait(60)) == (0, 8)


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

    class Store:
        def set(self, _key, _message):
            working.append(watch._is_working)

    messages = RankMessages(0, 2, Store(), watch)
    assert messages.on_main(lambda: 3) == 3

    def refuse():
        raise MachineError("no room")

    with pytest.raises(MachineError):
        messages.on_main(refuse)
    assert working == [True, True]
    assert not watch._is_working
