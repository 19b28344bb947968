"""Q3: layers lie over each other in one order, key by key, and every value knows where it came from."""

from __future__ import annotations

import json
import re

import pytest

from llmtune.config.arguments import PROCESS_VARIABLES
from llmtune.config.keys import LEAVES
from llmtune.config.layers import load_config, parse_config
from llmtune.config.schema import Config, SourceConfig
from llmtune.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Work in an empty folder; `write(name, text)` makes a file in it."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def problems_of(*arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments, **{"environ": {}} | keywords)
    return caught.value.problems


def test_no_layers_give_the_defaults_and_say_so():
    resolved = load_config(None, environ={})
    assert resolved.config == Config()
    assert set(resolved.origins) == set(LEAVES)
    assert {str(origin) for origin in resolved.origins.values()} == {"default"}


def test_each_layer_wins_over_the_one_before(write):
    write("base.yaml", "run: {seed: 1}\ntraining: {epochs: 1, batch_size: 1, max_steps: 1}\ndata: {max_samples: 1}\n")
    write(
        "my.yaml", "extends: base\ntraining:\n  epochs: 2\n  batch_size: 2\n  max_steps: 2\ndata:\n  max_samples: 2\n"
    )
    resolved = load_config(
        "my.yaml",
        environ={
            "LLMTUNE_TRAINING__BATCH_SIZE": "3",
            "LLMTUNE_TRAINING__MAX_STEPS": "3",
            "LLMTUNE_DATA__MAX_SAMPLES": "3",
        },
        flags={"data.max_samples": 4, "training.max_steps": 4, "model.name": None},
        overrides=["training.max_steps=5"],
    )
    found = {
        key: (getattr(getattr(resolved.config, key.split(".")[0]), key.split(".")[1]), str(resolved.origins[key]))
        for key in (
            "run.seed",
            "training.epochs",
            "training.batch_size",
            "data.max_samples",
            "training.max_steps",
            "model.name",
        )
    }
    assert found == {
        "run.seed": (1, "base.yaml:1"),
        "training.epochs": (2.0, "my.yaml:3"),
        "training.batch_size": (3, "env LLMTUNE_TRAINING__BATCH_SIZE"),
        "data.max_samples": (4, "--samples"),
        "training.max_steps": (5, "command line"),
        "model.name": ("custom-tiny", "default"),
    }


def test_lists_are_replaced_and_not_joined(write):
    write("base.yaml", "run: {tags: [a, b]}\n")
    write("my.yaml", "extends: base\nrun: {tags: [c]}\n")
    assert load_config("my.yaml", environ={}).config.run.tags == ("c",)


def test_null_in_a_later_layer_takes_a_value_back(write):
    write("base.yaml", "training: {warmup_ratio: 0.1}\n")
    write("my.yaml", "extends: base\ntraining: {warmup_ratio: null, warmup_steps: 5}\n")
    assert load_config("my.yaml", environ={}).config.training.warmup_ratio is None


def test_the_last_of_several_bases_wins(write):
    write("a.yaml", "run: {seed: 1, notes: a}\n")
    write("b.yaml", "run: {seed: 2}\n")
    write("my.yaml", "extends: [a, b]\n")
    config = load_config("my.yaml", environ={}).config
    assert (config.run.seed, config.run.notes) == (2, "a")


def test_a_base_is_looked_for_beside_the_file_that_extends_it(write):
    write("sub/base.yaml", "run: {seed: 7}\n")
    write("sub/my.yaml", "extends: base\n")
    assert load_config("sub/my.yaml", environ={}).config.run.seed == 7


def test_a_config_is_found_as_given_then_in_configs_then_among_the_presets(write):
    assert load_config("test", environ={}).config.data.max_samples == 100
    write("configs/test.yaml", "data: {max_samples: 5}\n")
    assert load_config("test", environ={}).config.data.max_samples == 5
    write("test.yaml", "data: {max_samples: 6}\n")
    assert load_config("test", environ={}).config.data.max_samples == 6
    assert load_config("configs/test.yaml", environ={}).config.data.max_samples == 5


def test_a_folder_of_the_same_name_does_not_hide_a_preset(write):
    write("test/data.jsonl", "{}")
    assert load_config("test", environ={}).config.data.max_samples == 100


def test_a_config_of_a_presets_name_may_extend_that_preset(write):
    write("configs/test.yaml", "extends: test\nrun: {seed: 5}\n")
    resolved = load_config("test", environ={})
    assert (resolved.config.run.seed, resolved.config.data.max_samples) == (5, 100)


