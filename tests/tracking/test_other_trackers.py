"""MLflow and Trackio, where they are installed: what they were sent is read back; a resumed run is the same run."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from llmtune.tracking.tracker import Histogram, RunInfo

ROW = Histogram((1, 2), (0.0, 1.0, 2.0), 1.5)


def follow(tracker, folder):
    """A run that is stopped and resumed, as the queue hands it to a tracker."""
    for start in (0, 2):
        info = RunInfo(
            name="a-run",
            folder=folder,
            total_steps=4,
            start_step=start,
            model="tiny",
            config={"training": {"epochs": 3.0}, "x": {"api_token": "s3cret"}},
            parameters={"total": 10, "trained": 4},
            notes="a note",
        )
        one = tracker()
        one.start(info)
        one.log(start + 1, {"step": start + 1, "train_mean_nll": 2.0 - start / 10, "reason": "a word", "mfu": None})
        one.samples(start + 1, [{"prompt": "2 + 3?", "text": "5"}])
        one.histograms(start + 1, {"gradients/layers.0.w": ROW, "weights/layers.0.w": ROW})
        one.finish("stopped" if start == 0 else "finished")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own libraries
def test_mlflow_holds_config_numbers_and_answers_of_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    from llmtune.tracking.mlflow import MlflowTracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = []
    follow(lambda: MlflowTracker("mine", tags=("t",), print_line=said.append), tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "a-run"
    assert run.info.status == "FINISHED"
    assert run.data.params["training.epochs"] == "3.0"
    assert run.data.params["parameters.trained"] == "4"
    assert run.data.params["x.api_token"] == "***"
    assert run.data.tags["t"] == "true"
    assert run.data.tags["llmtune.state"] == "finished"
    history = client.get_metric_history(run.info.run_id, "train/mean_nll")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (3, 1.8)]
    assert run.data.metrics["gradient_flow/layers.0"] == 1.5
    answers = tmp_path / "mlflow" / "artifacts" / run.info.run_id / "artifacts" / "samples" / "step-000003.jsonl"
    assert json.loads(answers.read_text()) == {"prompt": "2 + 3?", "text": "5"}
    assert len(said) == 2
    assert run.info.run_id in said[1]


def test_mlflow_gets_each_name_in_the_form_that_it_takes(tmp_path, monkeypatch):
    """It refuses a whole request for one name with other characters, a long one, or a second value of one."""
    taken = {}

    class Client:
        def __init__(self, address):
            pass

        def log_batch(self, run_id, *, params=(), metrics=()):
            for key, value, *_ in (*params, *metrics):
                assert re.fullmatch(r"[/\w.\- ]{1,250}", key), key
                assert taken.setdefault(key, value) == value, key

        def create_run(self, experiment, *, run_name, tags):
            assert all(re.fullmatch(r"[/\w.\- ]{1,250}", tag) for tag in tags)
            return SimpleNamespace(info=SimpleNamespace(run_id="r"))

        def __getattr__(self, name):
            return lambda *arguments, **options: None

    entities = ModuleType("mlflow.entities")
    entities.Metric = entities.Param = lambda *fields: fields
    module = ModuleType("mlflow")
    module.MlflowClient, module.entities = Client, entities
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    from llmtune.tracking.mlflow import MlflowTracker

    long = "x" * 300
    ranks = {"(q|v)_proj": 4, "[q|v]_proj": 8, long: 1, long + "y": 2}
    tracker = MlflowTracker("mine", tags=("a=b",), print_line=lambda line: None)
    tracker.start(RunInfo(name="r", folder=tmp_path, total_steps=1, start_step=0, model="m", config={"rank": ranks}))
    tracker.log(1, {"eval_squad#2_mean_nll": 2.0, "eval_a[1]_mean_nll": 3.0, "eval_a(1)_mean_nll": 4.0})
    tracker.log(2, {"eval_a(1)_mean_nll": 4.0, "eval_a[1]_mean_nll": 3.0})
    assert sorted(value for key, value in taken.items() if key.startswith("rank.")) == ["1", "2", "4", "8"]
    assert {key: taken[key] for key in taken if key.startswith("eval")} == {
        "eval/squad_2_mean_nll": 2.0,
        "eval/a_1__mean_nll": 3.0,
        "eval/a_1__mean_nll2": 4.0,
    }


def test_trackio_holds_config_and_numbers_of_one_run_and_prints_nothing_on_stdout(tmp_path, monkeypatch, capfd):
    pytest.importorskip("trackio", reason="trackio is not installed")
    import trackio.utils
    from trackio.sqlite_storage import SQLiteStorage

    from llmtune.tracking.trackio import TrackioTracker

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    said = []
    follow(lambda: TrackioTracker("mine", print_line=said.append), tmp_path)
    assert capfd.readouterr().out == ""
    assert SQLiteStorage.get_runs("mine") == ["a-run"]
    lines = SQLiteStorage.get_logs("mine", "a-run")
    assert [(line["step"], line["train/mean_nll"]) for line in lines if "train/mean_nll" in line] == [
        (1, 2.0),
        (3, 1.8),
    ]
    assert [line["gradient_flow/layers.0"] for line in lines if "gradient_flow/layers.0" in line] == [1.5, 1.5]
    assert any("gradients/layers.0.w" in line for line in lines)
    assert any("samples" in line for line in lines)
    config = SQLiteStorage.get_run_config("mine", "a-run")
    assert config["training.epochs"] == 3.0
    assert config["x.api_token"] == "***"
    assert said == ['trackio has the run; `trackio show --project "mine"` opens it'] * 2
