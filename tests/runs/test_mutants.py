"""The tester is tested: each mutant of our own code leaves out one precaution, and the law that it serves must fail."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from llmtune import durable
from llmtune.durable import files, folders, manifest, system
from llmtune.errors import LlmtuneError
from llmtune.runs import checkpoint


def kill(scene):
    scene.kill_everywhere()


def lose_power(scene):
    scene.lose_power_everywhere(last_first=True)  # most promises are made at the end, and the first loss is enough


def write_short(scene):
    scene.fail_everywhere("short write", for_ever=False)


def corrupt(scene):
    scene.corrupt(60)


def exchange(scene):
    scene.exchange()


@contextlib.contextmanager
def commit_in_place(target, *, manifest=None, **_):
    shutil.rmtree(target, ignore_errors=True)
    staging = files.Staging(target)
    system.call("mkdir", target, 0o777)
    yield target
    folders._complete(staging, dict(manifest or {}))


def delete_before_replacing(folder, target, **_):
    if target.exists():
        folders._remove(target)
    system.call("rename", folder, target)
    system.sync_folder(target.parent)


def rename_without_syncing_the_parent(folder, target, **_):
    old = target.with_name(folders.OLD_PREFIX + target.name)
    if target.exists():
        system.call("rename", target, old)
    system.call("rename", folder, target)
    if old.exists():
        folders._remove(old)


def delete_under_the_final_name(path):
    for one, _ in reversed(list(manifest.walk(path))):
        system.call("rmdir" if one.is_dir() else "unlink", os.fspath(one))
    system.call("rmdir", os.fspath(path))


def forget_the_predecessor(folder, name):
    folders._remove(folder / name)
    return name


def write_in_place(path, chunks):
    with (
        system.translate_os_errors("write", path),
        system.open_descriptor(Path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor,
    ):
        for chunk in chunks:
            system.write_fully(descriptor, chunk)


def write_file_without_sync(path, chunks, *, sync):
    return write_new(path, chunks, sync=False)


write_new = files._write_new


def write_once(descriptor, data):
    system.call("write", descriptor, data)


def read_unsealed(folder):
    return json.loads((folder / "manifest.json").read_bytes())


# What is left out -> (where, name of the function, what stands in its place, the law that must notice)
MUTANTS = {
    "no sync of files": (folders, "sync_file", lambda path: None, lose_power),
    "no sync of folders": (folders, "sync_folder", lambda path: None, lose_power),
    "no sync of the parent": (folders, "_put_in_place", rename_without_syncing_the_parent, lose_power),
    "no sync of single files' folders": (files, "sync_folder", lambda path: None, lose_power),
    "no sync of the log": (durable.AppendLog, "sync", lambda self: None, lose_power),
    "no rename of folders": (durable, "commit_folder", commit_in_place, kill),
    "no rename of files": (files, "write_stream", write_in_place, kill),
    "the old deleted before the new stands": (folders, "_put_in_place", delete_before_replacing, kill),
    "folders deleted under their final name": (durable, "remove_tree", delete_under_the_final_name, kill),
    "no sweep": (durable, "remove_leftovers", lambda folder, **_: [], kill),
    "predecessors not put back": (folders, "_restore_or_remove", forget_the_predecessor, kill),
    "torn lines kept": (files, "parse_line", lambda line: {"step": 1}, kill),
    "log not cut to the checkpoint's step": (durable.AppendLog, "truncate_to", lambda self, lines: 0, kill),
    "short writes taken for whole ones": (
        files,
        "write_fully",
        write_once,
        write_short,
    ),
    "no sync of single files": (files, "_write_new", write_file_without_sync, lose_power),
    "the manifest not checked": (durable, "verify_manifest", lambda folder, **_: [], corrupt),
    "the seal of the manifest not checked": (
        (manifest, durable),
        "read_manifest",
        read_unsealed,
        corrupt,
    ),
    "step and run not checked": (checkpoint, "verify", lambda one, **_: durable.verify_manifest(one.path), exchange),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(scene, monkeypatch, mutant):
    place, name, instead, law = MUTANTS[mutant]
    for one in place if isinstance(place, tuple) else (place,):
        monkeypatch.setattr(one, name, instead)
    with pytest.raises((AssertionError, LlmtuneError)) as caught:
        law(scene)
    print(mutant, "->", caught.type.__name__, str(caught.value)[:100])  # shown by `pytest -rP`
