"""`objective.reference: model`: answers are compared with a second model, frozen, whose tokens have the same ids."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.errors import TokenizerError
from training_helpers import first_window

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
def compared(config_of, tmp_path):
    """The first window of a run of one model whose reference is another."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            f'{{"prompt": "words {at}", "chosen": "a word {at * 7}", "rejected": "numbers and {at}"}}\n'
            for at in range(6)
        )
    )

    def compared(model, reference, *overrides):
        words = (f"data.train={pairs}", "data.test_size=0", "evaluation.every_steps=null", f"model.name={model}")
        words += ("objective.method=dpo", "objective.reference=model", f"objective.reference_model={reference}")
        return first_window(config_of(*words, *overrides))

    return compared


def test_a_model_compared_with_itself_begins_at_ln_2(compared, tiny_model_folder):
    loss, metrics, run = compared(tiny_model_folder, tiny_model_folder)
    assert loss == pytest.approx(LN2, abs=1e-7)
    assert metrics["rewards_margin"] == metrics["rewards_chosen"] == 0.0
    assert run.plan.memory.parts["reference"] == sum(weight.nbytes for weight in run.setup.model.parameters())
    assert run.setup.reference_digest == run.setup.base_digest


def test_exchanging_the_two_models_turns_every_reward_around(compared, tiny_model_folder, teacher):
    """The log-ratio of A to B is minus that of B to A: so the reference is the named model and not the trained one."""
    small, large = compared(tiny_model_folder, teacher), compared(teacher, tiny_model_folder, "run.name=other")
    assert small.run.setup.reference_digest == large.run.setup.base_digest != small.run.setup.base_digest
    for name in ("rewards_chosen", "rewards_rejected", "rewards_margin"):
        assert small.metrics[name] == pytest.approx(-large.metrics[name], rel=1e-4)
    assert abs(small.metrics["rewards_margin"]) > 1e-4


def test_a_model_with_other_ids_is_refused_before_anything_is_loaded(compared, tiny_model_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match=r"has the id \d+ in this run and the id \d+ there"):
        compared(tiny_model_folder, other)
