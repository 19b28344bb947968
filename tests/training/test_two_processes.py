"""Two processes train one run through the real commands: one voice, stop and checkpoint, and a resume (P2, P8, P12)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file, save_file

from llmtune.cli.main import run as command
from llmtune.data.dataset import cache
from llmtune.engine.devices import Devices
from llmtune.engine.update import StepAfterBackward
from llmtune.errors import ConfigError, MachineError
from llmtune.models import tokenizer
from llmtune.training import build
from rank_helpers import LAUNCHER, LONG, LONGEST_S, TwoRanks, environment, in_two_ranks, launched, wait_for_lines
from training_helpers import lines_of, small_run, weights_of

ALONE = "`accelerate launch` was asked for several processes, and has started this one alone"


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    """KEY=VALUE words of a run of 40 steps; `folder / NAME` is where it lies."""
    folder = tmp_path_factory.mktemp("two-ranks")
    given = small_run(tiny_model_folder, rows_file, folder, "training.max_steps=40", "checkpoint.every_steps=1000")
    return folder, [*given, "training.learning_rate=0.01", "distributed.timeout_s=60"]


@pytest.fixture(scope="module")
def whole(words):
    """(folder, everything printed) of a run of two processes that nobody stopped, started by `--devices 2`."""
    folder, given = words
    own = [sys.executable, "-m", "llmtune"]
    return folder / "whole", launched("train", "--devices", "2", *given, "run.name=whole", launcher=own)


@pytest.fixture(scope="module")
def stopped(words):
    """A run of which rank 1 alone got SIGTERM: its folder, exit codes, and what each process printed."""
    folder, given = words
    ranks = TwoRanks("train", *given, "run.name=stopped")
    wait_for_lines(folder / "stopped", 4)
    ranks.processes[1].send_signal(signal.SIGTERM)
    return folder / "stopped", *ranks.end()


def test_one_process_prints_and_the_others_write_to_a_log(whole):
    run, said = whole
    shared = "sequences in all, shared by 2 processes"
    for line in ("chosen for you:", shared, "training 4,096 of", "finished after step 40"):
        assert said.count(line) == 1, said
    log = (run / "logs" / "rank-1.log").read_text()
    assert "chosen for you:" in log
    assert "training 4,096 of" in log


def test_p8_a_signal_to_one_process_stops_all_at_the_same_step_saved_once(stopped):
    run, codes, said = stopped
    assert codes == [128 + signal.SIGTERM] * 2, said
    (step,) = re.findall(r"stopped by SIGTERM: saved after step (\d+)", "".join(said))
    assert "stopped by SIGTERM" in said[0]
    assert "bug" not in "".join(said)
    info = json.loads((run / "run.json").read_text())
    assert (info["state"], info["step"]) == ("stopped", int(step))
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{int(step):06}"]


def test_p2_a_run_of_two_processes_goes_on_to_the_same_bytes(whole, stopped):
    run, _, _ = stopped
    codes, said = TwoRanks("resume", str(run)).end()
    assert codes == [0, 0], said
    assert "".join(said).count("going on after step") == 1, said
    assert weights_of(run) == weights_of(whole[0])
    assert lines_of(run) == lines_of(whole[0])


def test_p9_the_same_config_on_one_process_is_the_same_run(words, whole):
    """Dropout is drawn in each process, and changes the loss from the second step on; `tests/engine/test_two_ranks.py`
    compares all losses without it.
    """
    folder, given = words
    assert command(["train", *given, "run.name=alone"]) == 0
    alone, together = lines_of(folder / "alone"), lines_of(whole[0])
    assert sum("rows_digest" in line for line in alone) == 40
    for key in ("step", "epoch", "progress", "learning_rate", "num_tokens", "num_loss_tokens", "rows_digest"):
        assert [line.get(key) for line in alone] == [line.get(key) for line in together], key
    first, second = (next(line for line in lines if "train_mean_nll" in line) for lines in (alone, together))
    assert second["train_mean_nll"] == pytest.approx(first["train_mean_nll"], rel=1e-6)


@pytest.mark.campaign
@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_adapters_that_begin_with_a_part_of_the_base_are_the_same_on_two_processes(words, init):
    folder, given = words
    quantized = ["model.quantization=4bit"] if init == "loftq" else []
    options = [*given, *quantized, f"adapter.init={init}", "adapter.dropout=0", "training.max_steps=4"]
    assert command(["train", *options, f"run.name={init}-alone"]) == 0
    launched("train", "--devices", "2", *options, f"run.name={init}-both", launcher=[sys.executable, "-m", "llmtune"])
    alone, both = (
        [line["train_mean_nll"] for line in lines_of(folder / f"{init}-{who}") if "train_mean_nll" in line]
        for who in ("alone", "both")
    )
    assert len(alone) == 4
    assert both == pytest.approx(alone, abs=2e-6)


def test_processes_that_are_started_otherwise_are_refused_before_the_first_step(words):
    """The keys are named, and the process; the error is printed once."""
    folder, given = words
    other = {"training.learning_rate": 0.1, "run.seed": 7, "data.shuffle_seed": 2, "training.max_steps": 6}
    here = {"training.learning_rate": 0.01, "run.seed": 42, "data.shuffle_seed": 42, "training.max_steps": 40}
    own = ((), tuple(f"{key}={value}" for key, value in other.items()))
    codes, said = TwoRanks("train", *given, "run.name=otherwise", own=own).end()
    assert codes == [ConfigError.exit_code] * 2, said
    for key, there in other.items():
        text = f"process 1 ({socket.gethostname()}) differs from process 0: {key} is {there} there and {here[key]} here"
        assert "".join(said).count(text) == 1, said
    assert not (folder / "otherwise").exists()


def fewer_rows(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:-1]))


def another_template(folder):
    file = folder / "model" / "chat_template.jinja"
    file.write_text(file.read_text() + "{# of another version #}")


def other_weights(folder):
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (fewer_rows, "training rows"),
        pytest.param(another_template, "chat template and masks", marks=pytest.mark.campaign),
        pytest.param(other_weights, "base model", marks=pytest.mark.campaign),
    ],
)
def test_processes_with_other_files_are_refused_before_the_first_step(
    tiny_model_folder, rows_file, tmp_path, change, key
):
    """The same command, in folders of their own."""
    for rank in range(2):
        shutil.copytree(tiny_model_folder, tmp_path / str(rank) / "model")
        shutil.copy(rows_file, tmp_path / str(rank) / "rows.jsonl")
    change(tmp_path / "1")
    given = small_run(Path("./model"), Path("rows.jsonl"), tmp_path / "runs", "run.name=other", "training.max_steps=4")

    def start():
        os.chdir(tmp_path / os.environ["RANK"])
        return command(["train", *given])

    codes, said = in_two_ranks(start)
    assert codes == [ConfigError.exit_code] * 2, said
    assert "".join(said).count(f"process 1 ({socket.gethostname()}) differs from process 0: {key} is") == 1, said
    assert not (tmp_path / "runs" / "other").exists()


def test_one_process_trains_the_tokenizer_and_tokenizes(rows_file, tmp_path, monkeypatch):
    """In a cold cache, for a model from scratch; the others wait, and get both."""

    def noted(module, name, *which):
        real = getattr(module, name)

        def call(*given, **named):
            with (tmp_path / name).open("a") as file:
                file.write(" ".join([os.environ["RANK"], *(str(given[index]) for index in which)]) + "\n")
            return real(*given, **named)

        monkeypatch.setattr(module, name, call)

    noted(tokenizer, "train_tokenizer")
    noted(cache, "build_set", 1)
    given = small_run(Path("custom-nano"), rows_file, tmp_path / "runs", "adapter.method=none", "run.name=scratch")
    more = ("training.max_steps=2", f"data.cache_dir={tmp_path / 'cache'}")
    codes, said = in_two_ranks(lambda: command(["train", *given, *more]))
    assert codes == [0, 0], said
    assert (tmp_path / "train_tokenizer").read_text() == "0\n"
    keys = [line.split()[1] for line in (tmp_path / "build_set").read_text().splitlines()]
    assert len(keys) == len(set(keys)) > 0


def test_a_wrong_command_is_refused_once(words):
    said = launched("train", *words[1], "training.lerning_rate=1", code=1)
    assert said.count("error: unknown key") == 1, said


def signal_launcher(words, name, number):
    folder, given = words
    process = subprocess.Popen(
        [*LAUNCHER, "train", *given, f"run.name={name}", "training.max_steps=4000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_lines(folder / name, 4)
    process.send_signal(number)
    said = process.communicate(timeout=LONGEST_S)[0]
    return folder / name, said


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL])
def test_p8_a_signal_to_the_launcher_saves_once(words, number):
    """Those that torchrun does not handle end it at once; its processes still agree, by a store of their own."""
    run, said = signal_launcher(words, f"launcher-{number}", number)
    assert len(re.findall(r"stopped by \w+: saved after step", said)) == 1, said
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("whom", ["the command", "its process group"])
def test_p8_a_signal_to_a_command_with_devices_saves_once_and_is_its_exit_code(words, number, whom):
    folder, given = words
    run = folder / f"devices-{number}-{whom}"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtune", "train", "--devices", "2", *given, f"run.name={run.name}", LONG],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_lines(run, 4)
    if whom == "the command":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)  # as a terminal does at Ctrl-C
    said = process.communicate(timeout=LONGEST_S)[0]
    assert process.returncode == 128 + number, said
    assert len(re.findall(r"stopped by \w+: saved after step", said)) == 1, said
    assert "elastic" not in said
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"


def test_devices_must_be_at_least_one(words):
    said = launched("train", "--devices", "0", *words[1], code=2, launcher=[sys.executable, "-m", "llmtune"])
    assert "name how many processes train, from 1" in said


def test_devices_are_not_passed_over_under_another_launcher(words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command(["train", "--devices", "2", *words[1]]) == 2
    assert "2 devices were asked for, and 4 processes are started already" in capsys.readouterr().err


def of_accelerate(*options):
    """The environment in which the installed accelerate starts a command with these options of its launcher."""
    own_defaults = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = launch_command_parser().parse_args([*options, *own_defaults, "-m", "llmtune"])
    return prepare_simple_launcher_cmd_env(arguments)[1]


def test_a_process_that_accelerate_starts_alone_for_several_on_a_cpu_is_refused():
    for options in (["--cpu"], ["--cpu", "--num_processes", "1"]):
        alone = Devices.from_environment(no_cuda=True, timeout_s=1, environ=of_accelerate(*options))
        assert alone.world_size == 1
    with pytest.raises(MachineError, match=ALONE) as refused:
        Devices.from_environment(no_cuda=True, timeout_s=1, environ=of_accelerate("--cpu", "--num_processes", "2"))
    assert "`llmtune train --devices N`" in str(refused.value)


@pytest.mark.campaign
def test_accelerate_on_a_cpu_trains_alone_where_asked_and_is_refused_for_two(words):
    folder, given = words
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    said = launched("train", *given, "run.name=for-two", code=1, launcher=[*launcher, "2", "-m", "llmtune"])
    assert said.count(ALONE) == 1, said
    assert f"non-zero exit status {MachineError.exit_code}" in said  # accelerate ends with 1 of its own
    assert not (folder / "for-two").exists()
    said = launched("train", *given, "run.name=for-one", launcher=[*launcher, "1", "-m", "llmtune"])
    assert "finished after step 40" in said


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_p8_every_signal_to_any_process_stops_all(words, number, ranks):
    folder, given = words
    name = f"signal-{number}-{len(ranks)}-{ranks[0]}"
    both = TwoRanks("train", *given, f"run.name={name}", "training.max_steps=4000")
    wait_for_lines(folder / name, 4)
    for rank in ranks:
        both.processes[rank].send_signal(number)
    codes, said = both.end()
    assert codes == [128 + number] * 2, said
    assert len(re.findall(r"stopped by \w+: saved after step", "".join(said))) == 1, said
    assert json.loads((folder / name / "run.json").read_text())["state"] == "stopped"


@pytest.mark.campaign
@pytest.mark.parametrize("time", range(5))
def test_minutes_end_all_processes_at_the_same_step(words, time):
    """Each has a clock of its own."""
    folder, given = words
    both = TwoRanks("train", *given, f"run.name=minutes-{time}", LONG, f"training.max_minutes={0.01 + time / 300}")
    codes, said = both.end()
    assert codes == [0, 0], said
    assert len(re.findall("stopped after 0.0.* minutes", "".join(said))) == 1, said
    assert json.loads((folder / f"minutes-{time}" / "run.json").read_text())["state"] == "stopped"


@pytest.mark.campaign
def test_p7_a_disk_that_refuses_the_main_process_ends_all(words):
    """The folder of checkpoints becomes a file while they train: nothing can be saved there."""
    folder, given = words
    both = TwoRanks("train", *given, "run.name=refused", LONG, "checkpoint.every_steps=50")
    wait_for_lines(folder / "refused", 4)
    (folder / "refused" / "checkpoints").rename(folder / "away")
    (folder / "refused" / "checkpoints").write_text("")
    codes, said = both.end()
    assert codes == [6, 6], said
    assert "".join(said).count("error: ") == 1, said


def test_q8_a_process_without_memory_names_the_newest_checkpoint_whichever_it_is(
    tiny_model_folder, rows_file, tmp_path, monkeypatch
):
    """After a save of this run, in a resumed one before its first save, and while that loads its model."""
    more = ("training.max_steps=4", "checkpoint.every_steps=2", "run.name=full")
    given = small_run(tiny_model_folder, rows_file, tmp_path, *more)
    saved = tmp_path / "full" / "checkpoints" / "step-000002"

    def used_up(module, name):
        """What process 1 says, whose memory is used up in this function once the checkpoint is there."""
        real = getattr(module, name)

        def fails(*given, **named):
            if os.environ["RANK"] == "1" and saved.exists():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return real(*given, **named)

        monkeypatch.setattr(module, name, fails)
        start = ["resume", str(tmp_path / "full")] if saved.exists() else ["train", *given]
        codes, said = in_two_ranks(lambda: command(start))
        monkeypatch.undo()
        assert codes[1] == MachineError.exit_code, said
        return said[1]

    for said, when in (
        (used_up(StepAfterBackward, "finish_gradients"), "in step 3"),
        (used_up(StepAfterBackward, "finish_gradients"), "in step 3"),
        (used_up(build, "load_model"), "while the model was loaded"),
    ):
        assert re.search(f"used up {when}: .*; the newest checkpoint is step-000002", said), said
        assert "fix: go on with `llmtune resume`" in said
        assert when != "in step 3" or f"where: {tmp_path / 'full'}\n" in said, said


@pytest.mark.campaign
def test_a_run_that_another_process_has_is_refused_once_on_two_processes(words):
    folder, given = words
    both = TwoRanks("train", *given, "run.name=busy", LONG)
    wait_for_lines(folder / "busy", 4)
    said = launched("resume", str(folder / "busy"), code=1)
    for process in both.processes:
        process.send_signal(signal.SIGTERM)
    assert said.count("the run is in use by process") == 1, said
    assert both.end()[0] == [143, 143]
