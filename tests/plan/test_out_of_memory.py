"""Q8: memory is really used up: exit 6, one message with the numbers and three changes, and the newest checkpoint."""

import json
import re
import resource
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from case_helpers import few_of
from llmtune import durable
from llmtune.cli.failure import message
from llmtune.common.memory import is_out_of_memory
from llmtune.common.text import silent
from llmtune.config.process_options import Options
from llmtune.errors import MachineError
from llmtune.plan.out_of_memory import RESERVE_BYTES, requested_bytes
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from training_fixtures import _one_thread, config_of  # noqa: F401
from training_helpers import in_child, lines_of, weights_of

LARGE = (
    "training.engine=plain", "training.batch_size=32", "training.gradient_accumulation_steps=1", "training.epochs=2",
    "checkpoint.every_steps=2", "evaluation.every_steps=null", "data.max_length=256", "tracking.trackers=[jsonl]",
)  # fmt: skip
MIB = 1 << 20
LEFT_MIB = 24
"""Memory that the child may still take once it is limited; a step of this run takes three times as much."""


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """64 long conversations, no two alike."""
    path = tmp_path_factory.mktemp("rows") / "long.jsonl"
    answers = [" ".join(f"{(index * 7 + position) % 90}" for position in range(60)) for index in range(64)]
    talks = [
        [{"role": "user", "content": f"words {index}"}, {"role": "assistant", "content": text}]
        for index, text in enumerate(answers)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


class Finished(NamedTuple):
    """What a run has left."""

    weights: dict[str, bytes]
    lines: list[dict]


@pytest.fixture(scope="module")
def runs_made():
    return []


@pytest.fixture
def uninterrupted(runs_made, config_of):  # noqa: F811
    """The run that memory sufficed for, made once."""
    if not runs_made:
        folder = training.train(config_of(*LARGE, name="uninterrupted")).folder
        runs_made.append(Finished(weights_of(folder), lines_of(folder)))
    return runs_made[0]


def mapped_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit_memory(left_mib=LEFT_MIB):
    """Refuse this process more memory than it has, but for some MiB; returns tensors that fill the gaps of its heap."""
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes() + left_mib * MIB, resource.RLIM_INFINITY))
    ballast = []
    try:
        while True:
            ballast.append(torch.empty(MIB, dtype=torch.uint8))
    except RuntimeError:
        return ballast[: len(ballast) - left_mib]


def train_limited(config, report, *, limit_after):
    """Train, with little memory after some steps; write down how it ended."""
    try:
        ballast = []
        with StopRequest() as stop:
            for result in training.open_run(config, Options(), stop, print_line=silent).steps():
                ballast += limit_memory() if result.step == limit_after else []
    except MachineError as error:
        report.write_text(message(error))
        raise


def test_q8_memory_that_runs_out_in_a_step_is_one_message_and_the_checkpoint_stands(
    config_of,  # noqa: F811
    uninterrupted,
    tmp_path,
):
    report = tmp_path / "report"
    assert in_child(lambda: train_limited(config_of(*LARGE), report, limit_after=2)) == 6
    text = report.read_text()
    assert re.search(
        r"the memory is used up in step 3: [\d.]+ [kMG]?B more were asked for, [\d.]+ [MG]B were held and", text
    ), text
    assert re.search(r"the plan was [\d.]+ [MG]B; the newest checkpoint is step-000002", text), text
    edits = re.findall(r"(\S+=\S+(?: \S+=\S+)*) \([\d.]+ [MG]B planned\)", text)
    assert len(edits) == 3, text
    assert text.count("error: ") == 1
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    assert durable.verify_manifest(run / "checkpoints" / "step-000002") == []
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    training.resume(str(run))
    assert weights_of(run) == uninterrupted.weights
    assert lines_of(run) == uninterrupted.lines


def load_limited(config, report, *, left_mib, of_the_heap=False):
    """Train, with little memory from the moment at which everything but the model is there; write down how it ended."""
    ballast = []

    def print_line(line):
        if not line.startswith("memory "):  # the plan, which is the last line before the model is loaded
            return
        if of_the_heap:
            ballast.extend(limit_memory(left_mib))
        else:
            # Other tests of this process may have left gaps in its heap into which the whole model fits.
            ballast.extend(limit_memory(left_mib=0))
            limit = mapped_bytes() + RESERVE_BYTES + left_mib * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    try:
        training.train(config, print_line=print_line)
    except MachineError as error:
        report.write_text(message(error))
        raise


