"""Q2, the part that needs no training: every key can be flipped on its own, and some room reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

import llmtune
from llmtune.config.keys import LEAVES
from llmtune.config.layers import load_config

FLIPS = yaml.safe_load((Path(__file__).parent / "flips.yaml").read_text())


def test_the_table_of_flips_holds_every_key_and_no_other():
    assert set(FLIPS) == set(LEAVES)


@pytest.mark.parametrize("key", FLIPS)
def test_flipping_a_key_changes_that_key_alone(key):
    beside = FLIPS[key].get("beside", [])
    before = load_config(None, environ={}, overrides=beside).config
    after = load_config(None, environ={}, overrides=[*beside, f"{key}={FLIPS[key]['flip']}"]).config
    assert [name for name in LEAVES if value_of(before, name) != value_of(after, name)] == [key]


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def names_read_outside_config():
    package = Path(llmtune.__file__).parent
    files = [path for path in package.rglob("*.py") if "config" not in path.relative_to(package).parts]
    assert len(files) > 20
    return {
        node.attr for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }


def test_every_key_is_read_by_some_room():
    """A key whose name stands nowhere outside the config cannot change anything."""
    read = names_read_outside_config()
    assert {key for key in LEAVES if key.rpartition(".")[2] not in read} == set()