def test_a_cycle_of_extends_is_refused_where_it_closes(write):
    write("a.yaml", "extends: b\n")
    write("b.yaml", "run:\n  seed: 1\nextends: c\n")
    write("c.yaml", "extends: a\n")
    (problem,) = problems_of("a.yaml")
    assert problem.where == "c.yaml:1"


def test_bases_that_multiply_are_refused(write):
    write("a0.yaml", "run: {seed: 1}\n")
    for index in range(1, 20):
        write(f"a{index}.yaml", f"extends: [a{index - 1}, a{index - 1}, a{index - 1}]\n")
    assert any("more than 50 files" in problem.problem for problem in problems_of("a19.yaml"))


def test_problems_of_every_layer_come_in_one_answer(write):
    write("base.yaml", "training:\n  epohcs: 1\n")
    write("my.yaml", "extends: base\ntraining:\n  batch_size: x\n")
    found = problems_of(
        "my.yaml",
        environ={"LLMTUNE_DATA__TRIAN": "a"},
        flags={"data.max_samples": 0},
        overrides=["training.lr=abc", "nonsense", "run.seed=-1"],
    )
    assert [problem.where for problem in found] == [
        "base.yaml:2", "my.yaml:3", "env LLMTUNE_DATA__TRIAN", "--samples", "command line", "command line", "command line",  # noqa: E501
    ]  # fmt: skip


def test_a_value_that_a_later_layer_replaces_must_still_be_right(write):
    write("my.yaml", "training:\n  batch_size: x\n")
    (problem,) = problems_of("my.yaml", overrides=["training.batch_size=4"])
    assert problem.where == "my.yaml:2"


def test_a_contradiction_between_layers_names_both_places(write):
    write("my.yaml", "training:\n  warmup_ratio: 0.1\n")
    (problem,) = problems_of("my.yaml", overrides=["training.warmup_steps=5"])
    assert problem.where == "command line and my.yaml:2"


def test_a_broken_value_does_not_also_count_as_a_contradiction(write):
    write("my.yaml", "model: {quantization: 4bit}\nadapter: {method: loar}\n")
    (problem,) = problems_of("my.yaml")
    assert "`adapter.method`" in problem.problem


