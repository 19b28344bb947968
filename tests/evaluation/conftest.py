import json
import shutil

import numpy as np
import pytest
import torch

from example_list import ExampleList
from llmtune.data.example import Example
from llmtune.data.rendering.renderer import Renderer
from training_fixtures import _planned_bytes  # noqa: F401


@pytest.fixture
def tiny_model(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="session")
def short_model_folder(tmp_path_factory, tiny_model_folder):
    """The tiny model with a context of 96 tokens: an answer that no token stops ends there."""
    folder = shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("short") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}))
    return folder


@pytest.fixture(scope="session")
def renderer(tiny_tokenizer):
    return Renderer(tiny_tokenizer)


@pytest.fixture(scope="session")
def held_out():
    """Six examples of ragged lengths with weights 0, 1 and 0.5."""
    draw = np.random.default_rng(0)
    examples = []
    for number in range(6):
        length = 5 + 3 * number
        weights = draw.choice([0.0, 0.5, 1.0], size=length).astype(np.float32)
        weights[0] = 0
        weights[-1] = 1
        examples.append(Example(f"held-out:{number}", draw.integers(3, 400, length).astype(np.int32), weights))
    return ExampleList(examples)


def states_of(model):
    """Return everything an observer could change: modes, gradients, weights, torch's random state."""
    modes = [module.training for module in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    return modes, weights, gradients, torch.get_rng_state(), model.generation_config.to_dict()


@pytest.fixture
def states():
    return states_of
