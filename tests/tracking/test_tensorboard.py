"""TensorBoard's event files hold what the run logged."""

import pytest

from llmtune.tracking import Histogram, RunInfo
from llmtune.tracking.tensorboard import TensorBoardTracker

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
    tracker.histograms(1, {"gradients/w": Histogram((1, 2), (0.0, 1.0, 2.0))})
    tracker.finish("finished")
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["eval/mean_nll", "train/learning_rate", "train/mean_nll"]
    assert [(event.step, event.value) for event in events.Scalars("train/mean_nll")] == [(1, 2.5)]
    assert events.Histograms("gradients/w")[0].histogram_value.bucket == [1.0, 2.0]
    assert b"    an *answer*" in events.Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0]
    assert b"training.batch_size" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_after_a_resume_the_steps_made_again_are_shown_once(tmp_path):
    for start_step, steps in ((0, range(1, 6)), (3, range(4, 7))):
        tracker = TensorBoardTracker()
        tracker.start(RunInfo(name="a-run", folder=tmp_path, total_steps=6, start_step=start_step))
        for step in steps:
            tracker.log(step, {"train_mean_nll": float(step)})
        tracker.finish("stopped")
    assert [event.step for event in read(tmp_path).Scalars("train/mean_nll")] == [1, 2, 3, 4, 5, 6]
