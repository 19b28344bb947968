"""Figures of the machine: NVML through a stand-in of the library, bars, JSON, and the file of a run."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from llmtune.cli import gpu_monitor
from llmtune.cli.main import run
from llmtune.tracking.machine import GPU, Machine
from llmtune.tracking.queue import TRACKERS, TrackerKind, TrackerQueue
from llmtune.tracking.system import SystemTracker
from llmtune.tracking.tracker import RunInfo
from llmtune.training import train as training
from llmtune.watch.machine_view import machine_view
from llmtune.watch.run_data import RunData
from training_fixtures import _one_thread, _planned_bytes, config_of, rows_file  # noqa: F401
from training_helpers import lines_of, weights_of


class NVML:
    """The functions of pynvml that are used, for two GPUs; the second one tells neither use nor power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, count=2):
        self.count, self.is_open = count, False

    def nvmlInit(self):  # noqa: N802
        self.is_open = True

    def nvmlShutdown(self):  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self):  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return [b"NVIDIA A", "NVIDIA B"][handle]

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        return SimpleNamespace(gpu=self.of_the_first(handle, 87))

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(used=6 * 10**9, total=24 * 10**9, free=18 * 10**9)

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return [61, 90][handle]

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        return self.of_the_first(handle, 250_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):  # noqa: N802
        return self.of_the_first(handle, 350_000)

    def of_the_first(self, handle, value):
        if handle:
            raise self.NVMLError("Not Supported")
        return value


class NoDriver(NVML):
    def nvmlInit(self):  # noqa: N802
        raise self.NVMLError("NVML Shared Library Not Found")


def test_the_figures_of_each_gpu_are_read_in_plain_units():
    machine = Machine(NVML())
    first, second = machine.figures().gpus
    assert first == GPU(0, "NVIDIA A", 0.87, 6 * 10**9, 24 * 10**9, 61, 250.5, 350.0)
    assert second == GPU(1, "NVIDIA B", None, 6 * 10**9, 24 * 10**9, 90, None, None)
    machine.close()
    assert not machine._nvml.is_open


@pytest.mark.parametrize(
    ("nvml", "reason"), [(NoDriver(), "Shared Library Not Found"), (NVML(count=0), "is in this machine")]
)
def test_without_a_gpu_the_processors_are_shown_and_the_reason_is_said(nvml, reason):
    machine = Machine(nvml)
    figures = machine.figures()
    assert figures.gpus == ()
    assert reason in machine.no_gpu
    assert 0 <= figures.cpu_use <= 1
    assert figures.process_memory_bytes < figures.memory_total_bytes
    assert reason in shown(machine)
    assert "processors" in shown(machine)
    machine.close()


def shown(machine, columns=80):
    console = Console(width=columns, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(machine_view(machine.figures(), machine.no_gpu, columns))
    console.file.close()
    return console.export_text()


def test_the_bars_are_as_long_as_the_shares():
    lines = shown(Machine(NVML())).splitlines()
    assert lines[0].strip() == "GPU 0 NVIDIA A"
    assert lines[1].split() == ["use", "█" * 30 + "░" * 4, "87%"]
    assert lines[2].split() == ["memory", "█" * 8 + "░" * 26, "6.00", "GB", "of", "24.00", "GB"]
    assert lines[3].split()[2:] == ["250", "W", "of", "350", "W"]
    assert lines[4].split()[2:] == ["61", "°C"]
    assert [line.split()[0] for line in lines[6:8]] == ["memory", "heat"]  # no use, no power
    assert "hot: it may slow down" in lines[7]
    assert max(map(len, lines)) <= 80


def test_the_command_prints_bars_or_json_once(monkeypatch, capsys):
    monkeypatch.setattr(gpu_monitor.time, "sleep", lambda _: None)
    assert run(["gpu-monitor", "--once"]) == 0
    assert "CPU, " in capsys.readouterr().out
    assert run(["gpu-monitor", "--once", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line).keys() >= {"time", "cpu_use", "memory_used_bytes", "gpus"}


def test_a_run_has_figures_by_time_until_its_end_and_goes_on_in_the_same_file(tmp_path):
    for _ in range(2):
        queue = TrackerQueue([SystemTracker(Machine(NVML()), seconds=0.05)])
        queue.start(RunInfo(name="a", folder=tmp_path, total_steps=1))
        time.sleep(0.3)
        assert queue.finish("finished")[0].failure is None
        lines = [json.loads(line) for line in (tmp_path / "system.jsonl").read_text().splitlines()]
        assert len(lines) >= 2
        assert all(line["gpus"][0]["use"] == 0.87 for line in lines)
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    data = RunData(tmp_path)
    data.refresh()
    assert data.system["gpus.0.power_watts"].values[0] == 250.5
    assert len(data.system["process_cpus"]) == len(lines)


def test_a_folder_that_takes_no_file_switches_the_tracker_off(tmp_path):
    said = []
    queue = TrackerQueue([SystemTracker(Machine(NoDriver()), seconds=0.05)], print_line=said.append)
    queue.start(RunInfo(name="a", folder=tmp_path / "missing" / Path("x"), total_steps=1))
    assert "system" in queue.finish("finished")[0].tracker
    assert any("tracker system is switched off" in line for line in said)


def test_n12_a_run_is_byte_identical_with_figures_of_the_machine(config_of, monkeypatch):  # noqa: F811
    """The thread wakes up many times within each step."""
    monkeypatch.setitem(TRACKERS, "system", TrackerKind(lambda _: SystemTracker(seconds=0.005)))
    folders = [
        training.train(config_of(f"tracking.trackers={trackers}", name=name)).folder
        for name, trackers in (("without", "[jsonl]"), ("with", "[jsonl, system]"))
    ]
    assert len((folders[1] / "system.jsonl").read_text().splitlines()) > 5
    assert not (folders[0] / "system.jsonl").exists()
    assert weights_of(folders[0]) == weights_of(folders[1])
    assert lines_of(folders[0]) == lines_of(folders[1])