@pytest.mark.parametrize(
    ("written", "declared", "value"),
    [
        ("1e-5", "training.learning_rate", 1e-5),
        ("1E-5", "training.learning_rate", 1e-5),
        ('"1e-5"', "training.learning_rate", 1e-5),
        (".5", "training.learning_rate", 0.5),
        ("2", "training.learning_rate", 2.0),
        ("010", "training.max_steps", 10),
        ("1_000", "training.max_steps", 1000),
        ("1e3", "training.max_steps", 1000),
        ("no", "run.notes", "no"),
        ("on", "run.notes", "on"),
        ("12:30:45", "run.notes", "12:30:45"),
        ("1e-5", "run.notes", "1e-5"),
        ("2001-01-01", "run.notes", "2001-01-01"),
        ("~", "run.notes", None),
        ('"null"', "run.notes", "null"),
        ("null", "run.notes", None),
        ("no", "training.compile", False),
        ("yes", "training.compile", True),
        ("Off", "tracking.watch", False),
        ("auto", "training.batch_size", "auto"),
        ("4", "training.batch_size", 4),
        ("a.jsonl", "data.train", (SourceConfig("a.jsonl"),)),
        ("[a.jsonl, {path: b, weight: 2}]", "data.train", (SourceConfig("a.jsonl"), SourceConfig("b", weight=2.0))),
        ("{path: wikitext, config: raw, split: train}", "data.train", (SourceConfig("wikitext", "raw", "train"),)),
        ("[no, 010, null-island]", "run.tags", ("no", "010", "null-island")),
        ("null", "data.eval", ()),
        ("[0.9, 0.95]", "training.betas", (0.9, 0.95)),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_key_declares_it_wherever_it_stands(written, declared, value):
    """Q1: YAML's own guesses (1e-5 is text, 010 is 8, no is False, 12:30:45 is 45045) never happen."""
    section, key = declared.split(".")
    in_file = parse_config(f"{section}:\n  {key}: {written}\n").config
    on_line = load_config(None, environ={}, overrides=[f"{declared}={written}"]).config
    in_environment = load_config(None, environ={f"LLMTUNE_{section}__{key}".upper(): written}).config
    for config in (in_file, on_line, in_environment):
        found = getattr(getattr(config, section), key)
        assert found == value
        assert type(found) is type(value)


def test_a_value_on_the_command_line_is_taken_as_it_stands(write):
    config = load_config(
        None, environ={}, overrides=["run.notes=loss: 3 # not a comment, a = b", "model.name=C:\\models\\a b"]
    ).config
    assert config.run.notes == "loss: 3 # not a comment, a = b"
    assert config.model.name == "C:\\models\\a b"


def test_the_last_of_two_overrides_of_a_key_wins():
    assert load_config(None, environ={}, overrides=["run.seed=1", "run.seed=2"]).config.run.seed == 2


def test_anchors_and_merge_keys_keep_the_line_they_were_written_on():
    resolved = parse_config(
        "x-fast: &fast\n  epochs: 1\n  batch_size: 4\ntraining:\n  <<: *fast\n  batch_size: 2\n", "m.yaml"
    )
    assert (resolved.config.training.epochs, resolved.config.training.batch_size) == (1.0, 2)
    assert (str(resolved.origins["training.epochs"]), str(resolved.origins["training.batch_size"])) == (
        "m.yaml:2",
        "m.yaml:6",
    )


def test_a_value_below_its_key_has_the_line_it_stands_on():
    resolved = parse_config("training:\n  epochs:\n    2\n  batch_size: 4\n", "m.yaml")
    assert (str(resolved.origins["training.epochs"]), str(resolved.origins["training.batch_size"])) == (
        "m.yaml:3",
        "m.yaml:4",
    )


def test_dotted_keys_stand_for_sections():
    resolved = parse_config("training.batch_size: 2\nmodel.architecture.d_model: 64\n", "m.yaml")
    assert (resolved.config.training.batch_size, resolved.config.model.architecture.d_model) == (2, 64)


def test_a_json_file_reads_as_yaml_does_with_lines(write):
    write(
        "my.json",
        json.dumps({"training": {"epochs": 1, "learning_rate": 1e-5}, "data": {"train": ["a\u00e9\n"]}}, indent=1),
    )
    resolved = load_config("my.json", environ={})
    assert resolved.config.data.train == (SourceConfig("aé\n"),)
    assert str(resolved.origins["training.learning_rate"]) == "my.json:4"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"run": {"seed": 1,\n "seed": 2}}', 2, "stands twice"),
        ('{"run": {"seed": 1}\n "model": {}}', 2, "`,` or a closing bracket"),
        ('{"run": {"seed": 1},\n}', 2, "a key in double quotes"),
        ('{"run": {"seed": }}', 1, "a value is missing"),
        ('{"run": {"notes": "a\nb"}}', 1, "invalid control character"),
        ('{"run": {"seed": NaN}}', 1, "a value is missing"),
        ('{"run": {}}\n{}', 2, "nothing may follow"),
        ('{"run":\n {"tags": ' + "[" * 3000, 2, "levels deep"),
        ("[1]", 1, "a config is a mapping"),
    ],
)
def test_broken_json_is_refused_with_its_line(write, text, line, words):
    write("my.json", text)
    (problem,) = problems_of("my.json")
    assert problem.where == f"my.json:{line}"
    assert words in problem.problem


def test_a_comma_before_a_closing_bracket_and_another_language_are_named(write):
    write("my.json", '{"run": {"seed": 1,}}')
    assert problems_of("my.json")[0].fix == "take out the comma before the bracket that closes"
    write("my.toml", "[run]\nseed = 1\n")
    assert problems_of("my.toml")[0].problem == "a config is YAML or JSON, and this is TOML"


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "True", "None"])
def test_a_word_that_json_does_not_know_is_answered_with_those_it_knows(write, value):
    write("my.json", f'{{"run": {{"seed": {value}}}}}')
    (problem,) = problems_of("my.json")
    assert problem.fix == "JSON has numbers, texts in double quotes, true, false and null"


def test_a_folder_is_answered_with_the_configs_in_it(write):
    write("mine/a.yaml", "run: {seed: 1}\n")
    (problem,) = problems_of("mine")
    assert problem.problem == "`mine` is a folder, not a config"
    assert problem.fix == "name a file in it: mine/a.yaml"


def test_an_empty_file_is_an_empty_config(write):
    write("my.yaml", "# nothing yet\n")
    write("my.json", "")
    assert load_config("my.yaml", environ={}).config == load_config("my.json", environ={}).config == Config()


def test_a_huge_file_is_refused_without_being_read(write, tmp_path):
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(200 * 2**20)
    (problem,) = problems_of("huge.yaml")
    assert "209,715,200 bytes" in problem.problem


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "./missing.yaml", "nope", "a\0b", "x" * 5000, ""])
def test_what_is_no_config_file_is_refused(write, name):
    (problem,) = problems_of(name)
    assert "\0" not in str(problem)


