"""Issue 6: what docs/python.md shows at a prompt is what happens, and docs/from-scratch.md tells true shapes."""

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


def test_the_table_of_shapes_is_the_catalogs():
    from llmtune.models.catalog import CATALOG

    page = (DOCS / "from-scratch.md").read_text(encoding="utf-8")
    rows = [(one.name, one.shape) for one in CATALOG if one.shape]
    assert len(rows) == 5
    for name, shape in rows:
        assert f"| {name} | {shape.n_layers} x {shape.d_model} | {shape.n_heads} | {shape.vocab_size:,} |" in page


def test_the_configs_on_the_page_resolve():
    from llmtune.config.layers import parse_config

    blocks = (DOCS / "from-scratch.md").read_text(encoding="utf-8").split("```yaml\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        assert parse_config(block.partition("```")[0]).config.model.name == "custom-nano"


def test_verify_can_be_used_alone(tmp_path, tiny_model_folder):
    from llmtune import load_config
    from llmtune.config.process_options import Options
    from llmtune.verify.numbers import verify_packing

    small = {
        "model.name": str(tiny_model_folder),
        "data.max_samples": 6,
        "data.packing": "best_fit",
        "data.overlong": "truncate_right",
        "data.cache_dir": str(tmp_path),
    }
    verdict = verify_packing(
        load_config("test", overrides=small), Options(no_cuda=True, offline=True), print_line=lambda line: None
    )
    assert verdict.passed, verdict.lines()