def assert_report(text, doing):
    assert text.count("error: ") == 1
    numbers = (
        r"(?:[\d.]+ [kMG]?B more were|more was) asked for, [\d.]+ [MG]B were held "
        r"and this process could hold [\d.]+ [MG]B here"
    )
    assert re.search(
        rf"the memory is used up {doing}: {numbers}.*; the plan was [\d.]+ [MG]B; nothing is saved yet", text
    )
    return re.findall(r"(\S+=\S+(?: \S+=\S+)*) \([\d.]+ [MG]B planned\)", text)


def test_q8_memory_that_runs_out_while_a_model_is_built_is_one_message_with_three_edits_and_leaves_no_run(
    config_of,  # noqa: F811
    tmp_path,
):
    report = tmp_path / "report"
    config = config_of(*LARGE, "model.name=custom-large", "model.architecture.n_layers=2")  # 110 MB
    assert in_child(lambda: load_limited(config, report, left_mib=LEFT_MIB)) == 6
    assert len(assert_report(report.read_text(), "while the model was loaded")) == 3, report.read_text()
    assert list((tmp_path / "runs").glob("*")) == []


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory, tiny_tokenizer):
    """A model of 41 MB in bfloat16, which takes twice that where it is trained."""
    shape = {
        "hidden_size": 768,
        "intermediate_size": 3400,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=400, tie_word_embeddings=True, bos_token_id=None, **shape)
    ).bfloat16()
    folder = tmp_path_factory.mktemp("half")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("left_mib", "heap"), few_of([(8, False), (48, False), (80, False), (160, True)], [(48, False), (160, True)])
)
def test_q8_memory_that_runs_out_while_weights_are_read_is_not_blamed_on_the_model(
    config_of,  # noqa: F811
    half_folder,
    tmp_path,
    left_mib,
    heap,
):
    """Exit 6, not 4: while the file is opened, while its tensors are read, and while they become float32."""
    report = tmp_path / "report"
    config = config_of(*LARGE, f"model.name={half_folder}")
    assert in_child(lambda: load_limited(config, report, left_mib=left_mib, of_the_heap=heap)) == 6
    assert_report(report.read_text(), "(?:while the model was loaded|in step 1)")


def rows_that_fill(folder, count):
    """The settings of a step of `count` rows."""
    rows = folder / "many.jsonl"
    talk = {"messages": [{"role": "user", "content": "words"}, {"role": "assistant", "content": " ".join(["90"] * 70)}]}
    rows.write_text((json.dumps(talk) + "\n") * count)
    return f"data.train={rows}", f"training.batch_size={count}", "data.test_size=0"


def test_the_rows_that_are_to_fill_a_device_are_not_refused_before(config_of, tmp_path):  # noqa: F811
    """They once had five tokens more than `data.max_length`, so that no memory was touched."""
    trained = training.train(config_of(*LARGE, *rows_that_fill(tmp_path, 4), "training.epochs=1"))
    assert [line["num_sequences"] for line in lines_of(trained.folder)] == [4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_q8_a_cuda_device_that_is_full_is_one_message_with_the_device_and_three_edits(config_of, tmp_path):  # noqa: F811
    """A micro-batch of 65,536 rows of this model needs more than any device has."""
    huge = (*rows_that_fill(tmp_path, 65536), "model.name=custom-large", "training.precision=bf16")
    with pytest.raises(MachineError) as full:
        training.train(config_of(*LARGE, *huge))
    assert full.value.exit_code == 6
    text = message(full.value)
    assert re.search(
        r"the memory is used up in step 1: [\d.]+ [MG]B more were asked for, "
        r"[\d.]+ [MG]B were held and .* has [\d.]+ GB",
        text,
    ), text
    assert len(re.findall(r"\([\d.]+ [MG]B planned\)", text)) == 3, text
    assert torch.ones(2, device="cuda").sum().item() == 2  # the device goes on


def test_an_edit_that_is_named_needs_less_and_gives_the_same_result(config_of, uninterrupted):  # noqa: F811
    """N1: what is named first keeps the result but for rounding."""
    less = ("training.batch_size=1", "training.gradient_accumulation_steps=32")
    changed = lines_of(training.train(config_of(*LARGE, *less, name="less")).folder)
    losses = [
        [line["train_mean_nll"] for line in lines if "train_mean_nll" in line]
        for lines in (uninterrupted.lines, changed)
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_torch_says_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value)
    assert requested_bytes(refused.value) == 4 << 60
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
