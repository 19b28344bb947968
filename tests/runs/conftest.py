"""A small run whose checkpoints are numbers, and the story of one save, for the tests of this folder."""

import errno
import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from disk_faults import Counting, Failing, Killed, Killing, Tracing, Unsynced
from llmtune import durable
from llmtune.engine.state import Snapshot
from llmtune.errors import MachineError
from llmtune.runs import checkpoint
from llmtune.runs.folder import RunFolder, create_run
from power_loss import disk_states, put_on_disk, read_tree

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "short write": None}


def flip_a_bit(place, other, chance):
    file = any_file(place, chance)
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut(place, other, chance):
    file = any_file(place, chance)
    size = file.stat().st_size
    os.truncate(file, chance.choice([0, 1, 8, size // 2, size - 1, chance.randrange(size)]) % size)


def lengthen(place, other, chance):
    with any_file(place, chance).open("ab") as file:
        file.write(chance.choice([b"\0", b"\n", b" ", chance.randbytes(100)]))


def overwrite_a_block(place, other, chance):
    file = any_file(place, chance)
    data = bytearray(file.read_bytes())
    begin = chance.randrange(len(data))
    end = min(len(data), begin + chance.choice([1, 16, 512]))
    data[begin:end] = bytes(byte ^ 0xFF for byte in data[begin:end])
    file.write_bytes(data)


def delete_a_file(place, other, chance):
    any_file(place, chance).unlink()


def add_a_file(place, other, chance):
    (
        place / chance.choice(["x", "model.bin", "training_args.bin", "MODEL.safetensors", ".hidden", "state.json~"])
    ).write_bytes(b"foreign")


def add_a_folder(place, other, chance):
    (place / "extra").mkdir()


def take_a_file_of_another_checkpoint(place, other, chance):
    file = any_file(place, chance)
    file.write_bytes((other / file.name).read_bytes())


def exchange_two_files(place, other, chance):
    one, two = chance.sample(sorted(place.iterdir()), 2)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def rename_a_file(place, other, chance):
    file = any_file(place, chance)
    file.rename(file.with_name(f"{file.name}.1"))


def put_a_link_in_place(place, other, chance):
    file = any_file(place, chance)
    file.rename(place.parent / file.name)
    file.symlink_to(place.parent / file.name)


def edit_the_manifest(place, other, chance):
    path = place / "manifest.json"
    manifest = json.loads(path.read_text())
    name = chance.choice(sorted(manifest["files"]))
    edits = [
        lambda: manifest.update(step=3),
        lambda: manifest.update(threads=2),
        lambda: manifest["files"].pop(name),
        lambda: manifest["files"][name].update(size=1),
        lambda: manifest["files"][name].update(sha256="0" * 64),
        lambda: manifest.pop("manifest_sha256"),
        lambda: manifest.update(added=None),
    ]
    chance.choice(edits)()
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def write_the_manifest_otherwise(place, other, chance):
    path = place / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=chance.choice([None, 0, 2, 4])))


CORRUPTIONS = {
    one.__name__.replace("_", " "): one
    for one in (
        flip_a_bit,
        cut,
        lengthen,
        overwrite_a_block,
        delete_a_file,
        add_a_file,
        add_a_folder,
        take_a_file_of_another_checkpoint,
        exchange_two_files,
        rename_a_file,
        put_a_link_in_place,
        edit_the_manifest,
        write_the_manifest_otherwise,
    )
}


def any_file(place, chance):
    return chance.choice(sorted(place.iterdir()))


class Story:
    """What a training does at a save: log, checkpoint, retention, best.

    With NumPy's tensors, so that forked children never touch torch.
    """

    def __init__(self, run):
        self.run = run

    def write_weights(self, step):
        def write(folder):
            durable.write_tensors(
                folder / "model.safetensors",
                {"w": np.full(64, step, np.float32), "b": np.arange(8, dtype=np.int64) * step},
            )
            (folder / "tokenizer.json").write_text(f'{{"a library wrote this": {step}}}')

        return write

    def snapshot(self, step):
        return Snapshot(
            {"optimizer": {"m": np.full(16, step / 3)}, "rng": {"words": np.arange(5) + step}},
            {"training": {"step": step}},
        )

    def save(self, step):
        return checkpoint.save_checkpoint(
            self.run, step, self.write_weights(step), self.snapshot(step), {"threads": 1, "world_size": 1}
        )

    def save_best(self, step):
        return checkpoint.save_folder(self.run.checkpoints / "best", self.write_weights(step), {"step": step})

    def tell(self, step, mark=lambda note: None):
        """Everything that happens to the disk in step `step`; `mark` is told of each promise as it becomes one."""
        with durable.AppendLog(self.run.path / "metrics.jsonl") as log:
            log.truncate_to(step - 1)
            log.append({"step": step, "train_mean_nll": 1 / step})
            log.sync()
        self.save(step)
        mark(f"step {step}")
        checkpoint.delete_old_checkpoints(self.run, keep_last=1)
        self.save_best(step)
        mark(f"best {step}")
        self.run.update(step=step)
        mark(f"run.json {step}")


@pytest.fixture
def run(tmp_path):
    """A new run, with syncs left out for speed."""
    with durable.use_backend(Unsynced()), create_run(tmp_path / "runs", "tiny") as one:
        yield one


@pytest.fixture
def story(run):
    return Story(run)


def refusal_of(action, *arguments):
    try:
        action(*arguments)
    except MachineError as error:
        return error
    return None


class Scene:
    """A run with step 1 saved, put anew as often as wanted, and the laws that hold whatever happens to it while it
    saves step 2.
    """

    def __init__(self, folder):
        self._number = 0
        self.scratch = folder / "scratch"
        with create_run(folder / "template", "tiny") as run:
            Story(run).tell(1)
        self.template = folder / "template" / "tiny"
        after = self.copy()
        self.tell(after)
        self.finished = self.tree(after)

    def fresh_path(self):
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._number += 1
        return self.scratch / str(self._number)

    def copy(self):
        path = self.fresh_path()
        shutil.copytree(self.template, path)
        return path

    @staticmethod
    def tree(path):
        """Everything in the run's folder but the lock, whose content names a process."""
        tree = read_tree(path)
        tree.pop(".lock", None)
        return tree

    @staticmethod
    def tell(path, mark=lambda note: None):
        with RunFolder.open(path) as run:
            Story(run).tell(2, mark)

    def count_operations(self):
        path = self.copy()
        with durable.use_backend(Counting(Unsynced())) as counting:
            self.tell(path)
        assert counting.count > 50
        assert {"open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir", "truncate"} <= counting.by_kind.keys()
        return counting.count

    def kill_everywhere(self):
        total = self.count_operations()
        for at in range(1, total + 1):
            path = self.copy()
            with durable.use_backend(Killing(at, below=Unsynced())), pytest.raises(Killed):
                self.tell(path)
            self.assert_survived(path)
        return total

    def kill_twice(self, every):
        """Kill a save, then its recovery at each of that one's operations; return how many recoveries were killed."""
        killed = 0
        for first in range(1, self.count_operations() + 1, every):
            path = self.copy()
            with durable.use_backend(Killing(first, below=Unsynced())), pytest.raises(Killed):
                self.tell(path)
            second = 1
            while self.is_killed_recovering(path, second):
                killed += 1
                second += 1
            self.assert_survived(path)
        return killed

    @staticmethod
    def is_killed_recovering(path, at):
        with durable.use_backend(Killing(at, below=Unsynced())):
            try:
                with RunFolder.open(path) as run:
                    checkpoint.newest_valid(run)
            except Killed:
                return True
        return False

    def kill_for_real(self, every):
        kills = 0
        for at in range(1, self.count_operations() + 1, every):
            path = self.copy()
            child = os.fork()
            if child == 0:
                try:
                    with durable.use_backend(Killing(at, for_real=True)):
                        self.tell(path)
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
            self.assert_survived(path)
            kills += 1
        return kills

    def fail_everywhere(self, *faults, for_ever):
        """Fail each operation with one of `faults`, in turn; (operations that failed, saves that said so)."""
        fired = refused = 0
        for at in range(1, self.count_operations() + 1):
            path, fault = self.copy(), faults[at % len(faults)]
            with durable.use_backend(Failing(at, FAULTS[fault], for_ever=for_ever, below=Unsynced())) as failing:
                error = refusal_of(self.tell, path)
            if error is not None:
                refused += 1
                problem = error.problems[0]
                assert f"({fault})" in problem.problem
                assert problem.where
                assert problem.fix
                assert durable.errno_of(error) == FAULTS[fault]
            fired += failing.fired
            self.assert_survived(path)
        return fired, refused

    def lose_power_everywhere(self, *, last_first=False):
        path = self.copy()
        before = read_tree(path)
        with durable.use_backend(Tracing(Unsynced())) as tracing:
            self.tell(path, tracing.mark)
        states = 0
        for state in disk_states(path, before, tracing.operations, last_first=last_first):
            states += 1
            place = self.fresh_path()
            put_on_disk(state.tree, place)
            self.assert_power_loss_survived(place, state)
        return states

    def assert_survived(self, path):
        """The promises' method: a valid checkpoint, no repair by hand, no litter, and the finished run is
        byte-identical.
        """
        with RunFolder.open(path) as run:
            names = [name for _, folders, files in os.walk(path) for name in (*folders, *files)]
            assert [name for name in names if name.startswith(".llmtune")] == [], "litter after the sweep"
            self.assert_whole(run)
            newest, problems = checkpoint.newest_valid(run)
            assert newest is not None, "no checkpoint, although there was one before"
            assert problems == []
            assert newest.step in (1, 2)
            assert checkpoint.load(newest).snapshot.state == {"training": {"step": newest.step}}
            assert durable.read_manifest(run.checkpoints / "best")["step"] in (1, 2)
            durable.AppendLog(path / "metrics.jsonl").close()
            assert (path / "metrics.jsonl").read_bytes().endswith(b"}\n"), "a torn line stays when the log is opened"
            Story(run).tell(2)
        assert self.tree(path) == self.finished, "the finished run differs"

    def assert_power_loss_survived(self, place, state):
        """Old or new, never neither; what was promised before the power went is there."""
        with RunFolder.open(place) as run:
            self.assert_whole(run)
            newest, _ = checkpoint.newest_valid(run)
            assert newest is not None, "no checkpoint, although there was one before"
            best_step = durable.read_manifest(run.checkpoints / "best")["step"]
            assert newest.step == 2 or "step 2" not in state.promises, "the saved step is gone"
            assert best_step == 2 or "best 2" not in state.promises, "the saved best is gone"
            assert run.info["step"] == 2 or "run.json 2" not in state.promises, "what run.json said is gone"
            with durable.AppendLog(run.path / "metrics.jsonl") as log:
                log.truncate_to(newest.step)
                assert log.lines == newest.step, "the log lacks a line of a step that was saved"

    def corrupt(self, count, seed=0):
        """Damage the checkpoint of step 2 `count` times, each from anew, require each to be found, and count the ways."""  # noqa: E501
        source = self.copy()
        with RunFolder.open(source) as run:
            run_id = run.run_id
            good, other = Story(run).save(2), Story(run).save(1)
        chance = random.Random(seed)
        ways = Counter()
        for number in range(count):
            way = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
            place = self.scratch / "checkpoint" / str(number) / "step-000002"
            shutil.copytree(good, place)
            CORRUPTIONS[way](place, other, chance)
            assert checkpoint.verify(checkpoint.CheckpointFolder(2, place), run_id=run_id) != [], (
                f"not found: {way} (number {number})"
            )
            shutil.rmtree(place.parent)
            ways[way] += 1
        return ways

    def exchange(self):
        """Put whole checkpoints in the wrong place."""
        path = self.copy()
        with RunFolder.open(path) as run:
            first, second = Story(run).save(1), Story(run).save(2)
            shutil.rmtree(second)
            shutil.copytree(first, second)
            assert "this is the checkpoint of step 1" in str(
                checkpoint.verify(checkpoint.CheckpointFolder(2, second), run_id=run.run_id)
            )
        with create_run(self.scratch / "other", "tiny") as other:
            foreign = Story(other).save(2)
            assert "another run" in str(
                checkpoint.verify(checkpoint.CheckpointFolder(2, foreign), run_id=RunFolder.open(path).run_id)
            )

    @staticmethod
    def assert_whole(run):
        for folder in (*(one.path for one in checkpoint.all_checkpoints(run)), run.checkpoints / "best"):
            assert durable.verify_manifest(folder) == [], f"{folder.name} has its final name and is not whole"


@pytest.fixture
def scene(tmp_path):
    """A scene in memory where the machine has such a folder: these tests make and delete thousands of files."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path
    try:
        with durable.use_backend(Unsynced()):
            yield Scene(place)
    finally:
        shutil.rmtree(place)
