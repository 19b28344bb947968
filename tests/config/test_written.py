"""What is made from the schema: YAML that reads back, the JSON Schema, the reference page, the shipped presets."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import types
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.config.checks import RANGES, SOURCE_RANGES, range_problem
from llmtune.config.contradictions import CONTRADICTIONS
from llmtune.config.document import DEFAULT, Origin
from llmtune.config.dump import config_to_dict, config_to_yaml
from llmtune.config.json_schema import json_schema
from llmtune.config.keys import LEAVES, SECTIONS, default_of, descriptions
from llmtune.config.layers import load_config, parse_config
from llmtune.config.paths import shipped_path, shipped_presets
from llmtune.config.reference import reference_page
from llmtune.config.schema import Config, SourceConfig
from llmtune.config.sources import COLUMN_FIELDS
from llmtune.errors import ConfigError

TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "null",
        "no",
        "010",
        "1e-5",
        "~",
        "",
        " a ",
        "a: b",
        "# c",
        "{x}",
        "-",
        "a\nb",
        "\x85\u2028\ufeff\x00",
        "😀",
        "12:30",
    ]
)


def values_of(declared, bounds=None):
    """A strategy for values of a declared type within bounds."""
    kind, arguments = typing.get_origin(declared), typing.get_args(declared)
    if declared is str:
        return TEXTS
    if declared is bool:
        return st.booleans()
    if declared is types.NoneType:
        return st.none()
    if declared is int:
        low = int(bounds.minimum) if bounds and bounds.minimum is not None else 1 if bounds else -(2**40)
        return st.integers(low, int(bounds.maximum) if bounds and bounds.maximum is not None else 2**40)
    if declared is float:
        return st.floats(allow_nan=False, allow_infinity=False).map(
            lambda value: value if bounds is None or bounds.holds(value) else 0.3
        )
    if kind is collections.abc.Mapping:
        return st.dictionaries(TEXTS, values_of(arguments[1]), max_size=3)
    if declared is SourceConfig:
        return st.builds(
            SourceConfig,
            path=TEXTS.map(lambda text: text or "x"),
            config=st.none() | TEXTS,
            split=st.none() | TEXTS,
            weight=values_of(float, SOURCE_RANGES["weight"]),
            max_samples=st.none() | values_of(int, SOURCE_RANGES["max_samples"]),
            name=st.none() | TEXTS,
            format=st.sampled_from([None, "auto", "text"]),
            text_column=st.none() | TEXTS,
            train_on=st.sampled_from([None, "all_tokens"]),
            columns=st.dictionaries(st.sampled_from(COLUMN_FIELDS), TEXTS, max_size=2),
            roles=st.dictionaries(TEXTS, st.sampled_from(["user", "assistant"]), max_size=2),
            repeat=values_of(float, SOURCE_RANGES["repeat"]),
        )
    if kind is typing.Literal:
        return st.sampled_from(arguments)
    if kind in (typing.Union, types.UnionType):
        return st.one_of(*(values_of(each, bounds) for each in arguments))
    if kind is collections.abc.Mapping:
        return st.dictionaries(TEXTS, values_of(arguments[1], bounds), max_size=2)
    if arguments[1] is Ellipsis:
        return st.lists(values_of(arguments[0], bounds), max_size=3).map(tuple)
    return st.tuples(*(values_of(each, bounds) for each in arguments))


def is_allowed(key, value):
    return range_problem(key, value) is None


def pairs_of(key):
    """A strategy for a key with one of its values; always the same one, so it is checked once."""
    return values_of(LEAVES[key], RANGES.get(key)).map(
        lambda value: (key, value if is_allowed(key, value) else default_of(key))
    )


KEYS_WITH_VALUES = st.sampled_from(sorted(LEAVES)).flatmap(functools.cache(pairs_of))
GIVEN_EVERYWHERE = dict.fromkeys(LEAVES, Origin("file", "x"))


def made_consistent(config):
    """The nearest config without contradictions: the parts that contradict go back to their defaults."""
    while wrong := [row for row in CONTRADICTIONS if row.when(config, GIVEN_EVERYWHERE)]:
        for key in (key for row in wrong for key in row.keys):
            config = replaced(config, key.split("."), default_of(key))
    return config


def with_values(pairs):
    config = Config()
    for key, value in pairs:
        config = replaced(config, key.split("."), value)
    return made_consistent(config)


CONFIGS = st.lists(KEYS_WITH_VALUES, max_size=12).map(with_values)


def replaced(section, names, value):
    head, *rest = names
    return dataclasses.replace(section, **{head: replaced(getattr(section, head), rest, value) if rest else value})


@settings(max_examples=300, deadline=None)
@given(config=CONFIGS)
def test_a_config_written_as_yaml_reads_back_equal_here_and_in_other_readers(config):
    """Q3: config.yaml of a run loads to the config of the run, every float to its last bit.

    A YAML 1.1 reader must not see text where a number stands, or the other way round.
    """
    text, plain = config_to_yaml(config), config_to_dict(config)
    assert parse_config(text).config == config
    assert parse_config(json.dumps(plain), is_json=True).config == config
    read = yaml.safe_load(text)
    for section in ("run", "adapter", "training", "tracking"):
        for name, value in plain[section].items():
            assert read[section][name] == value
            assert type(read[section][name]) is type(value)


def test_comments_change_nothing_and_explain_every_key():
    commented = config_to_yaml(Config(), commented=True)
    assert parse_config(commented).config == Config()
    assert commented.count("\n  # ") >= len(LEAVES) - 15
    assert "# Peak learning rate" in commented


def test_a_dict_with_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match=r"run\.sed"):
        parse_config('{"run": {"sed": 1}}', is_json=True)


def test_the_class_of_a_section_is_found_by_its_key():
    """`training` is described by `TrainingConfig`, and every section of the schema likewise."""
    names = {key: cls.__name__ for key, cls in SECTIONS.items()}
    assert names == {key: f"{key.rpartition('.')[2].capitalize()}Config" for key in SECTIONS}
    assert {"run", "model", "model.architecture", "data", "training"} <= set(names)


def test_every_key_is_described_once_under_itself():
    assert set(descriptions()) == {*LEAVES, *SECTIONS}
    assert all(text.endswith(".") and len(text) >= 4 for text in descriptions().values())


def test_every_number_has_bounds():
    """A key that takes a number says which numbers make sense."""
    numbers = {
        key
        for key, declared in LEAVES.items()
        if {int, float} & {declared, *typing.get_args(declared)}
        and typing.get_origin(declared) is not collections.abc.Mapping  # checked where their names are known
    }
    assert numbers == set(RANGES)


def test_every_default_is_within_its_bounds_and_of_its_type():
    assert all(range_problem(key, default_of(key)) is None for key in LEAVES)
    assert parse_config(config_to_yaml(Config())).config == Config()
    assert all(type(default_of(key)) is float for key, declared in LEAVES.items() if declared is float)


def test_no_contradiction_speaks_of_a_key_that_does_not_exist():
    assert {key for row in CONTRADICTIONS for key in row.keys} <= set(LEAVES)
    assert not any(row.when(Config(), dict.fromkeys(LEAVES, DEFAULT)) for row in CONTRADICTIONS)


def test_every_shipped_yaml_resolves():
    presets = shipped_presets()
    assert sorted(presets) == ["base", "development", "production", "quickstart", "test"]
    for path in presets.values():
        resolved = load_config(str(path), environ={})
        assert resolved.notes == ()
        assert resolved.config.data.train
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize(
    ("name", "epochs", "batch_size", "max_samples"),
    [("test", 1.0, 2, 100), ("development", 2.0, 4, 1000), ("production", 3.0, 8, None)],
)
def test_the_presets_say_what_the_design_says(name, epochs, batch_size, max_samples):
    config = load_config(name, environ={}).config
    assert (config.training.epochs, config.training.batch_size, config.data.max_samples) == (
        epochs,
        batch_size,
        max_samples,
    )
    assert config.data.train == (SourceConfig("example:conversations"),)
    assert config.data.test_size > 0


def test_the_json_schema_beside_the_presets_is_current():
    """Made by `llmtune config schema > configs/schema.json`."""
    assert json.loads(shipped_path("configs/schema.json").read_text()) == json_schema()


def test_the_json_schema_describes_every_key_and_no_other():
    schema = json_schema()
    found = {}

    def walk(section, prefix):
        assert section["additionalProperties"] is False
        for name, value in section["properties"].items():
            if "properties" in value:
                walk(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    walk(schema, "")
    assert set(found) - {"extends"} == set(LEAVES)
    assert all(value["description"] for value in found.values())
    assert found["training.batch_size"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"enum": ["auto"]}]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_reference_page_is_current():
    """Made by `python -m llmtune.config.reference > docs/config.md`."""
    assert shipped_path("docs/config.md").read_text() == reference_page()


def test_the_reference_page_names_every_key():
    page = reference_page()
    assert all(f"| `{key}` |" in page for key in LEAVES)
