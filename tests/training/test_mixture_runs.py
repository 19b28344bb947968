"""The mixture law in whole runs: each epoch trains its shares, and a run stopped in the middle ends the same (P2)."""

import json
from collections import Counter

import pytest

from llmtune.api import Trainer
from llmtune.errors import CheckpointError
from llmtune.training import train as training
from training_helpers import lines_of, weights_of


@pytest.fixture
def mixed(config_of, rows_file, tmp_path):
    """The config of a run on a quarter of its rows from a second file of 6; further KEY=VALUE on top."""
    second = tmp_path / "second.jsonl"
    second.write_text(
        "".join(line + "\n" for line in rows_file.read_text().splitlines()[-6:]).replace("user asks", "x")
    )
    sources = f"data.train=[{{path: {rows_file}, max_samples: 18}}, {{path: {second}, share: 0.4, name: few}}]"
    fixed = ("data.test_size=0", "evaluation.every_steps=null", "training.epochs=2", "checkpoint.every_steps=1")
    return lambda *more, name: config_of(sources, *fixed, *more, name=name)


def test_p2_a_mixture_stopped_in_the_middle_of_an_epoch_resumes_to_the_same_bytes(mixed):
    whole = training.train(mixed(name="whole")).folder
    trainer = Trainer(mixed(name="stopped"))
    for step in trainer.steps():
        if step.step == 11:  # eight steps are an epoch of 30 rows
            break
    batches, stopped = trainer.session.setup.batches, trainer.result().folder
    sources = json.loads((stopped / "run.json").read_text())["identity"]["config"]["data"]["train"]
    assert sources[1]["share"] == 0.4
    other = json.dumps([sources[0], sources[1] | {"share": 0.5}])
    with pytest.raises(CheckpointError, match="another training"):
        training.resume(str(stopped), overrides=[f"data.train={other}"])
    training.resume(str(stopped))
    assert lines_of(whole) == lines_of(stopped)
    assert weights_of(whole) == weights_of(stopped)
    tokens = {line["step"]: line["num_tokens"] for line in lines_of(whole) if "num_tokens" in line}
    assert tokens == {step: batches.window(step).num_tokens for step in range(1, 17)}
    epochs = [[row for step in range(8) for row in batches.window(8 * epoch + step + 1).sources] for epoch in (0, 1)]
    assert [Counter("second.jsonl" in row for row in rows) for rows in epochs] == [{False: 18, True: 12}] * 2
    assert epochs[0] != epochs[1]
