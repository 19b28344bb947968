"""What a launcher says is taken at its word, or refused by name: nobody trains alone who was started with others."""

import pytest

from llmtune.cli.main import run as command
from llmtune.common.environment import launched_process

TOGETHER = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
NAMES = (*TOGETHER, "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, (0, 1, None)),
        ({"WORLD_SIZE": "1"}, (0, 1, None)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (0, 1, 1)),
        (TOGETHER, (1, 2, None)),
        (TOGETHER | {"LOCAL_WORLD_SIZE": "2"}, (1, 2, 2)),
        # Of a scheduler, and of other launchers, for a command that may be alone.
        ({"SLURM_PROCID": "3", "PMI_RANK": "3", "OMPI_COMM_WORLD_RANK": "3", "GROUP_RANK": "3"}, (0, 1, None)),
    ],
)
def test_the_place_of_a_process_is_what_torch_s_names_say(environ, found):
    assert launched_process(environ) == found


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"RANK": "0"}, "RANK is 0 and WORLD_SIZE is not set"),
        ({"RANK": "3", "LOCAL_RANK": "3"}, "RANK is 3 and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty, and must be a whole number from 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is `two`, and must be a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is `0`, and must be"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is `-2`, and must be"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE is `1.5`, and must be"),
        (TOGETHER | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        (TOGETHER | {"RANK": "-1"}, "RANK is `-1`, and must be a whole number from 0"),
        (TOGETHER | {"RANK": ""}, "RANK is empty, and must be a whole number from 0"),
        (TOGETHER | {"LOCAL_RANK": "one"}, "LOCAL_RANK is `one`, and must be a whole number from 0"),
        (TOGETHER | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is `-1`, and must be"),
        (TOGETHER | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is `0`, and must be a whole number from 1"),
        (TOGETHER | {"MASTER_PORT": "http"}, "MASTER_PORT is `http`, and must be a whole number from 1 to 65535"),
        (TOGETHER | {"MASTER_PORT": "99999"}, "MASTER_PORT is `99999`, and must be"),
        (TOGETHER | {"MASTER_ADDR": ""}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_does_not_say_it_is_refused_before_anything_is_trained(
    environ, problem, monkeypatch, capsys, tmp_path
):
    """Each process says so: another may have another environment."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert command(["train", "--config", "test", "--no-cuda"]) == 6
    said = capsys.readouterr().err
    assert problem in said
    assert "where: environment" in said
    assert not list(tmp_path.iterdir())
