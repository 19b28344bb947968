"""P1: a folder with a final name is complete or does not exist."""

import contextlib
import errno
import os
import shutil

import pytest

from disk_faults import Failing, Killed, Killing, Tracing
from llmtune import durable
from llmtune.durable import manifest
from llmtune.errors import MachineError


def names_in(folder):
    return sorted(one.name for one in folder.iterdir())


def commit(target, text, **options):
    with durable.commit_folder(target, manifest={"text": text}, **options) as staging:
        durable.write_text(staging / "a", text)
        (staging / "below").mkdir()
        (staging / "below" / "b").write_text(text)


def test_everything_is_synced_before_the_rename_and_the_manifest_is_last(tmp_path):
    """P1."""
    with durable.use_backend(Tracing()) as tracing:
        commit(tmp_path / "x", "new")
    seen = [(one.kind, os.path.basename(one.path)) for one in tracing.operations]  # noqa: PTH119
    part = seen[0][1]
    assert part.startswith(".llmtune-part-")
    assert seen == [
        ("mkdir", part),
        ("open", "a"),
        ("write", "a"),
        ("fsync", "a"),
        ("fsync", "b"),
        ("open", "manifest.json"),
        ("write", "manifest.json"),
        ("fsync", "manifest.json"),
        ("fsync folder", "below"),
        ("fsync folder", part),
        ("rename", part),
        ("fsync folder", tmp_path.name),
    ]
    assert durable.verify_manifest(tmp_path / "x") == []
    assert durable.read_manifest(tmp_path / "x")["text"] == "new"


def test_while_it_is_filled_the_final_name_does_not_exist(tmp_path):
    with durable.commit_folder(tmp_path / "x") as staging:
        assert not (tmp_path / "x").exists()
        assert staging.parent == tmp_path
    assert names_in(tmp_path) == ["x"]


def fill_by_half(target):
    with durable.commit_folder(target) as staging:
        (staging / "half").write_text("half")
        raise KeyError


def test_a_body_that_fails_leaves_nothing_and_keeps_the_old(tmp_path):
    commit(tmp_path / "x", "old")
    with pytest.raises(KeyError):
        fill_by_half(tmp_path / "x")
    assert names_in(tmp_path) == ["x"]
    assert durable.verify_manifest(tmp_path / "x") == []


def test_an_existing_folder_is_replaced_whole_or_refused_when_asked(tmp_path):
    commit(tmp_path / "x", "old")
    (tmp_path / "x" / "extra").write_text("")
    commit(tmp_path / "x", "new")
    assert durable.verify_manifest(tmp_path / "x") == []
    with pytest.raises(MachineError, match="ENOTEMPTY"):
        commit(tmp_path / "x", "other", replace=False)
    assert names_in(tmp_path) == ["x"]
    assert (tmp_path / "x" / "a").read_text() == "new"


def test_a_file_in_the_place_of_the_target_is_replaced_or_refused(tmp_path):
    (tmp_path / "x").write_text("file")
    with pytest.raises(MachineError, match="ENOTDIR"):
        commit(tmp_path / "x", "new", replace=False)
    assert (tmp_path / "x").read_text() == "file"
    commit(tmp_path / "x", "new")
    assert names_in(tmp_path) == ["x"]


def test_the_manifest_digests_the_bytes_that_were_meant_not_those_the_disk_gives_back(tmp_path):
    """P5: a disk that garbles what it is given is found when the folder is re-read."""

    class Garbling(Tracing):
        def call(self, operation, *arguments):
            if operation == "write" and bytes(arguments[1]) == b"meant":
                return super().call("write", arguments[0], b"Meant")
            return super().call(operation, *arguments)

    with durable.use_backend(Garbling()), durable.commit_folder(tmp_path / "x") as staging:
        durable.write_bytes(staging / "a", b"meant")
    assert "`a` was changed" in str(durable.verify_manifest(tmp_path / "x"))


def test_a_file_changed_after_it_was_written_into_the_staging_folder_is_digested_anew(tmp_path):
    with durable.commit_folder(tmp_path / "x") as staging:
        durable.write_bytes(staging / "a", b"first")
        (staging / "a").write_bytes(b"second")
    assert durable.verify_manifest(tmp_path / "x") == []


