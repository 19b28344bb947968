"""A log loses at most the line that was being written, and can be cut to where a resume begins."""

import errno
import os
import subprocess
import sys

import pytest

from disk_faults import Failing
from llmtune import durable
from llmtune.errors import MachineError


def test_every_appended_line_is_in_the_file_when_append_returns(tmp_path):
    with durable.AppendLog(tmp_path / "log") as log:
        log.append({"step": 1, "loss": float("inf")})
        assert (tmp_path / "log").read_bytes() == b'{"step": 1, "loss": "inf"}\n'
        assert log.lines == 1


def test_a_killed_process_loses_no_line(tmp_path):
    code = """
import os, signal, sys
from llmtune import durable
log = durable.AppendLog(sys.argv[1])
for step in range(100):
    log.append({"step": step})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], check=False)
    assert [line["step"] for line in durable.read_lines(tmp_path / "log")] == list(range(100))


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 3', b'{"step": 3}', b"\0" * 50, b"\0\0\n", b"null\n", b"[3]\n", b'{"step": 3}x\n', b"\xff\n", b"\n"],
)
def test_a_torn_end_is_cut_when_the_log_is_opened(tmp_path, tail):
    good = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "log").write_bytes(good + tail)
    assert len(durable.read_lines(tmp_path / "log")) == 2
    with durable.AppendLog(tmp_path / "log") as log:
        assert log.lines == 2
        log.append({"step": 3})
    assert (tmp_path / "log").read_bytes() == good + b'{"step": 3}\n'


def test_every_place_of_a_cut_gives_a_log_of_whole_lines(tmp_path):
    whole = b"".join(b'{"step": %d, "text": "\xc3\xa9"}\n' % step for step in range(4))
    for size in range(len(whole) + 1):
        (tmp_path / "log").write_bytes(whole[:size])
        with durable.AppendLog(tmp_path / "log") as log:
            assert log.lines == whole[:size].count(b"\n")
        assert whole.startswith((tmp_path / "log").read_bytes())


def test_a_resume_drops_the_lines_after_its_checkpoint(tmp_path):
    """P2: the finished file is byte-identical."""

    def write(path, steps):
        with durable.AppendLog(path) as log:
            for step in steps:
                log.append({"step": step, "loss": 1 / step})
                log.append({"step": step, "eval_loss": 2 / step})

    write(tmp_path / "unbroken", range(1, 7))
    write(tmp_path / "broken", range(1, 6))
    with durable.AppendLog(tmp_path / "broken") as log:
        assert log.truncate_to(6) == 4
        assert log.lines == 6
    write(tmp_path / "broken", range(4, 7))
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "unbroken").read_bytes()


def test_a_log_can_be_cut_to_a_number_of_lines(tmp_path):
    with durable.AppendLog(tmp_path / "log") as log:
        for number in range(5):
            log.append({"row": number})
        assert log.truncate_to(2) == 3
        assert log.truncate_to(9) == 0
        log.append({"row": "next"})
    assert [line["row"] for line in durable.read_lines(tmp_path / "log")] == [0, 1, "next"]


def test_a_refused_line_leaves_no_trace_and_the_log_goes_on(tmp_path):
    """P7: half of the line had been written."""
    with durable.AppendLog(tmp_path / "log") as log:
        log.append({"step": 1})
        with (
            durable.use_backend(Failing(1, errno.ENOSPC)),
            pytest.raises(MachineError, match="cannot append to: No space left"),
        ):
            log.append({"step": 2})
        assert os.path.getsize(tmp_path / "log") == 12  # noqa: PTH202
        log.append({"step": 3})
    assert [line["step"] for line in durable.read_lines(tmp_path / "log")] == [1, 3]


def test_a_log_that_is_not_there_reads_as_empty(tmp_path):
    assert durable.read_lines(tmp_path / "none") == []
