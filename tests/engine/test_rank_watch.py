"""P12: a process that waits for the main one loses it after the time-out, and not while it works or has just worked."""

import json
import socket
import threading
import time
from functools import partial

from llmtune.engine.rank_watch import Peer, RankWatch
from training_helpers import Forked

TIMEOUT_S, WORK_S = 2.0, 3.0


def waits(seconds):
    """Wait so long for a main process that works for WORK_S; 8 where it was lost."""
    ours, theirs = socket.socketpair()
    watch = RankWatch(1, {ours: Peer(0, "here")}, timeout_s=TIMEOUT_S)
    works_until = time.monotonic() + WORK_S

    questions = []

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
