"""Q1: a file made to hurt ends in one clear answer, soon; random text ends in a config or a refusal, never in a
traceback.
"""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.cli.failure import message
from llmtune.config import alias_refusals, aliases
from llmtune.config.keys import LEAVES, SECTIONS
from llmtune.config.layers import load_config, parse_config
from llmtune.errors import ConfigError

HOSTILE = {
    "a megabyte of keys": "training:\n" + "".join(f"  k{index}: 1\n" for index in range(80_000)),
    "a megabyte of lists": "run:\n  tags: [" + "[a]," * 200_000 + "]\n",
    "a megabyte of sources": "data:\n  train: [" + "{path: x, wieght: 2}," * 40_000 + "]\n",
    "a megabyte of brackets": "{" * 900_000,
    "a megabyte of question marks": "? " * 400_000,
    "a megabyte of dashes": "- " * 400_000,
    "a megabyte of digits": "run: {seed: " + "1" * 900_000 + "}",
    "a megabyte of letters": "a" * 900_000,
    "a chain of aliases": "x-0: &a0 [1, 2]\n"
    + "".join(f"x-{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 200)),
    "a bomb of merge keys": "x-0: &a0 {k: 1}\n"
    + "".join(f"x-{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 1}}\n" for i in range(1, 35))
    + "run: {<<: *a34}\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_made_to_hurt_is_refused_in_seconds(name):
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_config(HOSTILE[name])
    assert time.process_time() - start < 3
    assert len(caught.value.problems) <= 101
    assert len(message(caught.value)) < 60_000


KEYS = [
    *LEAVES,
    *SECTIONS,
    *aliases.NAMES,
    *aliases.TRANSLATED,
    *alias_refusals.NOT_HERE,
    *alias_refusals.UNUSED,
    "extends",
    "<<",
    "x-a",
    "nonsense",
    "hf_token",
]
PIECES = st.sampled_from([*KEYS, *(key.rpartition(".")[2] for key in KEYS)])
VALUES = st.one_of(
    st.sampled_from(
        [
            "1",
            "-1",
            "0.5",
            "yes",
            "null",
            "auto",
            "lora",
            "4bit",
            "[]",
            "[a, b]",
            "{a: 1}",
            "{path: x}",
            "1e999",
            "&a x",
            "*a",
            "!!int 3",
            '"x',
            "%",
            "\t",
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
)
LINES = st.one_of(
    st.builds("{}: {}".format, PIECES, VALUES),
    st.builds("  {}: {}".format, PIECES, VALUES),
    st.builds("{}:".format, PIECES),
    st.builds("  - {}".format, VALUES),
    st.text(max_size=30),
)


def ends_in_a_config_or_a_refusal(make):
    try:
        make()
    except ConfigError as error:
        assert all(problem.problem for problem in error.problems)  # noqa: PT017 - either outcome is right
        assert "\n\n" not in message(error)  # noqa: PT017
        message(error).encode()


def fuzz_once(lines, is_json):
    text = "\n".join(lines)
    ends_in_a_config_or_a_refusal(lambda: parse_config(text, is_json=is_json))


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(LINES, max_size=12), is_json=st.sampled_from([False, False, False, True]))
def test_random_text_ends_in_a_config_or_a_refusal(lines, is_json):
    fuzz_once(lines, is_json)


@pytest.mark.campaign
@settings(max_examples=20_000, deadline=None)
@given(lines=st.lists(LINES, max_size=12), is_json=st.sampled_from([False, False, False, True]))
def test_twenty_thousand_random_texts_end_in_a_config_or_a_refusal(lines, is_json):
    fuzz_once(lines, is_json)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PIECES | st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON)
def test_random_json_ends_in_a_config_or_a_refusal(value):
    ends_in_a_config_or_a_refusal(lambda: parse_config(json.dumps(value), is_json=True))


@settings(max_examples=200, deadline=None)
@given(
    overrides=st.lists(st.builds("{}={}".format, PIECES, VALUES) | st.text(max_size=20), max_size=4),
    environ=st.dictionaries(
        st.builds("LLMTUNE_{}__{}".format, st.sampled_from(["RUN", "DATA", "X"]), st.text(max_size=8)),
        st.text(max_size=10),
        max_size=3,
    ),
    name=st.text(max_size=12).filter(lambda name: "/" not in name) | st.none(),
)
def test_random_command_lines_and_environments_end_in_a_config_or_a_refusal(overrides, environ, name):
    ends_in_a_config_or_a_refusal(lambda: load_config(name, overrides=overrides, environ=environ))
