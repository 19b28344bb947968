"""Q8: memory that is used up, for real: exit 6, one message with the numbers and three edits, and the newest checkpoint stands."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch

from llmtune import durable, pipeline
from llmtune.cli.failure import message
from llmtune.errors import MachineError
from llmtune.plan.exhausted import asked_bytes, is_out_of_memory
from llmtune.preparation import Options
from llmtune.reporting import silent
from llmtune.runs.signals import StopRequest
from pipeline_fixtures import _one_thread, config_of  # noqa: F401
from pipeline_helpers import in_child, lines_of, weights_of

LARGE = (
    "training.engine=plain", "training.batch_size=32", "training.gradient_accumulation_steps=1", "training.epochs=2",
    "checkpoint.every_steps=2", "evaluation.every_steps=null", "data.max_length=256", "tracking.trackers=[jsonl]",
)  # fmt: skip
MIB = 1 << 20
LEFT_MIB = 24
"""What the child may still have once it is limited; a step of this run takes more than three times as much."""


@pytest.fixture
def rows_file(tmp_path):
    """64 long conversations, no two alike."""
    path = tmp_path / "long.jsonl"
    answers = [" ".join(f"{(index * 7 + place) % 90}" for place in range(60)) for index in range(64)]
    talks = [[{"role": "user", "content": f"words {index}"}, {"role": "assistant", "content": text}] for index, text in enumerate(answers)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def limit_memory():
    """Refuse this process more memory than it has, but for some MiB; returns what fills the gaps of its heap meanwhile."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LEFT_MIB * MIB, resource.RLIM_INFINITY))
    ballast = []
    try:
        while True:
            ballast.append(torch.empty(MIB, dtype=torch.uint8))
    except RuntimeError:
        return ballast[: len(ballast) - LEFT_MIB]


def train_and_tell(config, told, *, limit_after):
    """Train, with little memory after some steps; write down how it ended."""
    try:
        held = []
        with StopRequest() as stop:
            for result in pipeline.start(config, Options(), stop, say=silent).steps():
                held += limit_memory() if result.step == limit_after else []
    except MachineError as error:
        told.write_text(message(error))
        raise


def test_q8_memory_that_runs_out_in_a_step_is_one_message_and_the_checkpoint_stands(config_of, tmp_path):  # noqa: F811
    whole = pipeline.train(config_of(*LARGE, name="whole")).folder
    told = tmp_path / "told"
    assert in_child(lambda: train_and_tell(config_of(*LARGE), told, limit_after=2)) == 6
    said = told.read_text()
    assert re.search(r"the memory is used up in step 3: [\d.]+ [MG]B more were asked for, [\d.]+ [MG]B were held and", said), said
    assert re.search(r"the plan was [\d.]+ [MG]B; the newest checkpoint is step-000002", said), said
    edits = re.findall(r"(\S+=\S+(?: \S+=\S+)*) \([\d.]+ [MG]B planned\)", said)
    assert len(edits) == 3, said
    assert said.count("error: ") == 1
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    assert durable.verify_manifest(run / "checkpoints" / "step-000002") == []
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    pipeline.resume(str(run))
    assert weights_of(run) == weights_of(whole)
    assert lines_of(run) == lines_of(whole)


def test_an_edit_that_is_named_needs_less_and_gives_the_same_result(config_of, tmp_path):  # noqa: F811
    """N1: what is named first keeps the result but for rounding."""
    whole = lines_of(pipeline.train(config_of(*LARGE, name="whole")).folder)
    less = ("training.batch_size=1", "training.gradient_accumulation_steps=32")
    other = lines_of(pipeline.train(config_of(*LARGE, *less, name="less")).folder)
    losses = [[line["train_mean_nll"] for line in lines if "train_mean_nll" in line] for lines in (whole, other)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_torch_says_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value)
    assert asked_bytes(refused.value) == 4 << 60
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
