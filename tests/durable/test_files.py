"""Single files: whole, the old or the new one, with the mode the umask gives, and with refusals a person can act on."""

import errno
import json
import os
import stat

import pytest

from disk_faults import Failing, Tracing
from llmtune import durable
from llmtune.errors import MachineError


def names_in(folder):
    return sorted(one.name for one in folder.iterdir())


def test_a_file_is_written_beside_synced_renamed_and_its_folder_synced(tmp_path):
    """P1: in this order."""
    with durable.use_backend(Tracing()) as tracing:
        durable.write_text(tmp_path / "a", "text")
    assert [one.kind for one in tracing.operations] == ["open", "write", "fsync", "rename", "fsync folder"]
    assert tracing.operations[3].target == str(tmp_path / "a")
    assert names_in(tmp_path) == ["a"]


@pytest.mark.parametrize("at", range(1, 5))
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, at):
    """P7."""
    durable.write_text(tmp_path / "a", "old")
    with (
        durable.use_backend(Failing(at, errno.ENOSPC)),
        pytest.raises(MachineError, match="cannot write: No space left on device"),
    ):
        durable.write_text(tmp_path / "a", "new")
    assert names_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_the_mode_follows_the_umask_also_for_files_a_library_wrote_with_its_own(tmp_path, mask):
    """P1: safetensors' own save leaves 0600."""
    before = os.umask(mask)
    try:
        durable.write_bytes(tmp_path / "a", b"")
        durable.FileLock(tmp_path / "lock", "the test").release()
        with durable.commit_folder(tmp_path / "folder") as staging:
            (staging / "library").write_bytes(b"x")
            (staging / "library").chmod(0o600)
            durable.write_bytes(staging / "b", b"x")
    finally:
        os.umask(before)
    expected = 0o666 & ~mask
    for path in (tmp_path / "a", tmp_path / "lock", *(tmp_path / "folder").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_json_is_strict_and_says_what_json_has_no_number_for(tmp_path):
    durable.write_json(tmp_path / "a", {"loss": float("nan"), "é\udc80": [1e-5, 0.1], "path": tmp_path})
    text = (tmp_path / "a").read_text()
    value = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert value == {"loss": "nan", "é\udc80": [1e-5, 0.1], "path": str(tmp_path)}


def test_what_is_not_json_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        durable.write_json(tmp_path / "a", {"x": object()})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENAMETOOLONG, errno.ETXTBSY]
)
def test_a_refusal_names_the_action_the_place_the_reason_and_the_fix(tmp_path, number):
    """Q8."""
    with durable.use_backend(Failing(2, number)), pytest.raises(MachineError) as caught:
        durable.write_text(tmp_path / "a", "x")
    (problem,) = caught.value.problems
    assert problem.problem == f"cannot write: {os.strerror(number)} ({errno.errorcode[number]})"
    assert problem.where == str(tmp_path / "a")
    assert problem.fix
    assert caught.value.exit_code == 6


def test_a_path_that_would_disturb_a_terminal_is_escaped(tmp_path):
    with pytest.raises(MachineError) as caught:
        durable.write_text(tmp_path / "no\n\x1b[2J\udc80" / "a", "x")
    assert caught.value.problems[0].where.isprintable()


def test_folders_are_made_with_those_above_them(tmp_path):
    durable.make_folder(tmp_path / "a" / "b" / "c")
    durable.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot make the folder"):
        durable.make_folder(tmp_path / "file" / "x")
    with pytest.raises(MachineError, match="EEXIST"):
        durable.make_folder(tmp_path / "file")


def test_a_file_is_linked_where_that_is_possible_and_copied_where_not(tmp_path):
    durable.write_text(tmp_path / "a", "text")
    durable.link_or_copy(tmp_path / "a", tmp_path / "linked")
    with durable.use_backend(Failing(1, errno.EXDEV)):
        durable.link_or_copy(tmp_path / "a", tmp_path / "copied")
    assert (tmp_path / "linked").stat().st_ino == (tmp_path / "a").stat().st_ino != (tmp_path / "copied").stat().st_ino
    assert (tmp_path / "copied").read_text() == (tmp_path / "linked").read_text() == "text"


def test_a_system_that_writes_nothing_and_says_nothing_is_not_waited_for_for_ever(tmp_path):
    class Silent(Tracing):
        def call(self, operation, *arguments):
            return 0 if operation == "write" else super().call(operation, *arguments)

    with durable.use_backend(Silent()), pytest.raises(MachineError, match="writes nothing and gives no error"):
        durable.write_text(tmp_path / "a", "x")
    assert names_in(tmp_path) == []


def test_a_link_points_where_it_is_told_and_is_replaced_whole(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        durable.replace_symlink(tmp_path / "link", name)
        assert (tmp_path / "link").resolve() == (tmp_path / name).resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "one", "two"]
