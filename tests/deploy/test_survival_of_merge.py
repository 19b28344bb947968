"""P1, P7, Q8: every file operation of a merge, one by one: killed; refused once; refused for ever, for each way a disk
fails.

Whatever happens, there is no output folder or a whole one, the source keeps every byte, the refusal is one message, the
next merge clears what is left, and its result is byte for byte that of the merge nothing happened to.
"""

import json

import peft  # noqa: F401 - once here, not in every child
import pytest
import transformers.models.llama.modeling_llama  # noqa: F401

from fault_helpers import (
    EVERY_FAULT,
    FAULTS,
    assert_one_message,
    count_operations,
    in_memory,
    killed_at,
    litter_in,
    refused_at,
    undisturbed,
)
from llmtune import durable
from llmtune.deploy.merge import merge_lora
from power_loss import read_tree

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Scene:
    def __init__(self, folder, base, adapter):
        self.folder = folder
        self._sources = [base, adapter]
        self._before = [read_tree(one) for one in self._sources]
        self.adapter, self.output = adapter, folder / "out" / "merged"
        self.operations = count_operations(self.merge, folder)
        self._expected = self._result()
        self._clear()

    def merge(self):
        merge_lora(self.adapter, self.output)

    def _result(self):
        """Every byte of the output but one measured number, and the manifest's digest of the file it stands in."""
        assert durable.verify_manifest(self.output) == []
        tree = read_tree(self.output)
        report = json.loads(tree.pop("merge_report.json"))
        assert report.pop("peak_memory_bytes") >= 0
        manifest = json.loads(tree.pop("manifest.json"))
        del manifest["manifest_sha256"], manifest["files"]["merge_report.json"]
        return tree, report, manifest

    def assert_survived(self):
        """Nothing half-made, the source untouched, and the same command again does it."""
        assert [read_tree(one) for one in self._sources] == self._before, "the source was touched"
        if self.output.exists():
            assert durable.verify_manifest(self.output) == [], "an output folder that is not whole"
            durable.remove_tree(self.output)
        undisturbed(self.merge)
        assert litter_in(self.folder) == []
        assert self._result() == self._expected
        self._clear()

    def _clear(self):
        """Take the folder above the output away too, so that every merge makes it and has the same number of
        operations.
        """
        durable.remove_tree(self.output.parent)

    def kill_at_each(self, places):
        for at in places:
            killed_at(self.merge, at)
            self.assert_survived()

    def refuse_at_each(self, places, fault, *, for_ever):
        refused = 0
        for at in places:
            end = refused_at(self.merge, at, fault, for_ever=for_ever)
            if fault == "short write":
                assert end.code == 0, end.error
            elif end.code:
                assert_one_message(end, fault)
                refused += 1
            self.assert_survived()
        return refused


@pytest.fixture
def scene(make, tmp_path):
    base = make.base()
    adapter = make.adapter(base)
    with in_memory(tmp_path) as folder:
        yield Scene(folder, base, adapter)


def test_a_merge_killed_anywhere_leaves_nothing_half_made_and_is_repeated(scene):
    """P1: at four of its operations and the last; the campaign takes every one."""
    assert scene.operations > 40
    scene.kill_at_each([*range(3, scene.operations, scene.operations // 4), scene.operations])


def test_a_merge_whose_disk_fails_says_so_once_and_is_repeated(scene):
    """P7, Q8: each fault at another operation, once or for ever; the campaign takes every one, both ways."""
    refused = 0
    for number, fault in enumerate(FAULTS):
        place = 2 + (scene.operations - 4) * number // len(FAULTS)
        refused += scene.refuse_at_each([place], fault, for_ever=number % 2 == 1)
    assert refused == 3, "all but the short write"


@pytest.mark.campaign
def test_every_operation_of_a_merge_killed_and_refused(scene):
    """P1, P7."""
    scene.kill_at_each(range(1, scene.operations + 1))
    for fault, for_ever in EVERY_FAULT:
        refused = scene.refuse_at_each(range(1, scene.operations + 1), fault, for_ever=for_ever)
        print(f"{scene.operations} operations, {fault}, for ever {for_ever}: {refused} reported")
        assert refused > scene.operations // 2 or fault == "short write"
