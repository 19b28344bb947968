"""P1, P5, P7: every file operation of a resume, one by one: killed; refused once; refused for ever, for each way a disk
fails.

The run under attack has everything to do that a resume can find: litter of a killed save, a torn log that is ahead of
its checkpoint, and a damaged newest checkpoint to set aside. Then it trains its last steps, saves, deletes an old
checkpoint, and finishes.
"""

import shutil

import peft  # noqa: F401 - once here, not in every child
import pytest
import transformers.models.llama.modeling_llama  # noqa: F401

from fault_helpers import (
    EVERY_FAULT,
    assert_one_message,
    count_operations,
    in_memory,
    killed_at,
    litter_in,
    refused_at,
    undisturbed,
)
from llmtune import durable
from llmtune.config.layers import load_config
from llmtune.runs.run_file import read_run_file
from llmtune.training import train as training
from training_helpers import difference, small_run

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
pytestmark = FORKS


class Scene:
    def __init__(self, folder, model, rows):
        self.folder = folder
        self._given = small_run(
            model, rows, folder, "training.max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=1"
        )
        undisturbed(lambda: self.train("whole"))
        self.whole = folder / "whole"
        self.template = folder / "template"
        self._stop_in_the_save_of_step_3()
        self.saved = sorted(one.name for one in (self.template / "checkpoints").glob("step-??????"))
        self.number = 0
        self.operations = count_operations(self.resume(self.copy()), folder)

    def train(self, name, *more):
        training.train(load_config(None, overrides=[*self._given, f"run.name={name}", *more], environ={}))

    def _stop_in_the_save_of_step_3(self):
        """Kill it where the staged folder of step 3 is nearly complete, then damage what was saved of step 2."""
        keep_all = "checkpoint.keep_last=0"
        operations = count_operations(lambda: self.train("counted", keep_all, "training.max_steps=2"), self.folder)
        killed_at(lambda: self.train("template", keep_all), operations)
        places = self.template / "checkpoints"
        assert [one.name for one in places.iterdir() if one.name.startswith(".llmtune")], "no litter to sweep"
        newest = max(places.glob("step-??????"))
        (newest / "state.json").write_text("{}")
        with (self.template / "metrics.jsonl").open("a") as log:
            log.write('{"step": 3, "train_mean')

    def copy(self):
        self.number += 1
        run = self.folder / f"run-{self.number}"
        shutil.copytree(self.template, run)
        return run

    def resume(self, run):
        return lambda: training.resume(str(run))

    def assert_survives(self, run):
        """A valid checkpoint is there; `resume` alone finishes the run, byte-identical, and leaves nothing behind."""
        undisturbed(self.resume(run))
        assert litter_in(run) == []
        assert read_run_file(run)["state"] == "finished"
        assert difference(self.whole, run) == ""
        shutil.rmtree(run)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_model_folder, rows_file):
    with in_memory(tmp_path_factory.mktemp("scene")) as folder:
        yield Scene(folder, tiny_model_folder, rows_file)


def test_what_is_resumed_has_everything_to_do(scene):
    assert len(scene.saved) == 2, "an older checkpoint, and a damaged newest one"
    assert litter_in(scene.template)
    assert not (scene.template / "metrics.jsonl").read_bytes().endswith(b"\n")
    run = scene.copy()
    assert durable.verify_manifest(run / "checkpoints" / scene.saved[-1])
    scene.assert_survives(run)


def kill_at_each(scene, places):
    for at in places:
        run = scene.copy()
        killed_at(scene.resume(run), at)
        scene.assert_survives(run)


def refuse_at_each(scene, places, fault, *, for_ever):
    refused = 0
    for at in places:
        run = scene.copy()
        end = refused_at(scene.resume(run), at, fault, for_ever=for_ever)
        if fault == "short write":
            assert end.code == 0, end.error
        elif for_ever or end.code:
            assert_one_message(end, fault)
            refused += 1
        scene.assert_survives(run)
    return refused


def test_a_resume_killed_at_operations_all_over_it_is_resumed_again_and_ends_the_same(scene):
    """P1, P2: at seven of its operations; the campaign takes every one."""
    assert scene.operations > 100
    kill_at_each(scene, range(3, scene.operations + 1, scene.operations // 7))


@pytest.mark.parametrize(
    ("fault", "for_ever"), EVERY_FAULT, ids=lambda value: {True: "for ever", False: "once"}.get(value, value)
)
def test_a_resume_whose_disk_fails_says_so_once_and_is_resumed_again(scene, fault, for_ever):
    """P7: each fault at another operation; the campaign takes every one."""
    place = 5 + (scene.operations - 10) * EVERY_FAULT.index((fault, for_ever)) // len(EVERY_FAULT)
    refuse_at_each(scene, [place], fault, for_ever=for_ever)


@pytest.mark.campaign
def test_every_operation_of_a_resume_killed(scene):
    """P1, P2."""
    kill_at_each(scene, range(1, scene.operations + 1))


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("fault", "for_ever"), EVERY_FAULT, ids=lambda value: {True: "for ever", False: "once"}.get(value, value)
)
def test_every_operation_of_a_resume_refused(scene, fault, for_ever):
    """P7."""
    refuse_at_each(scene, range(1, scene.operations + 1), fault, for_ever=for_ever)
