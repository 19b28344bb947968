"""N6: thirty steps of four trainings end where they ended when they were written down."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("golden_runs", Path(__file__).with_name("golden_runs.py"))
golden_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden_runs)


def test_every_golden_file_is_checked():
    assert (
        {path.stem for path in golden_runs.FOLDER.iterdir()}
        == {"full", "lora", "packed", "scratch"}
        == golden_runs.RUNS.keys()
    )


@pytest.mark.parametrize("name", golden_runs.RUNS)
def test_thirty_steps_are_as_written_down(bench, name):
    """N6: within 1e-5 relative on any machine; the header says where the numbers come from."""
    header, expected = golden_runs.read(name)
    assert header[0].startswith("# torch ")
    assert len(expected) == 30
    ours = [[float(word) for word in line.split()] for line in golden_runs.lines(golden_runs.trajectory(bench, name))]
    for our, their in zip(ours, expected, strict=True):
        assert our == pytest.approx(their, rel=1e-5)
    assert expected[-1][1] < expected[0][1]


def test_a_golden_trajectory_moves_when_the_numbers_do(bench):
    """N6's test fails for a weight decay that is off by a tenth."""
    _, expected = golden_runs.read("full")
    ours = [
        [float(word) for word in line.split()]
        for line in golden_runs.lines(golden_runs.trajectory(bench, "full", weight_decay=0.11))
    ]
    assert ours[-1] != pytest.approx(expected[-1], rel=1e-5)
