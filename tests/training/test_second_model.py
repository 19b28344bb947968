"""`objective.reference: model`: answers are compared with a second model, frozen, whose tokens have the same ids."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.config.process_options import Options
from llmtune.errors import TokenizerError
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training

LN2 = float(-torch.nn.functional.logsigmoid(torch.zeros(())))


@pytest.fixture
def teacher(tiny_model_folder, tmp_path):
    """The tiny model with larger weights."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_model_folder, folder)
    tensors = {name: tensor * 1.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def first_window(config_of, tmp_path):
    """Loss and metrics of the first window of a run, before any update, and the reference's part of its plan."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            f'{{"prompt": "words {at}", "chosen": "a word {at * 7}", "rejected": "numbers and {at}"}}\n'
            for at in range(6)
        )
    )

    def first_window(model, reference, *overrides):
        words = (
            f"data.train={pairs}",
            "data.test_size=0",
            "evaluation.every_steps=null",
            "objective.method=dpo",
            f"model.name={model}",
        )
        second = ("evaluation.every_steps=null", "objective.reference=model", f"objective.reference_model={reference}")
        with StopRequest() as stop:
            resolved = config_of(*words, *second, *overrides)
            run = training.open_run(resolved, Options(), stop, print_line=lambda _: None)
            window, objective = run.setup.batches.window(1), run.setup.objective
            count = objective.begin_window(window, run.devices)
            loss = sum(objective.loss_sum(batch).item() for batch in window.micro_batches) / count
            found = loss, objective.measure(run.devices), run.plan.memory.parts["reference"], run.setup
            run.close()
        return found

    return first_window


def test_a_model_compared_with_itself_begins_at_ln_2(first_window, tiny_model_folder):
    loss, metrics, size, setup = first_window(tiny_model_folder, tiny_model_folder)
    assert loss == pytest.approx(LN2, abs=1e-7)
    assert metrics["rewards_margin"] == metrics["rewards_chosen"] == 0.0
    assert size == sum(weight.nbytes for weight in setup.model.parameters())
    assert setup.reference_digest == setup.base_digest


def test_exchanging_the_two_models_turns_every_reward_around(first_window, tiny_model_folder, teacher):
    """The log-ratio of A to B is minus that of B to A: so the reference is the named model and not the trained one."""
    one = first_window(tiny_model_folder, teacher)
    other = first_window(teacher, tiny_model_folder, "run.name=other")
    assert one[3].reference_digest == other[3].base_digest != one[3].base_digest
    for name in ("rewards_chosen", "rewards_rejected", "rewards_margin"):
        assert one[1][name] == pytest.approx(-other[1][name], rel=1e-4)
    assert abs(one[1]["rewards_margin"]) > 1e-4


def test_a_model_with_other_ids_is_refused_before_anything_is_loaded(first_window, tiny_model_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match=r"has the id \d+ in this run and the id \d+ there"):
        first_window(tiny_model_folder, other)
