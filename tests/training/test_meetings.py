"""Processes that meet again: each training of a program has messages of its own, wherever its processes meet (P12)."""

import gc
import json
import os
import signal
import time

import pytest
import torch.distributed as dist

from llmtune.api.trainer import Trainer
from llmtune.cli.main import run as command
from llmtune.config.layers import load_config
from llmtune.engine.devices import Devices
from llmtune.errors import RankLostError
from llmtune.training import training_run
from rank_helpers import end_of, environment, in_two_ranks, places
from training_helpers import Forked, small_run, weights_of, words_as_yaml

AGAIN_AFTER_S = 0.3
"""The main process comes later to the second meeting: what the first has left would be read by then."""


def serve(port):
    """The store of a launcher: every process is a guest there, and it outlives their trainings."""
    _store = dist.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    signal.pause()


def in_launcher(function):
    """Run `function()` in two processes whose launcher keeps the store where they meet."""
    ranks = [place | {"TORCHELASTIC_USE_AGENT_STORE": "True"} for place in places()]
    port = ranks[0]["MASTER_PORT"]
    launcher = Forked(lambda: serve(port))
    try:
        # As a launcher it listens before it starts any process.
        dist.TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
        return end_of([Forked(function, environ=environment(**rank)) for rank in ranks])
    finally:
        launcher.kill()
        launcher.wait()


def in_group(function):
    """Run `function()` in two processes of a program that has made their process group."""

    def start():
        dist.init_process_group("gloo")
        return function()

    return in_two_ranks(start)


def meet_twice():
    kept = []  # by a user's program, which holds its first trainer
    for said in ("first", "second"):
        devices = Devices.from_environment(no_cuda=True, timeout_s=20)
        kept.append(devices)
        if devices.is_main and said == "second":
            time.sleep(AGAIN_AFTER_S)
        assert devices.from_main(said if devices.is_main else None) == said
        devices.check_alike({"meeting": said})
        assert devices.sum(1.0) == (2.0,)
        devices.close(wait_for_main=True)
        if devices.is_main:
            time.sleep(AGAIN_AFTER_S)


@pytest.mark.parametrize("start", [in_two_ranks, in_group, in_launcher])
def test_no_meeting_reads_what_an_earlier_one_has_left(start):
    codes, said = start(meet_twice)
    assert codes == [0, 0], "\n".join(said)


def test_a_process_that_comes_before_the_main_one_has_left_the_first_meeting_waits_for_the_second():
    def meet_again():
        devices = Devices.from_environment(no_cuda=True, timeout_s=20)
        devices.close(wait_for_main=True)
        if devices.is_main:
            time.sleep(AGAIN_AFTER_S)  # process 1 has come to the store again by then
        del devices
        gc.collect()
        devices = Devices.from_environment(no_cuda=True, timeout_s=20)
        assert devices.sum(1.0) == (2.0,)
        devices.close(wait_for_main=True)

    codes, said = in_two_ranks(meet_again)
    assert codes == [0, 0], "\n".join(said)


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    """KEY=VALUE words of a run of two steps; its folder lies beside the cache of its rows."""
    folder = tmp_path_factory.mktemp("meetings")
    more = ("training.max_steps=2", "distributed.timeout_s=20", f"data.cache_dir={folder / 'cache'}")
    return small_run(tiny_model_folder, rows_file, folder / "runs", *more)


@pytest.mark.parametrize("start", [in_two_ranks, in_group])
def test_a_second_training_of_a_program_is_the_first_one_again(start, words, tmp_path):
    def train_twice():
        trainers = []
        for name in ("first", "second"):
            own = [f"run.output_dir={tmp_path}", f"run.name={name}"]
            trainers.append(Trainer(load_config(None, overrides=[*words, *own], environ={})))
            trainers[-1].train()

    codes, said = start(train_twice)
    assert codes == [0, 0], "\n".join(said)
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second")
    first, second = ((tmp_path / name / "logs" / "rank-1.log").read_text() for name in ("first", "second"))
    assert first.count("training 4,096 of") == second.count("training 4,096 of") == 1


def test_a_sweep_under_a_launcher_trains_all_its_runs_in_all_processes_and_goes_on(words, tmp_path):
    (tmp_path / "basis.yaml").write_text(words_as_yaml(words))
    (tmp_path / "try.yaml").write_text("extends: basis.yaml\nsweep: {keys: {adapter.r: [2, 4]}}\n")
    for again in (False, True):
        codes, said = in_launcher(lambda: command(["sweep", str(tmp_path / "try.yaml"), "--json"]))
        assert codes == [0, 0], "\n".join(said)
        rows = [json.loads(line) for line in said[0].splitlines() if line.startswith("{")]
        assert [(row["state"], row["step"]) for row in rows] == [("finished", 2)] * 2
        assert said[0].count("finished before, after step 2") == 2 * again
        assert said[1] == "", "one process prints"


def test_a_sweep_ends_where_a_process_is_lost(words, tmp_path, monkeypatch):
    """No process waits until the time-out for the dead one to come to the next run."""
    (tmp_path / "basis.yaml").write_text(words_as_yaml(words))
    (tmp_path / "lost.yaml").write_text("extends: basis.yaml\nsweep: {keys: {adapter.r: [2, 4]}}\n")
    real = training_run.train_steps

    def train_steps(*given, **named):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    monkeypatch.setattr(training_run, "train_steps", train_steps)
    codes, said = in_two_ranks(lambda: command(["sweep", str(tmp_path / "lost.yaml")]))
    assert codes == [RankLostError.exit_code, -signal.SIGKILL], "\n".join(said)
    assert "run 1 of 2" in said[0]
    assert "run 2 of 2" not in said[0], said[0]


def test_runs_side_by_side_are_refused_under_a_launcher(tmp_path, monkeypatch, capsys):
    """Each of its processes would train all of them."""
    (tmp_path / "try.yaml").write_text("sweep: {keys: {training.learning_rate: [0.1, 0.2]}}\n")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert command(["sweep", str(tmp_path / "try.yaml"), "--devices", "2"]) == 2
    assert "2 runs at once were asked for, and 2 processes are started already" in capsys.readouterr().err
