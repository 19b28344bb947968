"""Benchmarks keep up with the package: every name of ours that one imports, also inside a function, is there."""

import ast
import importlib
from pathlib import Path

import pytest

from llmtune.cli.main import run
from llmtune.config.layers import load_config

BENCHMARKS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


def imports_of(path):
    """(module, name) of every `from llmtune... import name`, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmtune":
            yield from ((node.module, alias.name) for alias in node.names)


def has(module, name):
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_name_that_a_benchmark_imports_exists(path):
    assert [f"{module}.{name}" for module, name in imports_of(path) if not has(module, name)] == []


def test_benchmarks_are_found_and_import_the_package():
    assert len(BENCHMARKS) > 15
    assert sum(len(list(imports_of(path))) for path in BENCHMARKS) > 60


def test_the_config_of_the_way_from_axolotl_to_llama_cpp_is_imported_whole(tmp_path, monkeypatch, capsys):
    """The way itself takes minutes and needs llama.cpp: `python benchmarks/axolotl_to_llama_cpp.py FOLDER`."""
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    way = importlib.import_module("axolotl_to_llama_cpp")
    (tmp_path / "axolotl.yaml").write_text(way.CONFIG.format(rows=way.ROWS / "train.jsonl", folder=tmp_path))
    assert run(["config", "import", str(tmp_path / "axolotl.yaml"), "--output", str(tmp_path / "here.yaml")]) == 0
    assert "every key has an equivalent" in capsys.readouterr().out
    config = load_config(str(tmp_path / "here.yaml"), environ={}).config
    assert (config.adapter.r, config.training.learning_rate, config.training.batch_size) == (16, 1e-3, 8)
    assert (way.ROWS / "heldout.jsonl").is_file()
