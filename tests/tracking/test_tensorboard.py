"""TensorBoard's event files hold what the run logged."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, T5Config

from llmtune.common.records import flat_items
from llmtune.errors import ModelError
from llmtune.tracking import Histogram, RunInfo
from llmtune.tracking.model_graph import model_graph
from llmtune.tracking.tensorboard import TensorBoardTracker
from llmtune.tracking.tracker import grouped_name
from llmtune.training import train as training
from training_fixtures import _one_thread, _planned_bytes, config_of, rows_file  # noqa: F401

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)


def read(folder):
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_scalars_samples_and_histograms_come_back(tmp_path):
    tracker = TensorBoardTracker()
    tracker.start(RunInfo(name="a-run", folder=tmp_path, total_steps=2, config={"training": {"batch_size": 2}}))
    tracker.log(1, {"step": 1, "train_mean_nll": 2.5, "learning_rate": 1e-4})
    tracker.log(1, {"step": 1, "eval_mean_nll": 3.5})
    tracker.samples(1, [{"prompt": "p", "text": "an *answer*"}])
    tracker.histograms(1, {"gradients/w": Histogram((1, 2), (0.0, 1.0, 2.0), 1.5)})
    tracker.finish("finished")
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == [
        "eval/mean_nll",
        "gradient_flow/w",
        "train/learning_rate",
        "train/mean_nll",
    ]
    assert [(event.step, event.value) for event in events.Scalars("gradient_flow/w")] == [(1, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("train/mean_nll")] == [(1, 2.5)]
    assert events.Histograms("gradients/w")[0].histogram_value.bucket == [1.0, 2.0]
    assert b"    an *answer*" in events.Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0]
    assert b"training.batch_size" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_the_graph_has_two_blocks_and_drawing_it_draws_no_random_number(tmp_path):
    shape = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=9,
    )
    before = torch.get_rng_state()
    graph = model_graph(shape)
    assert torch.equal(torch.get_rng_state(), before)
    assert shape.num_hidden_layers == 3
    tracker = TensorBoardTracker()
    tracker.start(RunInfo(name="a-run", folder=tmp_path, total_steps=2, graph=graph))
    tracker.finish("finished")
    names = " ".join(node.name for node in read(tmp_path).Graph().node)
    assert "[1]/LlamaAttention[self_attn]" in names
    assert "[2]/LlamaAttention[self_attn]" not in names


def test_a_model_that_cannot_be_traced_is_named():
    with pytest.raises(ModelError, match="cannot be traced"):
        model_graph(T5Config())  # no causal language model


def test_the_config_its_origins_modules_ledger_and_hyperparameters_come_back(tmp_path):
    tracker = TensorBoardTracker()
    given = {"modules": {"layers.0.q_proj": 64}, "origins": {"training.batch_size": "c.yaml:3"}}
    ledger = {"train": {"used": 7, "bad": 1}}
    config = {"training": {"batch_size": 2, "optimizer": "adamw"}}
    tracker.start(RunInfo(name="a-run", folder=tmp_path, total_steps=2, config=config, ledger=ledger, **given))
    tracker.log(1, {"step": 1, "eval_mean_nll": 3.5})
    tracker.log(2, {"step": 2, "eval_mean_nll": 2.5})
    tracker.finish("finished")
    events = read(tmp_path)
    for title, row in {
        "modules": b"| layers.0.q_proj | `64` |",
        "origins": b"| training.batch_size | `c.yaml:3` |",
        "ledger": b"| train.bad | `1` |",
    }.items():
        assert row in events.Tensors(f"{title}/text_summary")[0].tensor_proto.string_val[0]
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2", reason="tensorboard is not installed")
    content = {name: plugin.HParamsPluginData.FromString(data) for name, data in hyperparameters(events).items()}
    experiment = content["_hparams_/experiment"].experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/mean_nll"]
    values = content["_hparams_/session_start_info"].session_start_info.hparams
    assert values["training.batch_size"].number_value == 2
    assert values["training.optimizer"].string_value == "adamw"


def test_everything_that_a_real_run_recorded_comes_back(config_of):  # noqa: F811
    """Each number of each line of metrics.jsonl, each answer, each key of the config, each histogram."""
    settings = [
        "tracking.trackers=[jsonl,tensorboard]",
        "tracking.watch=gradients",
        "evaluation.prompts=[numbers,words]",
    ]
    folder = training.train(config_of(*settings, "training.max_steps=3", "evaluation.every_steps=2")).folder
    events = read(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = {
        (grouped_name(name), line["step"]): np.float32(value)
        for line in lines
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert {step for _, step in sent} == {0, 1, 2, 3}
    held = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert {key: held.get(key) for key in sent} == sent
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    for index, sample in enumerate(samples[-2:]):
        text = events.Tensors(f"samples/{index}/text_summary")[-1].tensor_proto.string_val[0].decode()
        assert all(f"    {line}" in text for line in sample["text"].splitlines())
    info = json.loads((folder / "run.json").read_text())
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    keys = [key for key, _ in flat_items(info["identity"]["config"])]
    assert len(keys) > 100
    assert [key for key in keys if f"| {key} |" not in config] == []
    with safe_open(folder / "checkpoints" / "final" / "model.safetensors", "np") as file:
        names = {f"gradients/{name}" for name in file.keys()}  # noqa: SIM118 - no mapping
    assert names <= set(events.Tags()["histograms"])


def hyperparameters(events):
    return {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}


def test_after_a_resume_the_steps_made_again_are_shown_once(tmp_path):
    for start_step, steps in ((0, range(1, 6)), (3, range(4, 7))):
        tracker = TensorBoardTracker()
        tracker.start(RunInfo(name="a-run", folder=tmp_path, total_steps=6, start_step=start_step))
        for step in steps:
            tracker.log(step, {"train_mean_nll": float(step)})
        tracker.finish("stopped")
    assert [event.step for event in read(tmp_path).Scalars("train/mean_nll")] == [1, 2, 3, 4, 5, 6]
