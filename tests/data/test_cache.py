"""Tokenized rows are kept under a name that covers exactly what decides about them, and are checked before they are
used (P1, P5).
"""

import errno
import fcntl
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llmtune.data
from llmtune import durable
from llmtune.common.environment import cache_folder
from llmtune.config.schema import SourceConfig
from llmtune.data.dataset import cache
from llmtune.data.dataset import workers as workers_module
from llmtune.data.dataset.make_dataset import prepare_data
from llmtune.data.rendering.renderer import Renderer
from llmtune.errors import MachineError
from training_helpers import Forked


def chat(question, answer="yes"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [chat(f"q{index}", "answer " * index + "x") for index in range(12)]


def was_cached(prepared):
    return any(
        decision.key == "data.cache_dir" and "tokenized before" in decision.reason for decision in prepared.decisions
    )


def folders(tmp_path):
    return sorted((tmp_path / "cache" / "rows").iterdir())


def test_a_second_start_reads_the_same_examples_and_ledger_from_the_cache(write, config, renderer):
    given = config(write("a.jsonl", [*ROWS, b"nope"]), on_bad_row="skip", max_length=40, overlong="split", test_size=2)
    first, second = prepare_data(given, renderer), prepare_data(given, renderer)
    assert (was_cached(first), was_cached(second)) == (False, True)
    assert first.train.digest == second.train.digest
    assert first.eval.digest == second.eval.digest
    assert list(first.ledger.entries) == list(second.ledger.entries)
    for example, other in zip(first.train, second.train, strict=True):
        assert np.array_equal(example.input_ids, other.input_ids)
        assert np.array_equal(example.weights, other.weights)
    assert isinstance(second.train.store.words, np.memmap)


@pytest.mark.parametrize(
    "change",
    [
        {"test_size": 3},
        {"shuffle_seed": 7},
        {"on_duplicate": "drop"},
        {"on_overlap": "error"},
        {"num_workers": 2},
        {"packing": "greedy"},
    ],
    ids=str,
)
def test_what_does_not_decide_about_a_row_alone_still_hits(write, config, renderer, change):
    given = config(write("a.jsonl", ROWS))
    prepare_data(given, renderer)
    assert was_cached(prepare_data(replace(given, **change), renderer))


def test_a_moved_file_hits_and_its_rows_go_by_their_new_name(write, config, renderer, tmp_path):
    path = write("a.jsonl", [*ROWS, b"nope"])
    prepare_data(config(path, on_bad_row="skip"), renderer)
    moved = path.rename(tmp_path / "moved.jsonl")
    prepared = prepare_data(config(moved, on_bad_row="skip"), renderer)
    assert was_cached(prepared)
    assert prepared.train[3].source == f"{moved}:4"
    assert [entry["source"] for entry in prepared.ledger.entries] == [f"{moved}:13"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 255},
        {"overlong": "drop"},
        {"min_length": 3},
        {"max_samples": 11},
        {"text_column": "text"},
        {"train_on": "all_messages"},
    ],
    ids=str,
)
def test_every_rule_about_a_row_is_in_the_key(write, config, renderer, change):
    given = config(write("a.jsonl", [*ROWS, {"text": "a"}]), on_bad_row="skip")
    prepare_data(given, renderer)
    assert not was_cached(prepare_data(replace(given, **change), renderer))


def test_every_byte_of_a_file_and_its_weight_are_in_the_key(write, config, renderer):
    path = write("a.jsonl", ROWS)
    prepare_data(config(path), renderer)
    assert not was_cached(prepare_data(config(SourceConfig(str(path), weight=0.5)), renderer))
    assert not was_cached(prepare_data(config(SourceConfig(str(path), max_samples=3)), renderer))
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"q7", b"q8"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not was_cached(prepare_data(config(path), renderer))


def test_tokenizer_template_and_mask_rule_are_in_the_key(write, config, renderer, tiny_tokenizer):
    given = config(write("a.jsonl", ROWS))
    prepare_data(given, renderer)
    others = [
        Renderer(tiny_tokenizer, train_on="all_messages"),
        Renderer(tiny_tokenizer, chat_template=tiny_tokenizer.chat_template.replace("assistant\n", "assistant\n ")),
        Renderer(tiny_tokenizer, parse_control_tokens=True),
    ]
    for other in others:
        assert not was_cached(prepare_data(given, other))
        assert was_cached(prepare_data(given, other))


def test_all_code_that_a_row_passes_through_is_in_the_key():
    names = {path.relative_to(Path(llmtune.data.__file__).parent).as_posix() for path in cache.code_files()}
    assert {"reading/parse.py", "rows/formats.py", "rendering/spans.py", "dataset/overlong.py", "example.py"} <= names


def test_changed_code_makes_the_rows_again(write, config, renderer, monkeypatch):
    given = config(write("a.jsonl", ROWS))
    prepare_data(given, renderer)
    monkeypatch.setattr(cache, "code_digest", lambda: "other code")
    assert not was_cached(prepare_data(given, renderer))


@pytest.mark.parametrize("name", ["words.i32", "rows.table", "examples.table", "about.json", "manifest.json"])
def test_a_flipped_bit_in_the_cache_is_found_and_the_rows_are_made_again(write, config, renderer, tmp_path, name):
    """P5."""
    given = config(write("a.jsonl", ROWS))
    expected = prepare_data(given, renderer).train.digest
    (folder,) = folders(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)
    again = prepare_data(given, renderer)
    assert again.train.digest == expected
    assert any("the cached rows are damaged" in decision.reason for decision in again.decisions)
    assert durable.verify_manifest(folder) == []


