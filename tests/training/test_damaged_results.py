"""P5 for what a run leaves: damaged weights of its result are refused by each command that would use them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.cli.main import main
from llmtune.config.layers import load_config
from llmtune.training import train as training

FINAL = "checkpoints/final/adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tiny_model_folder, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = [f"model.name={tiny_model_folder}", f"data.train={rows_file}", "data.test_size=4", "training.max_steps=2"]
    words += ["adapter.method=lora", f"run.output_dir={folder}", "run.name=run", "tracking.trackers=[jsonl]"]
    words += ["training.batch_size=4", "training.learning_rate=0.01", "data.max_length=256"]
    return training.train(load_config(None, overrides=words, environ={})).folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def change(path, new):
    tensors = load_file(path)
    size = path.stat().st_size
    names = sorted(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    save_file(new(tensors, *names[:2]), path, metadata={"format": "pt"})
    assert path.stat().st_size == size or len(load_file(path)) < len(tensors), "its size would give it away"


DAMAGES = {
    "a flipped bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "two tensors swapped": lambda path: change(path, lambda old, a, b: {**old, a: old[b], b: old[a]}),
    "NaN": lambda path: change(path, lambda old, a, b: {**old, a: torch.full_like(old[a], torch.nan)}),
    "zeros": lambda path: change(path, lambda old, a, b: {name: torch.zeros_like(old[name]) for name in old}),
    "a tensor left out": lambda path: change(path, lambda old, a, b: {name: old[name] for name in old if name != a}),
}
COMMANDS = {
    "merge-lora": ("--output", "merged"),
    "export": ("--output", "model.gguf"),
    "evaluate": (),
    "generate": ("the user asks",),
    "compare": ("the user asks",),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_adapter_is_refused_by_name_and_nothing_is_written(
    run, tmp_path, monkeypatch, capsys, damage, command
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    DAMAGES[damage](copy / FINAL)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(SystemExit) as ended:
        main([command, str(copy), *COMMANDS[command]])
    out, err = capsys.readouterr()
    assert ended.value.code == 4, err
    assert "adapter_model.safetensors" in err
    assert not out
    assert not list((tmp_path / "work").iterdir())
