"""Issue 6: what docs/python.md and docs/from-scratch.md show at a prompt is what happens."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(("page", "at_least"), [("python.md", 15)])
def test_the_prompts_of_a_page_give_what_it_says(page, at_least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, tried = doctest.testfile(str(DOCS / page), module_relative=False, optionflags=flags)
    assert failed == 0
    assert tried >= at_least


def test_verify_can_be_used_alone(tmp_path, tiny_model_folder):
    from llmtune import load_config
    from llmtune.preparation import Options
    from llmtune.verify.numbers import verify_packing

    small = {"model.name": str(tiny_model_folder), "data.max_samples": 6, "data.packing": "best_fit", "data.cache_dir": str(tmp_path)}
    verdict = verify_packing(load_config("test", overrides=small), Options(no_cuda=True, offline=True), say=lambda line: None)
    assert verdict.passed, verdict.lines()
