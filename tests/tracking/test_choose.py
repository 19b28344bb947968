"""Which trackers a run gets, and what is said about it."""

import importlib.util

import pytest

from llmtune.config.schema import TrackingConfig
from llmtune.errors import ConfigError, MachineError
from llmtune.tracking import TRACKERS, choose_trackers, keeps_record


@pytest.fixture
def without(monkeypatch):
    """Hide packages, as on a machine that lacks them."""
    find = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, package=None: None if name in names else find(name, package)
        )

    return hide


def test_the_default_trackers_are_made_and_the_record_stands_outside_the_queue():
    trackers, decisions = choose_trackers(TrackingConfig(), explicit=False, environ={})
    assert [tracker.name for tracker in trackers] == ["console", "system", "tensorboard"]
    assert decisions == []
    assert keeps_record(TrackingConfig())
    assert not keeps_record(TrackingConfig(trackers=("console",)))


def test_every_tracker_has_a_row():
    assert list(TRACKERS) == ["console", "jsonl", "system", "tensorboard", "wandb", "mlflow", "trackio"]


def test_a_default_tracker_that_is_not_installed_is_left_out_and_that_is_said(without):
    without("tensorboard")
    trackers, decisions = choose_trackers(TrackingConfig(), explicit=False, environ={})
    assert [tracker.name for tracker in trackers] == ["console", "system"]
    assert [str(decision) for decision in decisions] == [
        "tracking.trackers = without tensorboard: it is not installed; pip install 'llmtune[tensorboard]'"
    ]


def test_trackers_asked_for_and_not_installed_are_refused_all_at_once_with_the_command(without):
    without("tensorboard", "wandb")
    with pytest.raises(MachineError) as refusal:
        choose_trackers(TrackingConfig(trackers=("tensorboard", "wandb")), explicit=True, environ={})
    assert [problem.fix for problem in refusal.value.problems] == [
        "pip install 'llmtune[tensorboard]'",
        "pip install wandb",
    ]
    assert refusal.value.exit_code == 6


def test_a_name_that_is_no_tracker_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"unknown tracker `comet`(.|\n)*console, jsonl, system, tensorboard, wandb"):
        choose_trackers(TrackingConfig(trackers=("comet",)), explicit=True, environ={})


def test_a_project_in_the_environment_fills_a_config_that_names_none():
    config = TrackingConfig(trackers=("wandb",))
    trackers, decisions = choose_trackers(config, explicit=True, environ={"WANDB_PROJECT": "mine"})
    assert trackers[0]._project == "mine"
    assert decisions[0].value == "mine"
    named = TrackingConfig(trackers=("wandb",), project="named")
    assert choose_trackers(named, explicit=True, environ={"WANDB_PROJECT": "mine"})[0][0]._project == "named"
