"""Whole runs whose frozen weights wait on the host repeat every bit of those that hold them (N15).

On a CPU `model.offload_weights` leaves weights where they are, so the runs here are given a GPU's stream by hand.
"""

import json

import pytest

from case_helpers import few_of
from llmtune.common.decisions import Decision
from llmtune.kernels import activation_offload
from llmtune.kernels.weight_offload import WeightStream
from llmtune.training import build
from llmtune.training import train as training
from rank_helpers import end_of, environment, ordinary_command, places
from training_fixtures import WORDS
from training_helpers import Forked, comparing_run, lines_of, small_run, weights_of

LORA = ("adapter.method=lora", "adapter.r=4", "model.gradient_checkpointing=true", "training.max_steps=3")
DPO = ("objective.method=dpo", "data.test_size=4")
GRPO = (
    "objective.method=grpo",
    "data.test_size=2",
    "data.max_length=128",
    "objective.num_generations=4",
    "objective.max_new_tokens=6",
    "objective.rewards={regex: 1.0, length: 0.2}",
    "objective.reward_pattern='[aeiou]'",
)
KINDS = {
    "dpo": DPO,
    "dpo against its start": (*DPO, "objective.reference=start"),
    "dpo in 4 bits": (*DPO, "model.quantization=4bit", "training.precision=bf16"),
    "simpo": ("objective.method=simpo", "data.test_size=4"),
    "grpo": GRPO,
    "grpo near its reference": (*GRPO, "objective.beta=0.1", "objective.steps_per_generation=2"),
}


@pytest.fixture
def offload(monkeypatch):
    """Runs from here on bring their frozen weights block by block, on a CPU too; returns the streams that are made."""

    def offload():
        streams = []

        def stream(model, device):
            streams.append(WeightStream(model, device))
            return Decision("model.offload_weights", True, "asked for by a test")

        monkeypatch.setattr(build, "offload_weights", stream)
        monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 12)
        return streams

    return offload


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{WORDS[at]} {at}"}], "answer": WORDS[-at]} for at in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", few_of(KINDS, ["dpo", "dpo in 4 bits", "grpo near its reference"]))
def test_n15_runs_that_compare_or_draw_answers_repeat_every_bit(
    kind, offload, tiny_model_folder, pairs_file, prompts_file, tmp_path
):
    rows = prompts_file if KINDS[kind][0].endswith("grpo") else pairs_file
    runs = []
    for name in ("resident", "offloaded"):
        streams = offload() if name == "offloaded" else None
        more = (f"run.name={name}", f"model.offload_weights={str(name == 'offloaded').lower()}", *LORA, *KINDS[kind])
        runs.append(training.train(comparing_run(tiny_model_folder, rows, tmp_path, *more)).folder)
    assert len(streams) == 1
    assert streams[0].num_bytes > 0
    assert lines_of(runs[0]) == lines_of(runs[1])
    assert weights_of(runs[0]) == weights_of(runs[1])


@pytest.mark.parametrize("bits", ["none", pytest.param("4bit", marks=pytest.mark.campaign)])
def test_n2_two_processes_repeat_every_bit(bits, offload, tiny_model_folder, rows_file, tmp_path):
    """Each has a stream of its own; only gradients of the adapter are summed."""
    runs = []
    for name in ("resident", "offloaded"):
        if name == "offloaded":
            offload()
        more = (f"run.name={name}", f"model.offload_weights={str(name == 'offloaded').lower()}", *LORA)
        more += (f"model.quantization={bits}", "training.gradient_accumulation_steps=2", "distributed.strategy=ddp")
        words = ["train", *small_run(tiny_model_folder, rows_file, tmp_path, *more)]
        started = [
            Forked(lambda words=words: ordinary_command(words), environ=environment(**place)) for place in places()
        ]
        codes, said = end_of(started)
        assert codes == [0, 0], said
        runs.append(tmp_path / name)
    assert "asked for by a test" in json.dumps(json.loads((runs[1] / "run.json").read_text())["decisions"])
    assert len([line for line in lines_of(runs[0]) if "train_mean_nll" in line]) == 3
    assert lines_of(runs[0]) == lines_of(runs[1])
    assert weights_of(runs[0]) == weights_of(runs[1])
