"""Rows beyond the model's context are known before a model is loaded, wherever sequences are made."""

import json
import re
from dataclasses import replace

import pytest

from llmtune.cli.main import main
from llmtune.config.document import DEFAULT
from llmtune.config.process_options import Options
from llmtune.errors import ConfigError, DataError
from llmtune.prepare import prepare
from llmtune.training import train as training

CONTEXT = 64


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_tokenizer):
    """A folder with a GPT-2 of 64 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("learned")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=CONTEXT, bos_token_id=2, eos_token_id=2)
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    rows = [{"prompt": "the user asks", "completion": " the assistant answers" * words} for words in (1, 2, 60, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config_of(config_of):
    """The config of the shared fixture, with the length left open."""

    def resolve(*overrides):
        given = config_of(*overrides)
        if any(override.startswith("data.max_length=") for override in overrides):
            return given
        origins = {**given.origins, "data.max_length": DEFAULT}
        return replace(
            given, config=replace(given.config, data=replace(given.config.data, max_length=2048)), origins=origins
        )

    return resolve


def decisions_of(prepared):
    return {decision.key: decision for decision in prepared.decisions}


def test_a_length_that_nobody_gave_is_the_models(config_of, learned, rows_file):
    prepared = prepare(config_of(f"model.name={learned}"), Options())
    assert prepared.config.data.max_length == CONTEXT
    assert decisions_of(prepared)["data.max_length"].value == CONTEXT


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_no_pack_is_longer_than_the_context(config_of, learned, long_rows, packing):
    config = config_of(
        f"model.name={learned}", f"data.train={long_rows}", "data.overlong=split", f"data.packing={packing}",
        "data.test_size=0", "evaluation.every_steps=null",
    )  # fmt: skip
    prepared = prepare(config, Options())
    lengths = prepared.data.train.lengths
    assert len(lengths) > 4
    assert max(int(lengths[pack].sum()) for pack in prepared.packs) <= CONTEXT


def test_a_given_length_beyond_the_last_position_is_refused_before_rows_are_read(config_of, learned):
    with pytest.raises(ConfigError) as refused:
        prepare(config_of(f"model.name={learned}", "data.max_length=65", "data.train=[missing.jsonl]"), Options())
    problem = refused.value.problems[0]
    assert "`data.max_length: 65` is more than the 64 tokens this model sees" in problem.problem
    assert problem.where == "command line"
    assert "data.max_length=64" in problem.fix


@pytest.mark.parametrize(
    ("method", "ways"),
    [
        (("sft",), "drop, truncate_right, truncate_left or split"),
        (("dpo",), "drop, truncate_right or truncate_left"),
        (("grpo", "objective.rewards={length: 1.0}", "objective.max_new_tokens=8"), "drop"),
    ],
)
def test_what_serves_long_rows_is_that_of_the_method(config_of, learned, method, ways):
    given = (f"model.name={learned}", "data.max_length=100", f"objective.method={method[0]}", *method[1:])
    with pytest.raises(ConfigError) as refused:
        prepare(config_of(*given), Options())
    assert refused.value.problems[0].fix == f"set data.max_length=64, and data.overlong to {ways}"


def test_a_given_length_beyond_rotary_positions_is_named(config_of, tiny_model_folder):
    prepared = prepare(config_of("data.max_length=512"), Options())
    assert prepared.config.data.max_length == 512
    assert "more than the 256 tokens" in decisions_of(prepared)["data.max_length"].reason


def test_an_over_long_row_names_the_context_and_not_a_key_to_raise(config_of, learned, long_rows):
    with pytest.raises(DataError) as refused:
        prepare(config_of(f"model.name={learned}", f"data.train={long_rows}"), Options())
    fix = refused.value.problems[0].fix
    assert "`data.overlong`" in fix
    assert "longest sequence this model sees" in fix
    assert "raise" not in fix


@pytest.mark.parametrize("part", ["data.train", "data.eval"])
def test_a_stopped_run_is_refused_where_its_rows_reach_beyond_the_last_position(config_of, learned, long_rows, part):
    given = config_of(
        f"model.name={learned}", f"{part}={long_rows}", "data.max_length=2048", "data.test_size=0",
        "data.on_overlap=keep", "evaluation.every_steps=null",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"a row of .* is longer than the 64 tokens this model sees"):
        prepare(given, Options(), is_stopped=True)


DRAWS = ("objective.method=grpo", "objective.rewards={length: 1.0}", "data.overlong=drop")


@pytest.mark.parametrize("part", ["data.train", "data.eval"])
def test_answers_beyond_the_last_position_are_refused_with_what_fits(config_of, learned, rows_file, part, tmp_path):
    """Also those that held-out prompts may get. The shortest prompt has room for its answer, and no token more."""
    short, mixed = tmp_path / "short.jsonl", tmp_path / "mixed.jsonl"
    short.write_text('{"prompt": "the user", "answer": "asks"}\n')
    mixed.write_text(short.read_text() + rows_file.read_text())
    files = [f"data.train={short}", f"data.eval={short}", "data.test_size=0", "data.on_overlap=keep"]
    basis = [f"model.name={learned}", *files, *DRAWS]
    prompt = int(prepare(config_of(*basis, "objective.max_new_tokens=1"), Options()).data.train.lengths.max())
    given = [*basis, f"{part}={mixed}", f"objective.max_new_tokens={CONTEXT - prompt}"]
    with pytest.raises(ConfigError) as refused:
        prepare(config_of(*given), Options())
    (problem,) = refused.value.problems
    assert f"`objective.max_new_tokens: {CONTEXT - prompt}` is with a prompt of" in problem.problem
    assert "than the 64 tokens this model sees" in problem.problem
    fixes = re.findall(r"[a-z.]+[a-z_]+=\w+(?: and [a-z.]+[a-z_]+=\w+)?", problem.fix)
    assert len(fixes) == 2
    for fix in fixes:
        prepare(config_of(*given, *fix.split(" and ")), Options())


def test_answers_beyond_rotary_positions_are_named(config_of, rows_file):
    given = ("data.max_length=128", "objective.max_new_tokens=250", *DRAWS)
    decision = decisions_of(prepare(config_of(*given), Options()))["objective.max_new_tokens"]
    assert decision.value == 250
    assert "more than the 256 tokens this model was made for" in decision.reason
    assert "objective.max_new_tokens" not in decisions_of(prepare(config_of("data.max_length=128"), Options()))


def test_the_run_keeps_the_length_it_was_given_by_the_model(config_of, learned):
    result = training.train(config_of(f"model.name={learned}", "training.max_steps=3"))
    assert "max_length: 64" in (result.folder / "config.yaml").read_text()
    again = training.resume(str(result.folder), overrides=["training.max_steps=4"], allow_changes=True)
    assert again.state == "finished"


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "{model}", "--data", "{rows}"),
        ("data", "report", "model.name={model}", "data.train=[{rows}]"),
        ("data", "preview", "model.name={model}", "data.train=[{rows}]"),
        ("plan", "model.name={model}", "data.train=[{rows}]"),
        ("train", "--dry-run", "model.name={model}", "data.train=[{rows}]"),
    ],
)
def test_every_command_names_the_row_and_none_fails_by_a_bug(words, learned, long_rows, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([word.format(model=learned, rows=long_rows) for word in words])
    told = capsys.readouterr().err
    assert stopped.value.code == 3
    assert "long.jsonl:3" in told
    assert "longest sequence this model sees" in told


def test_a_prompt_beyond_the_context_is_named(learned, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(learned), "the user asks " * 40])
    assert stopped.value.code == 3
    assert "the model sees 64" in capsys.readouterr().err
