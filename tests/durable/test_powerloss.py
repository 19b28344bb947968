"""The model of a power loss itself: what it allows and what it forbids, on traces small enough to count by hand."""

import os

from disk_faults import Operation, Tracing
from llmtune.durable.system import use_backend
from power_loss import disk_states, put_on_disk, read_tree

CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def trees(root, before, *operations):
    return [state.tree for state in disk_states(root, before, operations)]


def test_a_file_that_is_written_and_not_synced_may_be_missing_empty_torn_or_whole(tmp_path):
    path = str(tmp_path / "a")
    found = trees(tmp_path, {}, Operation("open", path, size=CREATE), Operation("write", path, data=b"1234"))
    assert found == [{}, {"a": b""}, {"a": b"1234"}, {"a": b"12"}]


def test_a_synced_file_is_whole_but_its_name_may_be_missing_until_its_folder_is_synced(tmp_path):
    path = str(tmp_path / "a")
    steps = [
        Operation("open", path, size=CREATE),
        Operation("write", path, data=b"1234"),
        Operation("fsync", path, data=b"1234"),
    ]
    after = [state.tree for state in disk_states(tmp_path, {}, steps) if state.after == 3]
    assert after == []  # nothing that was not possible before the sync
    steps.append(Operation("mark", "synced"))
    assert [state.tree for state in disk_states(tmp_path, {}, steps) if state.promises] == [{"a": b"1234"}, {}]
    steps.insert(3, Operation("fsync folder", str(tmp_path)))
    assert [state.tree for state in disk_states(tmp_path, {}, steps) if state.promises] == [{"a": b"1234"}]


def test_a_rename_happens_or_does_not_and_never_by_half(tmp_path):
    before = {"a": b"new", "b": b"old"}
    found = trees(tmp_path, before, Operation("rename", str(tmp_path / "a"), str(tmp_path / "b")))
    assert found == [before, {"b": b"new"}]


def test_two_renames_that_are_not_synced_may_come_in_any_order(tmp_path):
    before = {"old": b"1", "new": b"2"}
    steps = [
        Operation("rename", str(tmp_path / "old"), str(tmp_path / "aside")),
        Operation("rename", str(tmp_path / "new"), str(tmp_path / "old")),
    ]
    found = trees(tmp_path, before, *steps)
    assert {"new": b"2", "aside": b"1"} in found
    assert {"old": b"2"} in found  # the second without the first
    assert {"old": b"2", "aside": b"1"} in found


def test_data_written_before_a_rename_and_not_synced_may_be_missing_after_it(tmp_path):
    path, part = str(tmp_path / "a"), str(tmp_path / "p")
    steps = [
        Operation("open", part, size=CREATE),
        Operation("write", part, data=b"new!"),
        Operation("rename", part, path),
    ]
    found = trees(tmp_path, {"a": b"old"}, *steps)
    assert {"a": b""} in found
    assert {"a": b"ne"} in found


def test_what_a_library_wrote_is_known_from_its_sync(tmp_path):
    path = str(tmp_path / "a")
    steps = [
        Operation("fsync", path, data=b"text"),
        Operation("fsync folder", str(tmp_path)),
        Operation("mark", "done"),
    ]
    assert [state.tree for state in disk_states(tmp_path, {}, steps) if state.promises] == [{"a": b"text"}]


def test_a_trace_replayed_whole_is_what_is_on_the_disk(tmp_path):
    root = tmp_path / "root"
    put_on_disk({"a": b"1", "d": None, "d/b": b"2"}, root)
    before = read_tree(root)
    with use_backend(Tracing()) as tracing:
        from llmtune import durable

        durable.write_text(root / "a", "changed")
        durable.make_folder(root / "e" / "f")
        durable.link_or_copy(root / "a", root / "e" / "linked")
        durable.remove_tree(root / "d")
        with durable.AppendLog(root / "log") as log:
            for step in range(4):
                log.append({"step": step})
            log.truncate_to(2)
    last = [
        state.tree
        for state in disk_states(root, before, [*tracing.operations, Operation("mark", "end")])
        if state.promises
    ]
    assert last[0] == read_tree(root)