def test_a_file_that_is_not_utf8_names_the_line(write, tmp_path):
    (tmp_path / "my.yaml").write_bytes(b"run:\n  notes: caf\xe9\n")
    (problem,) = problems_of("my.yaml")
    assert (problem.where, "0xe9" in problem.problem) == ("my.yaml:2", True)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(write, tmp_path):
    (tmp_path / "my.yaml").write_bytes(b"\xef\xbb\xbfrun:\r\n  seed: 3\r\n  tags: [a]\r\n")
    resolved = load_config("my.yaml", environ={})
    assert (resolved.config.run.seed, resolved.config.run.tags, str(resolved.origins["run.seed"])) == (
        3,
        ("a",),
        "my.yaml:2",
    )


def test_variables_that_are_not_config_are_left_alone():
    assert (
        load_config(None, environ={"LLMTUNE_CACHE_DIR": "x", "PATH": "y", "llmtune_run__seed": "9"}).config == Config()
    )


def test_the_name_of_a_config_is_its_stem(write):
    write("sub/my.own.yaml", "")
    assert [load_config(name, environ={}).name for name in ("sub/my.own.yaml", "test")] == ["my.own", "test"]
    assert load_config(None, environ={}).name == "default"


def test_a_run_folder_stands_for_its_config(write):
    write("runs/one/config.yaml", "run: {seed: 9}\n")
    resolved = load_config("runs/one", environ={})
    assert (resolved.config.run.seed, resolved.name) == (9, "one")


def test_several_configs_are_layers_and_a_line_names_what_the_last_sets_again(write):
    write("a.yaml", "run: {seed: 1}\ntraining: {epochs: 2}\n")
    write("b.yaml", "extends: test\nrun: {seed: 2}\n")
    resolved = load_config(["a.yaml", "b.yaml"], environ={})
    assert (resolved.config.run.seed, resolved.config.training.epochs, resolved.name) == (2, 1.0, "b")
    assert resolved.notes == ("--config: `b.yaml` comes last, so it sets `training.epochs`, `run.seed` again",)
    other = load_config(["b.yaml", "a.yaml"], environ={})
    assert (other.config.run.seed, other.config.training.epochs, other.config.training.batch_size) == (1, 2.0, 2)
    assert load_config(["a.yaml"], environ={}) == load_config("a.yaml", environ={})


def test_every_missing_config_of_several_is_named(write):
    write("a.yaml", "run: {seed: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["no1.yaml", "a.yaml", "no2.yaml"], environ={})
    assert [problem.where for problem in caught.value.problems] == ["--config", "a.yaml:1", "--config"]


def test_an_override_that_is_given_twice_is_noted():
    resolved = load_config(None, environ={}, overrides=["run.seed=1", "run.seed=2"])
    assert resolved.notes == ("command line: `run.seed` is given twice; the last one wins: `2`",)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TRAINING_LEARNING_RATE", ["TRAINING__LEARNING_RATE"]),
        ("LEARNING_RATE", ["TRAINING__LEARNING_RATE"]),
        ("LR", ["TRAINING__LEARNING_RATE"]),
        ("MODEL_ARCHITECTURE_D_MODEL", ["MODEL__ARCHITECTURE__D_MODEL"]),
        ("EVERY_STEPS", ["EVALUATION__EVERY_STEPS", "CHECKPOINT__EVERY_STEPS", "TRACKING__EVERY_STEPS"]),
        ("TRAINING_BATCHSIZE", ["TRAINING__BATCH_SIZE"]),
        ("OFLINE", ["OFFLINE"]),
        ("MODEL", ["MODEL__NAME"]),
    ],
)
def test_a_variable_that_is_nearly_a_key_is_refused_with_the_one_that_works(name, meant):
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ={f"LLMTUNE_{name}": "1"})
    (problem,) = caught.value.problems
    assert problem.where == f"env LLMTUNE_{name}"
    assert re.findall(r"`LLMTUNE_(\w+)`", problem.fix) == meant


def test_any_other_variable_of_that_prefix_is_noted():
    (note,) = load_config(None, environ={"LLMTUNE_IMAGE": "x"}).notes
    assert note.startswith("env LLMTUNE_IMAGE: it sets no config key")
    assert load_config(None, environ=dict.fromkeys(PROCESS_VARIABLES, "1")).notes == ()


def test_values_of_a_mapping_keep_their_types_and_quotes_make_text(write):
    path = write("a.yaml", "data: {template_args: {effort: high, budget: 3, share: 0.5, switch: 'no', other: no}}")
    given = load_config(str(path), environ={}, overrides=["data.system=Be brief."]).config.data
    assert given.template_args == {"effort": "high", "budget": 3, "share": 0.5, "switch": "no", "other": False}
    assert given.system == "Be brief."
    again = load_config(str(path), environ={}, overrides=["data.template_args={enable_thinking: false}"]).config.data
    assert again.template_args == {"enable_thinking": False}
