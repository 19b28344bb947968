"""P2, P3, P5, P8, N13: a run that was stopped, in any way, ends as the run that never was."""

import json
import shutil
import signal

import pytest

from llmtune.config.process_options import Options
from llmtune.errors import CheckpointError, DivergedError, StoppedBySignal
from llmtune.kernels import tiled_mlp
from llmtune.runs.folder import RunFolder
from llmtune.runs.signals import StopRequest
from llmtune.training import checkpointer
from llmtune.training import train as training
from training_helpers import KINDS, LORA, in_child, line_count, lines_of, weights_of


@pytest.fixture(scope="module")
def finished():
    """Folders of runs that nobody stopped, by their settings."""
    return {}


@pytest.fixture
def unbroken(config_of, finished, tmp_path_factory):
    """Train a run that nobody stops, once for all tests, and return its folder; read only."""

    def train(*overrides):
        if overrides not in finished:
            elsewhere = f"run.output_dir={tmp_path_factory.mktemp('unbroken')}"
            finished[overrides] = training.train(config_of(*overrides, elsewhere, name="unbroken")).folder
        return finished[overrides]

    return train


def assert_same_run(one, other):
    assert lines_of(one) == lines_of(other)
    assert weights_of(one) == weights_of(other)
    assert (one / "ledger.jsonl").read_bytes() == (other / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_p2_a_killed_run_resumes_to_the_same_bytes(kind, config_of, unbroken, tmp_path):
    whole = unbroken(*KINDS[kind])
    stopped = tmp_path / "runs" / "stopped"
    enough = line_count(whole / "metrics.jsonl") * 2 // 3
    code = in_child(
        lambda: training.train(config_of(*KINDS[kind], name="stopped")),
        kill_when=lambda: line_count(stopped / "metrics.jsonl") >= enough,
    )
    assert code == -signal.SIGKILL
    assert not (stopped / "checkpoints" / "final").exists()
    result = training.resume(str(stopped))
    assert result.state == "finished"
    assert_same_run(whole, stopped)


def test_p2_a_run_in_tiles_stopped_and_resumed_ends_the_same(config_of, unbroken, tmp_path, monkeypatch):
    """Dropout inside tiles of 16 tokens is drawn again as it was."""
    monkeypatch.setattr(tiled_mlp, "tokens_of_tile", lambda _width: 16)
    settings = (*LORA, "model.gradient_checkpointing=offload")
    whole = unbroken(*settings)
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(*settings, name="stopped")),
        kill_when=lambda: line_count(stopped / "metrics.jsonl") >= 5,
    )
    assert not (stopped / "checkpoints" / "final").exists()
    training.resume(str(stopped))
    assert_same_run(whole, stopped)
    said = [one for one in json.loads((whole / "run.json").read_text())["decisions"] if "training.tiles" in str(one)]
    assert "16 tokens" in str(said)


def test_p2_a_run_killed_before_its_first_checkpoint_starts_again_and_ends_the_same(config_of, unbroken, tmp_path):
    whole = unbroken(*LORA)
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(*LORA, name="stopped")),
        kill_when=lambda: line_count(stopped / "metrics.jsonl") >= 2,
    )
    assert list((stopped / "checkpoints").glob("step-*")) == []
    training.resume(str(stopped))
    assert_same_run(whole, stopped)


def test_n14_ten_kills_in_one_run_change_nothing(config_of, unbroken, tmp_path):
    whole = unbroken(*LORA, "checkpoint.every_steps=1")
    stopped = tmp_path / "runs" / "stopped"
    metrics = stopped / "metrics.jsonl"
    start = lambda: training.train(config_of(*LORA, "checkpoint.every_steps=1", name="stopped"))  # noqa: E731
    for kill in range(10):
        in_child(start, kill_when=lambda kill=kill: line_count(metrics) >= 2 + kill)
        start = lambda: training.resume(str(stopped))  # noqa: E731
    training.resume(str(stopped))
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_p8_a_signal_finishes_the_step_saves_and_exits_with_128_plus_its_number(number, config_of, tmp_path):
    stopped = tmp_path / "runs" / "stopped"
    code = in_child(
        lambda: training.train(config_of(*LORA, "checkpoint.every_steps=1000", "training.epochs=50", name="stopped")),
        kill_when=lambda: line_count(stopped / "metrics.jsonl") >= 4,
        signal_number=number,
    )
    assert code == 128 + number
    info = json.loads((stopped / "run.json").read_text())
    assert info["state"] == "stopped"
    saved = list((stopped / "checkpoints").glob("step-*"))
    assert [one.name for one in saved] == [f"step-{info['step']:06d}"]


def test_p8_a_run_stopped_by_a_signal_resumes_to_the_same_bytes(config_of, unbroken, tmp_path):
    whole = unbroken(*LORA)
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(*LORA, name="stopped")),
        kill_when=lambda: line_count(stopped / "metrics.jsonl") >= 5,
        signal_number=signal.SIGTERM,
    )
    training.resume(None, overrides=[f"run.output_dir={tmp_path / 'runs'}"])
    assert_same_run(whole, stopped)


