"""What the tests of the models room share."""

import shutil

import pytest
import torch

from llmtune.config.schema import AdapterConfig, ModelConfig
from llmtune.models.catalog import resolve
from llmtune.models.load import load_model
from llmtune.models.tokenizer import load_tokenizer


@pytest.fixture
def model_folder(tiny_model_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    return folder


@pytest.fixture
def load(tiny_tokenizer):
    """Load a folder as a run does: `load(folder, trained="adapter", precision="fp32", **model_config)`."""

    def load_it(
        folder,
        trained="adapter",
        precision="fp32",
        seed=1,
        tokenizer=None,
        trust_remote_code=False,
        blocks_as_stored=False,
        **settings,
    ):
        config = ModelConfig(name=str(folder), **settings)
        source = resolve(config.name)
        tokenizer = tokenizer or load_tokenizer(source, config, trust_remote_code=trust_remote_code).tokenizer
        return load_model(
            source,
            config,
            tokenizer=tokenizer,
            device=torch.device("cpu"),
            trained=trained,
            precision=precision,
            seed=seed,
            trust_remote_code=trust_remote_code,
            blocks_as_stored=blocks_as_stored,
        )

    return load_it


@pytest.fixture
def lora():
    """LoRA settings of rank 4, with changes."""

    def config(**changes):
        return AdapterConfig(**{"method": "lora", "r": 4, "alpha": 8.0, **changes})

    return config
