"""P2: what changed between a stop and a resume is found, by digest where it is a file, and answered by what it does,
key by key.

Harmless: the run goes on. Rounding: said before the first step. Another schedule: needs --allow-changes. Other shapes:
refused.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from disk_faults import Unsynced
from llmtune import durable
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.errors import CheckpointError
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.plan.resolve_auto import OPEN_VALUES
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from training_helpers import LORA, lines_of, weights_of


@pytest.fixture(autouse=True)
def _unsynced():
    with durable.use_backend(Unsynced()):
        yield


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """Where the one run of this file that was stopped lies, to be copied; empty until the first test needs it."""
    return tmp_path_factory.mktemp("stopped-once")


@pytest.fixture
def stopped(config_of, stopped_once, tmp_path):
    """A copy of its own of a run that was stopped after its first step of two."""
    if not (stopped_once / "stopped").exists():
        config = config_of(*LORA, "training.max_steps=2", f"run.output_dir={stopped_once}", name="stopped")
        session = training.open_run(config, Options(), StopRequest(), print_line=lambda line: None)
        steps = session.steps()
        next(steps)
        steps.close()
    return Path(shutil.copytree(stopped_once / "stopped", tmp_path / "runs" / "stopped"))


def resume(run, *overrides, allow_changes=False):
    """Returns what was said before the first step."""
    said = []
    assert (
        training.resume(str(run), overrides=overrides, allow_changes=allow_changes, print_line=said.append).state
        == "finished"
    )
    return "\n".join(said)


def copy_of_rows(rows_file, tmp_path, change=lambda text: text):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(change(rows_file.read_text()))
    return f"data.train={copy}"


def copy_of_model(tiny_model_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_folder, copy)
    return copy


def edit_json(path, *keys, to):
    value = whole = json.loads(path.read_text())
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = to
    path.write_text(json.dumps(whole))


def as_of_an_earlier_version(run):
    """Edit a run to what earlier versions wrote: open values in its identity, and a key that is gone."""
    given = load_config(str(run / "config.yaml"), environ={}).config
    open_keys = [row for row in OPEN_VALUES if getattr(getattr(given, row[0]), row[1]) == row[2]]
    assert ("training", "weight_decay", None) in open_keys
    for section, key, is_open in open_keys:
        edit_json(run / "run.json", "identity", "config", section, key, to=is_open)
    edit_json(run / "run.json", "identity", "config", "model", "weights_prepack", to=False)
    (source,) = given.data.train
    known = {key: getattr(source, key) for key in ("path", "config", "split", "weight", "max_samples")}
    edit_json(run / "run.json", "identity", "config", "data", "train", to=[known])
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("\nmodel:\n", "\nmodel:\n  weights_prepack: auto\n", 1))
    assert "weights_prepack" in config.read_text()


def test_a_run_of_an_earlier_version_is_resumed_and_used(stopped, config_of):
    whole = training.train(config_of(*LORA, "training.max_steps=2", name="whole")).folder
    as_of_an_earlier_version(stopped)
    said = resume(stopped)
    assert "model.weights_prepack" in said
    assert "data.train" not in said.partition("changed:")[2]
    assert "another training" not in said
    assert weights_of(stopped) == weights_of(whole)
    assert load_inference_model(str(stopped), no_cuda=True).is_adapted


def test_a_value_that_an_earlier_version_left_open_is_no_longer_when_it_is_changed(stopped):
    as_of_an_earlier_version(stopped)
    with pytest.raises(CheckpointError, match=r"weight_decay was None, is now 0\.5"):
        resume(stopped, "training.weight_decay=0.5")


def test_a_run_is_used_as_it_was_trained_whatever_the_environment_says(stopped, monkeypatch):
    resume(stopped)
    monkeypatch.setenv("LLMTUNE_DATA__TRAIN_ON", "all_tokens")
    assert load_inference_model(str(stopped), no_cuda=True).config.data.train_on == "all_assistant_messages"


def test_a_moved_or_touched_data_file_is_the_same_data(stopped, config_of, rows_file, tmp_path):
    whole = training.train(config_of(*LORA, "training.max_steps=2", name="whole")).folder
    moved = copy_of_rows(rows_file, tmp_path)
    os.utime(tmp_path / "copy.jsonl", (1, 1))
    resume(stopped, moved)
    assert weights_of(stopped) == weights_of(whole)
    assert lines_of(stopped) == lines_of(whole)


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace("user asks", "user asked", 1), lambda text: text[: text.rindex("\n", 0, -1) + 1]],
)
def test_a_changed_or_shortened_data_file_needs_the_users_word(stopped, rows_file, tmp_path, change):
    changed = copy_of_rows(rows_file, tmp_path, change)
    with pytest.raises(CheckpointError, match=r"another training: digests\.train was"):
        resume(stopped, changed)
    assert "digests.train was" in resume(stopped, changed, allow_changes=True)


def test_a_moved_model_is_the_same_model(stopped, tiny_model_folder, tmp_path):
    said = resume(stopped, f"model.name={copy_of_model(tiny_model_folder, tmp_path)}")
    assert "digests" not in said


def test_another_base_is_refused_whatever_is_said(stopped, tiny_model_folder, tmp_path):
    """One weight moved by its last bit."""
    from safetensors.torch import load_file, save_file

    copy = copy_of_model(tiny_model_folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    one = tensors["model.norm.weight"]
    one[0] = one[0].nextafter(one[0] + 1)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no longer fits: digests\.base was"):
        resume(stopped, f"model.name={copy}", allow_changes=True)


def test_another_tokenizer_is_refused_whatever_is_said(stopped, tiny_model_folder, tmp_path):
    """Two entries of the vocabulary exchanged: every shape fits, and every text means something else."""
    copy = copy_of_model(tiny_model_folder, tmp_path)
    vocabulary = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    one, other = "a", "b"
    exchanged = {**vocabulary, one: vocabulary[other], other: vocabulary[one]}
    edit_json(copy / "tokenizer.json", "model", "vocab", to=exchanged)
    with pytest.raises(CheckpointError, match=r"no longer fits: digests\.tokenizer was"):
        resume(stopped, f"model.name={copy}", allow_changes=True)


def test_another_chat_template_is_another_tokenizer_and_refused(stopped, tiny_tokenizer, tmp_path):
    """Every row would read otherwise, and so would every prompt of the finished model."""
    template = tmp_path / "template.jinja"
    template.write_text(
        tiny_tokenizer.chat_template.replace("['role'] }}", "['role'] }}:").replace("assistant\n", "assistant:\n")
    )
    with pytest.raises(CheckpointError, match=r"no longer fits: digests\.tokenizer was"):
        resume(stopped, f"model.chat_template={template}", allow_changes=True)


def test_a_template_file_that_was_moved_is_the_same_template(stopped, tiny_tokenizer, tmp_path):
    template = tmp_path / "moved.jinja"
    template.write_text(tiny_tokenizer.chat_template)
    assert "digests" not in resume(stopped, f"model.chat_template={template}")


@pytest.mark.parametrize(
    ("keys", "value"), [(("versions", "torch"), "2.0"), (("threads",), 64), (("processor",), "another")]
)
def test_another_version_thread_count_or_processor_is_said_and_the_run_goes_on(stopped, keys, value):
    edit_json(stopped / "run.json", "identity", *keys, to=value)
    assert f"{'.'.join(keys)} was {value!r}, is now" in resume(stopped)


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("evaluation.every_steps=1", "goes on"),
        ("checkpoint.keep_last=1", "goes on"),
        ("tracking.every_steps=2", "goes on"),
        ("training.max_minutes=60", "goes on"),
        ("training.batch_size=4", "another training"),
        ("training.learning_rate=0.5", "another training"),
        ("training.epochs=3", "another training"),
        ("training.lr_schedule=cosine", "another training"),
        ("data.max_length=64", "another training"),
        ("data.shuffle_seed=1", "another training"),
        ("run.seed=1", "another training"),
        ("adapter.r=8", "no longer fits"),
        ("adapter.target_modules=[q_proj]", "no longer fits"),
        ("training.optimizer=lion", "no longer fits"),
        ("model.dtype=bfloat16", "no longer fits"),
    ],
)
def test_a_changed_config_is_answered_key_by_key(stopped, override, kind):
    """Given with the command, or written into the run's own config.yaml."""
    if kind == "goes on":
        resume(stopped, override)
        return
    key = "global_batch_size" if override.startswith("training.batch_size") else override.partition("=")[0]
    with pytest.raises(CheckpointError, match=kind) as caught:
        resume(stopped, override, allow_changes=kind == "no longer fits")
    assert key in str(caught.value)