def test_p5_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(config_of, unbroken, tmp_path):
    whole = unbroken(*LORA, "checkpoint.every_steps=2")
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(*LORA, "checkpoint.every_steps=2", name="stopped")),
        kill_when=lambda: (stopped / "checkpoints" / "step-000006").is_dir(),
    )
    newest = max((stopped / "checkpoints").glob("step-??????"))
    tensors = newest / "optimizer.safetensors"
    bytes_ = bytearray(tensors.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    tensors.write_bytes(bytes_)
    said = []
    training.resume(str(stopped), print_line=said.append)
    assert any("damaged" in line and newest.name in line for line in said)
    assert_same_run(whole, stopped)


def test_p5_when_all_checkpoints_are_damaged_nothing_starts_from_zero(config_of, tmp_path):
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(name="stopped")),
        kill_when=lambda: (stopped / "checkpoints" / "step-000003").is_dir(),
    )
    for manifest in (stopped / "checkpoints").glob("step-*/state.json"):
        manifest.write_text("{}")
    before = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    with pytest.raises(CheckpointError) as refusal:
        training.resume(str(stopped))
    assert refusal.value.exit_code == 5
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == before


def test_another_training_needs_a_flag_and_another_shape_is_refused(config_of, tmp_path, rows_file):
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(*LORA, name="stopped")),
        kill_when=lambda: (stopped / "checkpoints" / "step-000003").is_dir(),
    )
    with pytest.raises(CheckpointError, match=r"another training.*learning_rate"):
        training.resume(str(stopped), overrides=["training.learning_rate=0.5"])
    with pytest.raises(CheckpointError, match=r"no longer fits.*adapter\.r"):
        training.resume(str(stopped), overrides=["adapter.r=8"], allow_changes=True)
    result = training.resume(str(stopped), overrides=["training.learning_rate=0.005"], allow_changes=True)
    assert result.state == "finished"


def test_n13_the_same_command_twice_gives_the_same_bytes(config_of):
    one = training.train(config_of(*LORA, name="one")).folder
    two = training.train(config_of(*LORA, name="two")).folder
    assert_same_run(one, two)


def test_n12_observers_change_no_byte_of_the_final_weights(config_of):
    watched = training.train(
        config_of(*LORA, "evaluation.prompts=[hello there]", "evaluation.max_new_tokens=4", name="watched")
    ).folder
    alone = training.train(
        config_of(
            *LORA,
            "evaluation.every_steps=null",
            "evaluation.before_training=false",
            "tracking.every_steps=5",
            "tracking.trackers=[console]",
            "checkpoint.every_steps=1000",
            name="alone",
        )
    ).folder
    assert weights_of(watched) == weights_of(alone)


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(config_of):
    run = training.train(config_of(*LORA)).folder
    before = (weights_of(run), (run / "metrics.jsonl").read_bytes())
    said = []
    assert training.resume(str(run), print_line=said.append).state == "finished"
    step = before[1].count(b"train_mean_nll")
    assert said == [
        f"{run.name}: finished after step {step} already; it goes on only where a changed key asks for more steps"
    ]
    assert before == (weights_of(run), (run / "metrics.jsonl").read_bytes())


def test_a_stop_request_is_an_error_of_its_own_kind():
    assert StoppedBySignal(15, "x").exit_code == 143


def test_a_moved_run_folder_resumes(config_of, unbroken, tmp_path):
    whole = unbroken(*LORA)
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(*LORA, name="stopped")),
        kill_when=lambda: (stopped / "checkpoints" / "step-000006").is_dir(),
    )
    moved = tmp_path / "elsewhere" / "stopped"
    moved.parent.mkdir()
    shutil.move(stopped, moved)
    training.resume(str(moved))
    assert_same_run(whole, moved)


def break_a_weight(session):
    next(iter(session.setup.parameters.values())).data[0, 0] = float("inf")


@pytest.mark.parametrize("saved", [[], ["step-000003"]], ids=["never saved", "saved at step 3"])
@pytest.mark.parametrize("way", ["the caller leaves", "a signal", "it goes on"])
def test_p10_weights_that_are_not_finite_are_never_saved_and_end_the_run_as_diverged(way, saved, config_of, tmp_path):
    """Exit 7, state `diverged`, and the last good checkpoint named, whoever asked for the save (or nobody: then the
    budget ends it).
    """
    stop = StopRequest()
    session = training.open_run(config_of(*LORA, name="broken"), Options(), stop, print_line=lambda line: None)
    steps = session.steps()
    for _ in range(4 if saved else 1):
        next(steps)
    break_a_weight(session)
    if way == "a signal":
        stop.request()
    with pytest.raises(DivergedError, match=r"weights are no longer finite after step \d|windows skipped") as caught:
        steps.close() if way == "the caller leaves" else [*steps]
    run = tmp_path / "runs" / "broken"
    named = (
        f"the last good checkpoint is {run / 'checkpoints' / 'step-000003'}"
        if saved
        else "no checkpoint was saved before"
    )
    assert named in str(caught.value)
    assert caught.value.exit_code == 7
    assert json.loads((run / "run.json").read_text())["state"] == "diverged"
    assert sorted(one.name for one in (run / "checkpoints").glob("step-*")) == saved
    if saved:
        assert training.resume(str(run)).state == "finished"


@pytest.mark.parametrize("kind", [LORA, ()], ids=["adapter", "full"])
def test_p5_weights_changed_after_they_were_verified_never_reach_the_model(kind, config_of, tmp_path):
    session = training.open_run(config_of(*kind, name="run"), Options(), StopRequest(), print_line=lambda line: None)
    steps = session.steps()
    next(steps)
    steps.close()
    with RunFolder.open(tmp_path / "runs" / "run") as run:
        loaded, _ = checkpointer.find_checkpoint(run, None)
        (weights,) = (one for one in loaded.path.glob("*model.safetensors"))
        changed = bytearray(weights.read_bytes())
        changed[-1] ^= 1
        weights.write_bytes(changed)
        with pytest.raises(CheckpointError, match="sha256 does not fit"):
            checkpointer.restore_weights(session.setup, loaded)