def test_a_cache_folder_that_cannot_be_written_means_memory_unless_it_was_asked_for(
    write, config, renderer, tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    path = write("a.jsonl", ROWS)
    monkeypatch.setenv("LLMTUNE_CACHE_DIR", str(blocked / "below"))
    prepared = prepare_data(config(path, cache_dir=None), renderer)
    assert prepared.train.digest == prepare_data(config(path), renderer).train.digest
    assert any(decision.value == "in memory" for decision in prepared.decisions)
    with pytest.raises(MachineError):
        prepare_data(config(path, cache_dir=str(blocked / "below")), renderer)


def test_the_cache_is_where_the_user_keeps_caches():
    assert cache_folder({"LLMTUNE_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/llmtune")
    assert cache_folder({}) == Path.home() / ".cache" / "llmtune"


def test_killed_while_tokenizing_and_started_again_gives_the_same_cache(write, config, renderer, monkeypatch, tmp_path):
    """P1: a killed process leaves nothing that counts; its workers end with it."""
    path = write("a.jsonl", [chat(f"question {index}", "word " * (index % 60) + "end") for index in range(1500)])
    monkeypatch.setattr(workers_module, "BATCHES_IN_PROCESS", 1)
    monkeypatch.setattr("llmtune.data.dataset.tokenize._PROGRESS_EVERY_S", 0)  # also where all takes a moment
    given = config(path, max_length=512, num_workers=2)
    in_the_middle = tmp_path / "in the middle"

    def wait_in_the_middle(done, total, rate):
        if done > 256:
            in_the_middle.touch()
            time.sleep(60)

    process = Forked(lambda: prepare_data(given, renderer, progress=wait_in_the_middle) and 0)
    while not in_the_middle.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    assert len(workers) == 2
    (litter,) = folders(tmp_path)
    assert litter.name.startswith(".")
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    prepare_data(given, renderer)
    (folder,) = folders(tmp_path)
    prepare_data(replace(given, num_workers=1, cache_dir=str(tmp_path / "clean")), renderer)
    (clean,) = (tmp_path / "clean" / "rows").iterdir()
    for file in sorted(clean.iterdir()):
        assert file.name == "manifest.json" or (folder / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_without_file_locks_a_valid_set_is_never_replaced(write, config, renderer, tmp_path, monkeypatch, is_damaged):
    """Nobody waits there: another process commits the same rows meanwhile, and has them mapped."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    given, others = config(write("a.jsonl", ROWS)), []
    if is_damaged:
        words = prepare_data(given, renderer).train.store.folder / "words.i32"
        words.write_bytes(words.read_bytes()[:-4])

    def meanwhile(*_):
        if not others:
            others.append(None)
            others[0] = prepare_data(given, renderer)
            others.append(folders(tmp_path)[-1].stat().st_ino)

    prepared = prepare_data(given, renderer, progress=meanwhile)
    assert others
    assert prepared.train.digest == others[0].train.digest
    (folder,) = folders(tmp_path)
    assert folder.stat().st_ino == others[1]
    assert durable.verify_manifest(folder) == []


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_cache_keeps_the_sets_used_last_and_says_what_it_deletes(write, config, renderer, tmp_path, monkeypatch):
    """Never one that is in use; bounded in number and in bytes; one line."""
    monkeypatch.setattr(cache, "SETS_KEPT", 2)
    monkeypatch.setattr(cache, "WORTH_SAYING_BYTES", 0)
    path = write("a.jsonl", ROWS)
    in_use = prepare_data(config(path, max_length=100), renderer)
    os.utime(in_use.train.store.folder, (1, 1))
    made = {}
    for length in (101, 102, 103):
        before = set(folders(tmp_path)) if (tmp_path / "cache").exists() else set()
        prepared = prepare_data(config(path, max_length=length), renderer)
        (made[length],) = set(folders(tmp_path)) - before
        os.utime(made[length], (length, length))
        deletions = [str(decision.value) for decision in prepared.decisions if "deleted" in str(decision.value)]
        del prepared
    assert {made[101], made[102]} & set(folders(tmp_path)) == {made[102]}
    assert in_use.train.store.folder in folders(tmp_path)
    assert [line.split(" (")[0] for line in deletions] == ["1 older set of rows deleted"]
    assert np.array_equal(
        in_use.train[3].input_ids, prepare_data(config(path, max_length=100), renderer).train[3].input_ids
    )


def test_the_cache_is_bounded_in_bytes_and_keeps_what_was_just_made(write, config, renderer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BYTES_KEPT", 1)
    path = write("a.jsonl", ROWS)
    for length in (101, 102):
        store = prepare_data(config(path, max_length=length), renderer).train.store.folder
    assert folders(tmp_path) == [store]


def test_a_set_that_another_process_reads_is_not_deleted(write, config, renderer, tmp_path, monkeypatch):
    path = write("a.jsonl", ROWS)
    prepare_data(config(path, max_length=100), renderer)
    (folder,) = folders(tmp_path)
    code = "import sys; from llmtune import durable; hold = durable.ReadLock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"  # noqa: E501
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / durable.MANIFEST)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout.readline() == "held\n"
    monkeypatch.setattr(cache, "BYTES_KEPT", 1)
    prepare_data(config(path, max_length=101), renderer)
    assert folder in folders(tmp_path)
    reader.communicate("")
    prepare_data(config(path, max_length=102), renderer)
    assert folder not in folders(tmp_path)
