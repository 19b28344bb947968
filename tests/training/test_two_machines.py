"""P8 and P12: the command of docs/scaling.md for several machines, on two network namespaces of this host."""

import json
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from rank_helpers import TwoMachines, end_of, environment, needs_namespaces, wait_for_lines
from training_helpers import lines_of, small_run, weights_of

pytestmark = [pytest.mark.campaign, needs_namespaces]
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def documented(config, name):
    """The words of the command behind `torchrun`, for one CPU process on each machine."""
    (text,) = re.findall(r"^    torchrun (.*?)\n\n", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    words = {"HOST:29500": "10.77.0.1:29500", "8": "1", "C": str(config), "NAME": name}
    return [words.get(word, word) for word in shlex.split(text.replace("\\\n", ""))]


@contextmanager
def started(machines, words):
    """`torchrun` on both machines. Both have this host's name, so each says its address, and which one is HOST."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *launcher, "--local-addr", f"10.77.0.{number}",
             "--rdzv-conf", f"is_host={int(number == 1)}", *words],
            env=environment(GLOO_SOCKET_IFNAME=end),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, (name, end) in enumerate(zip(machines.names, machines.ends, strict=True), 1)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.stdout.close()
            process.wait()


@pytest.mark.parametrize("machine", [0, 1])
def test_p8_a_signal_to_torchrun_on_one_machine_stops_both_saved_and_the_same_command_goes_on(
    tiny_model_folder, rows_file, tmp_path, machine
):
    config = tmp_path / "config.yaml"
    config.write_text("training:\n  max_steps: 300\n")
    given = small_run(tiny_model_folder, rows_file, tmp_path, "checkpoint.every_steps=1000", "distributed.timeout_s=60")
    words = [*documented(config, "stopped"), *given]
    with TwoMachines() as machines:
        with started(machines, words) as processes:
            wait_for_lines(tmp_path / "stopped", 20)
            processes[machine].send_signal(signal.SIGTERM)
            _, said = end_of(processes)  # torchrun has exit codes of its own
        info = json.loads((tmp_path / "stopped" / "run.json").read_text())
        assert (info["state"], 10 <= info["step"] < 300) == ("stopped", True), said
        for name in ("stopped", "whole"):
            with started(machines, [*documented(config, name), *given]) as processes:
                codes, said = end_of(processes)
            assert codes == [0, 0], said
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