def test_a_change_that_was_allowed_once_is_the_run_s_own_when_it_is_stopped_again(stopped):
    """The run has two steps; asked for four, it is stopped after the third."""
    resolved, earlier = training.find_run(str(stopped), overrides=["training.max_steps=4"], allow_changes=True)
    session = training.open_run(resolved, Options(), StopRequest(), print_line=lambda line: None, earlier=earlier)
    steps = session.steps()
    assert [next(steps).step, next(steps).step] == [2, 3]
    steps.close()
    said = resume(stopped)
    assert "changed: config" not in said
    assert [line["step"] for line in lines_of(stopped) if "learning_rate" in line] == [1, 2, 3, 4]


def test_a_config_file_that_was_edited_by_hand_is_a_changed_config(stopped):
    config = stopped / "config.yaml"
    text = config.read_text()
    assert "learning_rate: 0.01" in text
    config.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    with pytest.raises(
        CheckpointError, match=r"another training: config\.training\.learning_rate was 0\.01, is now 0\.02"
    ):
        resume(stopped)


@pytest.fixture
def scratch_run(config_of):
    """A run, stopped after its first step of two, of a model from scratch that trained its own tokenizer."""
    small = ["d_model=32", "n_layers=1", "n_heads=2", "d_ff=64", "vocab_size=300"]
    scratch = ["model.name=custom-nano", *(f"model.architecture.{one}" for one in small), "training.max_steps=2"]
    session = training.open_run(
        config_of(*scratch, name="scratch"), Options(), StopRequest(), print_line=lambda line: None
    )
    steps = session.steps()
    next(steps)
    steps.close()
    return session.run.path


def test_the_tokenizer_that_a_run_trained_for_itself_is_part_of_it(scratch_run):
    run = scratch_run
    vocabulary = json.loads((run / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    edit_json(
        run / "tokenizer" / "tokenizer.json",
        "model",
        "vocab",
        to={**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]},
    )
    with pytest.raises(CheckpointError, match=r"digests\.tokenizer|was changed"):
        resume(run, allow_changes=True)


def test_another_template_or_tokenizer_than_the_one_a_run_trained_is_refused_and_not_passed_over(scratch_run, tmp_path):
    """Q2: neither is taken for the run's own, silently, because that lies in its folder."""
    other = shutil.copytree(scratch_run / "tokenizer", tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())["model"]["vocab"]
    edit_json(other / "tokenizer.json", "model", "vocab", to={**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]})
    for override in ("model.chat_template=turns", f"model.tokenizer={other}"):
        with pytest.raises(CheckpointError, match=r"no longer fits: digests\.tokenizer was"):
            resume(scratch_run, override, allow_changes=True)
    resume(scratch_run, "model.chat_template=chatml")