def test_deleting_a_folder_takes_its_name_first_and_follows_no_link(tmp_path):
    """P1."""
    (tmp_path / "mine").write_text("mine")
    commit(tmp_path / "x", "old")
    (tmp_path / "x" / "link").symlink_to(tmp_path)
    with durable.use_backend(Killing(5)), pytest.raises(Killed):
        durable.remove_tree(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert len(durable.remove_leftovers(tmp_path)) == 1
    assert names_in(tmp_path) == ["mine"]
    durable.remove_tree(tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    durable.remove_tree(tmp_path / "link")
    assert names_in(tmp_path) == ["mine"]


def test_a_sweep_leaves_the_work_of_living_processes_alone(tmp_path):
    machine = durable.files.part_name().split("-")[2]
    alive, dead, elsewhere = (
        f".llmtune-part-{name}-1" for name in (f"{machine}-{os.getppid()}", f"{machine}-999999999", "00000000-7")
    )
    for name in (alive, dead, elsewhere):
        (tmp_path / name).mkdir()
    with durable.commit_folder(tmp_path / "x") as staging:
        assert len(durable.remove_leftovers(tmp_path, everything=True)) == 3
        assert names_in(tmp_path) == [staging.name]
    for name in (alive, dead, elsewhere):
        (tmp_path / name).mkdir()
    durable.remove_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted([alive, elsewhere, "x"])


def test_a_sweep_finishes_or_undoes_a_replacement(tmp_path):
    commit(tmp_path / ".llmtune-old-best", "old")
    assert durable.remove_leftovers(tmp_path) == [f"put back {tmp_path / 'best'}, whose successor was never finished"]
    assert durable.verify_manifest(tmp_path / "best") == []
    commit(tmp_path / "next", "older")
    (tmp_path / "next").rename(tmp_path / ".llmtune-old-best")
    assert durable.remove_leftovers(tmp_path) == [f"removed the predecessor of {tmp_path / 'best'}"]
    assert (tmp_path / "best" / "a").read_text() == "old"
    assert names_in(tmp_path) == ["best"]


def test_a_replacement_that_fails_at_its_rename_puts_the_old_one_back(tmp_path):
    """P7: at every operation, and the folder is there at every moment without a sweep."""
    commit(tmp_path / "x", "old")
    with durable.use_backend(Tracing()) as tracing:
        commit(tmp_path / "x", "new")
    for at in range(1, len(tracing.operations) + 5):
        shutil.rmtree(tmp_path / "x")
        commit(tmp_path / "x", "old")
        with durable.use_backend(Failing(at, errno.EIO)), contextlib.suppress(MachineError):
            commit(tmp_path / "x", "new")
        assert durable.verify_manifest(tmp_path / "x") == [], at
        durable.remove_leftovers(tmp_path)
        assert names_in(tmp_path) == ["x"], at


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b'{"files": {}, "manifest_sha256": 1}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_manifest_that_is_none_is_a_problem_and_no_crash(tmp_path, content):
    """P5, Q8."""
    commit(tmp_path / "x", "x")
    (tmp_path / "x" / "manifest.json").write_bytes(content)
    (problem,) = durable.verify_manifest(tmp_path / "x")
    assert "manifest.json" in problem.problem


def test_only_the_files_asked_for_are_compared_and_read(tmp_path, monkeypatch):
    """P5: an edited card is not what is asked about; a changed, a missing, an added or an exchanged weight is, at any
    depth.
    """
    names = ["model-1.safetensors", "model-2.safetensors", "deep/model-3.safetensors", "README.md"]
    with durable.commit_folder(tmp_path / "x") as staging:
        durable.make_folder(staging / "deep")
        for name in names:
            durable.write_text(staging / name, "weights")
    (tmp_path / "x" / "README.md").write_text("edited")
    (tmp_path / "x" / "notes").mkdir()
    read, read_chunks = [], manifest.read_chunks
    monkeypatch.setattr(manifest, "read_chunks", lambda path, **how: read.append(path.name) or read_chunks(path, **how))
    assert durable.verify_manifest(tmp_path / "x", only="*.safetensors") == []
    assert sorted(read) == ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"]
    assert len(durable.verify_manifest(tmp_path / "x")) == 2
    (tmp_path / "x" / "deep" / "model-3.safetensors").write_text("Weights")
    (tmp_path / "x" / "model-2.safetensors").unlink()
    (tmp_path / "x" / "model-1.safetensors").unlink()
    (tmp_path / "x" / "model-1.safetensors").symlink_to(tmp_path / "x" / "README.md")
    (tmp_path / "x" / "model-4.safetensors").mkdir()
    problems = "\n".join(one.problem for one in durable.verify_manifest(tmp_path / "x", only="*.safetensors"))
    wrong = (
        "deep/model-3.safetensors` was changed",
        "`model-2.safetensors` is missing",
        "`model-1.safetensors` is not a plain file",
    )
    assert all(one in problems for one in (*wrong, "`model-4.safetensors` does not belong here")), problems
    assert problems.count("\n") == 3


def test_of_files_that_are_left_to_their_reader_presence_and_size_are_looked_at(tmp_path):
    with durable.commit_folder(tmp_path / "x") as staging:
        durable.write_text(staging / "model.safetensors", "weights")
        durable.write_text(staging / "config.json", "{}")
    (tmp_path / "x" / "model.safetensors").write_text("Weights")
    assert durable.verify_manifest(tmp_path / "x", unread="*.safetensors") == []
    assert len(durable.verify_manifest(tmp_path / "x")) == 1
    (tmp_path / "x" / "model.safetensors").write_text("Weight")
    assert "has 6 bytes instead of 7" in str(durable.verify_manifest(tmp_path / "x", unread="*.safetensors"))
    (tmp_path / "x" / "model.safetensors").unlink()
    (tmp_path / "x" / "config.json").write_text("[]")
    assert len(durable.verify_manifest(tmp_path / "x", unread="*.safetensors")) == 2


def test_the_way_is_made_and_cleared_before_a_commit(tmp_path):
    said = []
    durable.prepare_target(tmp_path / "new" / "out", said.append)
    assert (names_in(tmp_path), said) == (["new"], [])
    dead = tmp_path / "new" / durable.files.part_name().replace(f"-{os.getpid()}-", "-999999999-")
    dead.mkdir()
    durable.prepare_target(tmp_path / "new" / "out", said.append)
    assert names_in(tmp_path / "new") == []
    assert said == [f"removed what an interrupted save left: {dead}"]


def test_a_folder_without_a_manifest_was_never_committed(tmp_path):
    assert "manifest.json is missing" in durable.verify_manifest(tmp_path)[0].problem
    assert "manifest.json is missing" in durable.verify_manifest(tmp_path / "nowhere")[0].problem
