"""P1: a file that a library writes has its name only when it is whole and on the disk."""

import pytest

from disk_faults import Tracing
from llmtune import durable
from llmtune.errors import MachineError


def names_in(folder):
    return sorted(one.name for one in folder.iterdir())


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path):
    with durable.use_backend(Tracing()) as tracing, durable.commit_file(tmp_path / "x.gguf") as path:
        assert path.name == "x.gguf"
        assert path.parent.parent == tmp_path
        path.write_bytes(b"whole")
        (path.parent / "scratch").mkdir()
        (path.parent / "scratch" / "more").write_bytes(b"more")
        assert not (tmp_path / "x.gguf").exists()
    kinds = [one.kind for one in tracing.operations]
    assert kinds[:4] == ["mkdir", "fsync", "rename", "fsync folder"]
    assert set(kinds[4:]) == {"unlink", "rmdir"}
    assert names_in(tmp_path) == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == b"whole"


def fill_and_fail(target):
    with durable.commit_file(target) as path:
        path.write_bytes(b"half")
        raise ValueError("no more")


def test_a_body_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"old")
    with pytest.raises(ValueError, match="no more"):
        fill_and_fail(tmp_path / "x.gguf")
    assert names_in(tmp_path) == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == b"old"


def test_what_a_kill_leaves_is_swept(tmp_path, monkeypatch):
    context = durable.commit_file(tmp_path / "x.gguf")
    path = context.__enter__()
    path.write_bytes(b"half")
    monkeypatch.setattr("llmtune.durable.folders.live_parts", set())  # as after the death of this process
    assert len(durable.remove_leftovers(tmp_path)) == 1
    assert names_in(tmp_path) == []
    with pytest.raises(MachineError, match="No such file"):
        context.__exit__(None, None, None)


def test_a_library_that_wrote_nothing_is_a_refusal(tmp_path):
    with pytest.raises(MachineError, match="No such file"), durable.commit_file(tmp_path / "x.gguf"):
        pass
    assert names_in(tmp_path) == []
