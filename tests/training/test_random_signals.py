"""P8: signals at random moments to one process, to all, or to the launcher; nothing is lost, and the run goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict

import peft  # noqa: F401 - once here, not in every child
import pytest
import transformers.models.llama.modeling_llama  # noqa: F401

from rank_helpers import LAUNCHER, LONGEST_S, TwoRanks, environment, processes_of, recorded
from training_helpers import line_count, lines_of, small_run, weights_of

pytestmark = pytest.mark.campaign

LAUNCHERS = {
    "--devices": [sys.executable, "-m", "llmtune", "train", "--devices", "2"],
    "torchrun": [*LAUNCHER, "train"],
}
WHOM = ("one process", "all processes", "the launcher")
LIVES = range(*map(int, os.environ.get("LLMTUNE_LIVES", "0 20").split()))
"""Of each signal with each launcher. `LLMTUNE_LIVES="10 15"` makes some of them, which are the same as in a whole."""
STEPS = 300
TRAINING_S = 3.0
"""About as long as the steps take on two free cores."""


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    more = (f"training.max_steps={STEPS}", "checkpoint.every_steps=100", "distributed.timeout_s=60")
    return folder, [*small_run(tiny_model_folder, rows_file, folder, *more), "evaluation.every_steps=25"]


@pytest.fixture(scope="module")
def whole(words):
    folder, given = words
    codes, said = TwoRanks("train", *given, "run.name=whole").end()
    assert codes == [0, 0], said
    return folder / "whole"


def send(number, whom, process, name, chance):
    """Send the signal; a process that is not there yet, or no longer, gets none."""
    ranks = list(processes_of(name).values())
    receivers = {
        "one process": [chance.choice(ranks)] if ranks else [],
        "all processes": ranks,
        "the launcher": [process.pid],
    }[whom]
    for receiver in receivers or [process.pid]:
        try:
            os.kill(receiver, number)
        except ProcessLookupError:
            continue


def life(words, launcher, number, whom, chance, name):
    """Start a run and send it the signal at a moment of its start (one of four) or of its training.

    Returns the exit code, what was printed, whether a step had been made when the signal was sent, and the seconds from
    the signal to the end.
    """
    folder, given = words
    run = folder / name
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], *given, f"run.name={name}"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    began = time.monotonic()
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 6))
    else:
        while line_count(run / "metrics.jsonl") < 1 and process.poll() is None:
            assert time.monotonic() - began < LONGEST_S
            time.sleep(0.01)
        time.sleep(chance.uniform(0, TRAINING_S))
    has_begun = line_count(run / "metrics.jsonl") > 0
    sent = time.monotonic()
    send(number, whom, process, name, chance)
    said = process.communicate(timeout=LONGEST_S)[0]
    took = time.monotonic() - sent
    assert processes_of(name) == {}, "processes outlive the run"
    return process.returncode, said, has_begun, took


def allowed_codes(launcher, number, whom):
    """Exit codes of a stopped run; torchrun has one of its own for processes that fail, and shows theirs."""
    if launcher == "--devices":
        return {128 + number}
    is_unhandled = whom == "the launcher" and number == signal.SIGUSR1
    return {-number} if is_unhandled else {1}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_p8_a_signal_at_a_random_moment_loses_nothing(words, whole, launcher, number):
    """Every life but those that end before their first step goes on to the bytes of the run nobody stopped."""
    folder, _ = words
    ends = defaultdict(list)
    for count in LIVES:
        chance = random.Random(f"{launcher} {number} {count}")
        whom, name = WHOM[count % len(WHOM)], f"{launcher.strip('-')}-{number}-{count}"
        code, said, has_begun, took = life(words, launcher, number, whom, chance, name)
        run = folder / name
        info = json.loads((run / "run.json").read_text()) if run.exists() else {"state": "nothing to save"}
        told = (whom, has_begun, code, info, said)
        if info["state"] == "finished":
            assert code == 0 or whom == "the launcher", told
        elif info["state"] == "stopped":
            assert code in allowed_codes(launcher, number, whom), told
            assert said.count(": saved after step") == 1, told
            logged = max(line["step"] for line in lines_of(run))
            assert (run / "checkpoints" / f"step-{info['step']:06}").is_dir(), told
            assert logged == info["step"], told
        else:  # stopped while it started: a process that had no handler yet counts as lost
            assert not has_begun, told
            assert code in {*allowed_codes(launcher, number, whom), 8, -number}, told
        if info["state"] == "stopped":
            codes, resumed = TwoRanks("resume", str(run)).end()
            assert codes == [0, 0], resumed
        if info["state"] in ("finished", "stopped"):
            assert weights_of(run) == weights_of(whole), told
            assert lines_of(run) == lines_of(whole), told
        ends[info["state"], whom, code].append(took)
        recorded(
            launcher=launcher, signal=signal.Signals(number).name, whom=whom, state=info["state"], code=code,
            seconds=round(took, 2),
        )  # fmt: skip
    print(f"\n{launcher} {signal.Signals(number).name}")
    for end, times in sorted(ends.items()):
        print("  ", *end, len(times), f"at most {max(times):.1f} s")
