"""The code in the card of a result runs as it stands, and gives the model that was trained."""

import re

import pytest
import torch

from llmtune.config.layers import load_config
from llmtune.deploy.export import export
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.models.read_config import quiet_libraries
from llmtune.training import train as training

LORA = ("adapter.method=lora", "adapter.r=4")
FAST = ("training.max_steps=1", "evaluation.every_steps=null", "data.test_size=0", "training.learning_rate=0.05")
SCRATCH = ("model.name=custom-nano", "model.architecture.d_model=32", "model.architecture.n_layers=1")
SHAPES = {
    "LoRA": LORA,
    "LoRA with new tokens": (*LORA, "adapter.train_tokens=[<tool>,</tool>]"),
    "LoRA with a token of the base": (*LORA, "adapter.train_tokens=[<|im_end|>]"),
    "DoRA": (*LORA, "adapter.dora=true"),
    "QLoRA": (*LORA, "model.quantization=4bit"),
    "modules saved": (*LORA, "adapter.modules_to_save=[lm_head]"),
    "last block": (*LORA, "adapter.layers=1", "adapter.rank_pattern={up_proj: 2}"),
    "full": (),
    "from scratch": SCRATCH,
}
IDS = torch.tensor([[1, 2, 5, 250, 260, 270, 280, 290]])


def code_of(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_code(folder):
    """Run what the card in `folder` says, and return the logits of its `model`."""
    (code,) = code_of((folder / "README.md").read_text())
    names = {}
    with quiet_libraries(), torch.no_grad():
        exec(compile(code.replace("THIS_FOLDER", str(folder)), "card", "exec"), names)
        return names["model"](IDS).logits


def logits_of(folder):
    with torch.no_grad():
        return load_inference_model(str(folder), no_cuda=True).model(IDS).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_the_code_of_the_card_gives_the_trained_model(shape, config_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = training.train(config_of(*FAST, *SHAPES[shape])).folder
    final = run / "checkpoints" / "final"
    # Outside of training, a 4-bit base is loaded as it was published.
    bound = 0.2 if shape == "QLoRA" else 1e-6
    assert float((run_code(final) - logits_of(run)).abs().max()) < bound
    if shape in ("LoRA with new tokens", "full"):
        export(str(run), tmp_path / "exported")
        assert float((run_code(tmp_path / "exported") - logits_of(run)).abs().max()) < 1e-5


def test_a_base_named_by_a_relative_path_is_written_in_full(config_of, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent)
    run = training.train(config_of(*FAST, *LORA, f"model.name={tiny_model_folder.name}")).folder
    expected = logits_of(run)
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(run_code(run / "checkpoints" / "final"), expected, atol=1e-6, rtol=0)


def test_an_adapter_on_a_model_from_scratch_says_that_its_base_is_stored_nowhere_and_meets_it_again(config_of):
    run = training.train(config_of(*FAST, *LORA, *SCRATCH, "run.seed=7", "data.test_size=4"))
    card = (run.folder / "checkpoints" / "final" / "README.md").read_text()
    assert code_of(card) == []
    assert "stored nowhere" in card
    assert "None" not in card.partition("## Config")[0]
    assert load_config(str(run.folder / "config.yaml"), environ={}).config.run.seed == 7
    logits_of(run.folder)  # the digest of the base is compared with that of training


@pytest.mark.parametrize("adapter", [LORA, ()], ids=["LoRA", "full"])
def test_the_code_of_the_card_of_a_classifier_gives_its_scores(adapter, config_of, tmp_path):
    rows = tmp_path / "labels.jsonl"
    rows.write_text("".join(f'{{"text": "{word} words", "label": "{word}"}}\n' for word in ("a", "b", "c", "a", "b")))
    words = (*FAST, f"data.train={rows}", "objective.method=classification", "training.max_steps=2", *adapter)
    run = training.train(config_of(*words)).folder
    scores = run_code(run / "checkpoints" / "final")
    with torch.no_grad():
        own = load_inference_model(str(run), no_cuda=True, may_score=True).model(IDS).logits
    assert scores.shape == (1, 3)
    assert scores.abs().max() > 0
    torch.testing.assert_close(scores, own, rtol=1e-5, atol=1e-6)
