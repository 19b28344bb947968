"""`llmtune config import`: other toolkits' configs become ours, and every one of their keys is accounted for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from import_samples import SAMPLES, imported, row_of, values
from llmtune.cli.main import run
from llmtune.config.alias_refusals import NOT_HERE, UNUSED
from llmtune.config.dump import config_to_yaml
from llmtune.config.importers.convert import import_source
from llmtune.config.importers.datasets import ALL_RULES
from llmtune.config.importers.page import page
from llmtune.config.importers.report import report_lines
from llmtune.config.importers.rules import Outcome
from llmtune.config.importers.source import flatten, read_sources
from llmtune.config.importers.tables import peer_names, peer_of
from llmtune.config.keys import LEAVES, SOURCE_FIELDS
from llmtune.config.layers import parse_config
from llmtune.errors import ConfigError, UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sample(tmp_path, peer, *changes):
    """The import of a sample after text replacements."""
    name, text = SAMPLES[peer]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return imported(tmp_path, text, name)


def outcome(result, key):
    return row_of(result, key).outcome


def test_there_is_a_sample_and_a_table_for_each_of_the_toolkits():
    assert set(SAMPLES) == set(peer_names())
    assert len(SAMPLES) == 13


@pytest.mark.parametrize("peer", SAMPLES)
def test_the_toolkit_is_found_by_its_keys(tmp_path, peer):
    assert sample(tmp_path, peer).peer.id == peer


@pytest.mark.parametrize("peer", SAMPLES)
def test_every_key_of_a_file_is_accounted_for_once(tmp_path, peer):
    name, text = SAMPLES[peer]
    result = imported(tmp_path, text, name)
    given = [given.key for given in flatten(read_sources(tmp_path / name)[0].table)]
    assert [row.key for row in result.keys] == given


@pytest.mark.parametrize("peer", SAMPLES)
def test_the_written_config_loads_and_round_trips(tmp_path, peer):
    result = sample(tmp_path, peer)
    resolved = parse_config(result.yaml)
    assert resolved.notes == ()  # only our own names
    assert parse_config(config_to_yaml(resolved.config)).config == resolved.config


@pytest.mark.parametrize("peer", SAMPLES)
def test_every_line_of_the_written_config_has_its_origin(tmp_path, peer):
    result = sample(tmp_path, peer)
    for line in result.yaml.splitlines():
        if line.startswith("  ") and not line.strip().startswith("#") and not re.fullmatch(r"  (train|eval):", line):
            assert re.search(r"  # \S", line), line
    own = {key for key, setting in result.settings.items() if setting.is_default}
    assert {"training.weight_decay", "training.max_grad_norm"} & own


@pytest.mark.parametrize("peer", SAMPLES)
def test_every_key_whose_value_changes_changes_the_report(tmp_path, peer):
    """A property over all keys: no value is read past."""
    name, text = SAMPLES[peer]
    path = tmp_path / name
    path.write_text(text)
    source = read_sources(path)[0]
    before = list(report_lines(import_source(source, peer), 120))
    tried = 0
    for changed in with_one_value_changed(source):
        tried += 1
        after = list(report_lines(import_source(changed, peer), 120))
        assert after != before
    assert tried >= 8


def with_one_value_changed(source):
    from dataclasses import replace

    from llmtune.config.document import Entry, Scalar, Table

    def walk(table):
        for place, entry in enumerate(table.entries):
            if isinstance(entry.value, Scalar) and entry.value.text.startswith("`"):
                continue  # a call whose keywords are read one by one
            if isinstance(entry.value, Scalar):
                others = [replace(entry.value, text=f"{entry.value.text}9", plain=True)]
            elif isinstance(entry.value, Table):
                others = list(walk(entry.value))
            else:
                continue
            for other in others:
                entries = (*table.entries[:place], Entry(entry.key, other, entry.origin), *table.entries[place + 1 :])
                yield Table(entries, table.origin)

    for table in walk(source.table):
        yield replace(source, table=table)


# --- the tables


@pytest.mark.parametrize("peer", SAMPLES)
def test_every_row_of_a_table_names_a_rule_and_keys_that_exist(peer):
    table = peer_of(peer)
    rows = [*table.rows.values(), *(row for _, row in table.patterns)]
    assert len(rows) >= 30
    for row in rows:
        assert row.rule in ALL_RULES, row
        targets = re.findall(
            r"\b(?:run|model|adapter|data|training|objective|evaluation|checkpoint|tracking)\.[\w.\[\]]+",
            f"{row.argument} " + (row.text if row.rule in ("words", "component", "holds") else ""),
        )
        own = [
            target
            for target in targets
            if row.rule not in ("none", "needs", "drop") and not target.startswith("data.train[].columns")
        ]
        for target in own:
            exists_here(target, peer, row)
        reason = row.text or UNUSED.get(row.key.rpartition(".")[2]) or NOT_HERE.get(row.key.rpartition(".")[2])
        assert reason or row.rule not in ("none", "needs", "drop"), f"the report would say no reason: {row}"
    for default in table.defaults:
        assert default.key in LEAVES, default
        assert default.text, default


def exists_here(target, peer, row):
    source = re.fullmatch(r"data\.(?:train|eval)(?:\[\]\.(\w+).*)?", target)
    known = target in LEAVES or (source and (source[1] is None or source[1] in SOURCE_FIELDS))
    theirs = target in peer_of(peer).rows or target.startswith(
        ("training.trainer", "model._target", "training.eval_strategy", "training.save_strategy")
    )
    assert known or theirs, (target, row)


# --- one toolkit after the other, with its traps


def test_axolotl_reads_its_families_of_rows_and_slices(tmp_path):
    of = values(sample(tmp_path, "axolotl"))
    (source,) = of("data.train")
    assert (source.path, source.format, source.split) == ("org/alpaca", "alpaca", "train[:1%]")
    assert of("model.quantization") == "4bit"
    assert (of("adapter.method"), of("adapter.r"), of("adapter.alpha")) == ("lora", 8, 32.0)
    assert of("data.packing") == "first_fit"
    assert (of("checkpoint.every_epochs"), of("evaluation.every_epochs")) == (0.25, 0.5)
    assert of("data.overlong") == "drop"
    assert (of("training.lr_schedule"), of("training.warmup_ratio")) == ("cosine", 0.03)


def test_axolotl_batch_size_is_a_total_and_no_micro_batch(tmp_path):
    """Trap 9: `batch_size` means another thing in each toolkit, so the toolkit is known before a key is read."""
    result = sample(tmp_path, "axolotl", ("micro_batch_size: 2", "micro_batch_size: 2\nbatch_size: 64"))
    assert values(result)("training.batch_size") == 2
    assert outcome(result, "batch_size") is Outcome.IGNORED
    assert values(sample(tmp_path, "torchtune"))("training.batch_size") == 4


def test_axolotl_without_a_length_has_512_and_null_is_never_an_error(tmp_path):
    result = sample(tmp_path, "axolotl", ("sequence_len: 1024\n", ""))
    assert values(result)("data.max_length") == 512
    assert result.is_whole


def test_a_4_bit_adamw_has_no_equivalent_and_the_exit_code_is_3(tmp_path, capsys):
    name, text = SAMPLES["axolotl"]
    (tmp_path / name).write_text(text.replace("adamw_bnb_8bit", "adamw_torch_4bit"))
    assert run(["config", "import", name, "--output", "here.yaml"]) == 3
    out = capsys.readouterr().out
    assert "no equivalent, and what that changes (1)" in out
    assert "`adamw_8bit` is the smallest here" in " ".join(out.split())  # lines are folded
    assert "optimizer: adamw_torch_4bit" in (tmp_path / "here.yaml").read_text()  # at its top
    assert run(["config", "validate", "here.yaml"]) == 0


def test_llama_factory_writes_alpha_as_twice_the_rank_and_looks_rows_up(tmp_path):
    """Traps 2 and 3."""
    (tmp_path / "data").mkdir()
    info = {
        "identity": {"file_name": "identity.json"},
        "pairs": {
            "hf_hub_url": "org/pairs",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "better", "rejected": "worse"},
        },
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    result = sample(
        tmp_path, "llama-factory", ("stage: sft", "stage: dpo\npref_loss: simpo\npref_beta: 2.0\nsimpo_gamma: 1.0")
    )
    of = values(result)
    assert (of("adapter.r"), of("adapter.alpha")) == (8, 16.0)
    assert of("adapter.target_modules") == "all-linear"
    assert of("data.template_args") == {"enable_thinking": False}
    assert (of("objective.method"), of("objective.beta"), of("objective.gamma_beta_ratio")) == ("simpo", 2.0, 0.5)
    pairs = of("data.train")[1]
    assert (pairs.path, pairs.format, pairs.max_samples) == ("org/pairs", "preference", 100)
    assert pairs.columns == {"chosen": "better", "rejected": "worse"}
    assert of("data.train")[0].path == "data/identity.json"
    assert outcome(result, "eval_steps") is Outcome.IGNORED  # nothing is evaluated without `eval_strategy: steps`
    assert of("data.overlong") == "truncate_right"
    assert of("model.gradient_checkpointing") is True


@pytest.mark.parametrize(("column", "field"), [("text", None), ("body", "body")])
def test_llama_factory_pre_trains_on_the_column_of_the_prompt_alone(tmp_path, column, field):
    (tmp_path / "data").mkdir()
    info = {"c4": {"file_name": "c4.jsonl", "columns": {"prompt": column}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (source,) = values(imported(tmp_path, "stage: pt\nfinetuning_type: lora\ntemplate: x\ndataset: c4\n"))("data.train")
    assert (source.path, source.format, source.text_column) == ("data/c4.jsonl", "text", field)


def test_names_without_a_dataset_info_are_asked_for(tmp_path):
    result = sample(tmp_path, "llama-factory")
    assert outcome(result, "dataset") is Outcome.NEEDS


def test_trl_trains_all_tokens_of_messages_and_starts_from_its_own_lora(tmp_path):
    """Traps 3, 4, 5, 6 and 7."""
    of = values(sample(tmp_path, "trl"))
    assert of("data.train_on") == "all_tokens"
    found = [of(f"adapter.{name}") for name in ("r", "alpha", "dropout", "target_modules")]
    assert found == [16, 32.0, 0.05, ("q_proj", "v_proj")]
    assert (of("training.precision"), of("model.gradient_checkpointing")) == ("bf16", True)
    assert (of("training.warmup_ratio"), of("training.warmup_steps")) == (0.1, None)  # below 1 it is a ratio
    assert of("training.max_steps") is None
    assert [source.split for source in of("data.eval")] == ["test"]
    assert of("data.overlong") == "truncate_right"


def test_a_switch_that_is_off_is_no_missing_one(tmp_path):
    """TRL has bf16 and gradient checkpointing on where nothing is said."""
    of = values(sample(tmp_path, "trl", ("packing: true", "packing: true\nbf16: false\ngradient_checkpointing: false")))
    assert (of("training.precision"), of("model.gradient_checkpointing")) == ("fp32", False)


def test_trl_dpo_on_a_command_line_has_another_rate_and_counts_the_devices(tmp_path):
    text = (
        "accelerate launch --num_processes 4 examples/scripts/dpo.py \\\n --model_name_or_path m --dataset_name d \\\n"
    )
    result = imported(tmp_path, text + " --gradient_accumulation_steps 2 --loss_type ipo --beta=0.2\n", "run.sh")
    of = values(result)
    assert (result.peer.id, of("objective.method"), of("objective.loss"), of("objective.beta")) == (
        "trl",
        "dpo",
        "ipo",
        0.2,
    )
    assert of("training.learning_rate") == 1e-6
    assert of("training.gradient_accumulation_steps") == 8
    assert outcome(result, "num_processes") is Outcome.NEEDS


def test_torchtune_checkpoint_dir_is_the_base_model_and_alpaca_trains_all_tokens(tmp_path):
    """Traps 1, 4 and 5."""
    of = values(sample(tmp_path, "torchtune"))
    assert (of("model.name"), of("run.output_dir")) == ("/models/base", "/tmp/out")
    (source,) = of("data.train")
    assert (source.path, source.format, source.train_on) == ("yahma/alpaca-cleaned", "alpaca", "all_tokens")
    assert of("adapter.target_modules") == ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert of("training.max_steps") == 100  # 50 in each of 2 epochs
    assert of("training.max_grad_norm") is None
    assert of("training.weight_decay") == 0.01


def test_litgpt_checkpoint_dir_is_the_base_model_and_its_switches_are_a_list(tmp_path):
    """Traps 1, 3, 4 and 5."""
    of = values(sample(tmp_path, "litgpt"))
    assert (of("model.name"), of("run.output_dir")) == ("checkpoints/org/base", "out/lora")
    assert of("adapter.target_modules") == ("q_proj", "k_proj", "v_proj")
    assert (of("adapter.alpha"), of("adapter.dropout")) == (16.0, 0.05)
    assert of("data.train_on") == "all_tokens"
    assert of("training.gradient_accumulation_steps") == 4
    assert of("training.min_lr_ratio") == 0.0  # its fine-tuning reads past `min_lr`, which its pre-training reads
    assert of("training.max_grad_norm") is None
    assert (of("training.lr_schedule"), of("training.betas")) == ("cosine", (0.9, 0.95))


def test_unsloth_calls_are_read_and_never_run(tmp_path):
    result = sample(tmp_path, "unsloth", ("from unsloth", "open('ran', 'w')\nfrom unsloth"))
    of = values(result)
    assert not (tmp_path / "ran").exists()
    assert (of("model.name"), of("data.max_length"), of("model.quantization")) == ("unsloth/base-1b", 2048, "4bit")
    assert of("model.gradient_checkpointing") == "offload"
    assert of("training.precision") == "auto"
    assert of("data.train_on") == "all_tokens"
    assert outcome(result, "eval_steps") is Outcome.NEEDS  # only running the script tells
    responses = "\nfrom unsloth.chat_templates import train_on_responses_only\ntrain_on_responses_only(trainer)\n"
    name, text = SAMPLES["unsloth"]
    assert values(imported(tmp_path, text + responses, name))("data.train_on") == "all_assistant_messages"


def test_a_notebook_is_read_like_a_script_with_its_cells_named(tmp_path):
    cells = [{"cell_type": "code", "source": ["!pip install unsloth\n", *SAMPLES["unsloth"][1].splitlines(True)]}]
    result = imported(tmp_path, json.dumps({"cells": cells}), "tune.ipynb")
    assert (result.peer.id, values(result)("adapter.r")) == ("unsloth", 16)
    assert "# cell 1: r" in result.yaml


def test_unsloth_studio_counts_steps_where_it_has_no_epochs(tmp_path):
    of = values(sample(tmp_path, "unsloth-studio"))
    assert (of("training.max_steps"), of("adapter.rslora"), of("data.train_on")) == (30, True, "all_assistant_messages")


def test_ms_swift_multiplies_by_the_processes_and_its_model_name_is_a_persona(tmp_path):
    """Traps 5, 6 and 10."""
    result = sample(tmp_path, "ms-swift")
    of = values(result)
    assert of("model.name") == "org/base-1b"
    assert outcome(result, "model_name") is Outcome.NEEDS
    assert of("training.gradient_accumulation_steps") == 16
    first, second = of("data.train")
    assert (first.path, first.max_samples) == ("org/alpaca-zh", 500)
    assert (second.path, second.config, second.max_samples) == ("org/alpaca", "en", 200)
    assert (of("training.weight_decay"), of("training.betas"), of("training.lr_schedule")) == (
        0.1,
        (0.9, 0.95),
        "cosine",
    )
    assert [of(f"adapter.{name}") for name in ("r", "alpha", "dropout")] == [8, 32.0, 0.05]
    assert (of("data.overlong"), of("data.system")) == ("drop", "You are helpful.")


def test_ms_swift_without_accumulation_takes_16_rows_a_step(tmp_path):
    result = sample(
        tmp_path, "ms-swift", ("    --gradient_accumulation_steps 8 \\\n", "    --per_device_train_batch_size 3 \\\n")
    )
    assert values(result)("training.gradient_accumulation_steps") == 6


def test_mlx_scale_is_alpha_over_the_rank_and_unknown_keys_did_nothing(tmp_path):
    """Traps 3, 4, 5 and 8."""
    result = sample(tmp_path, "mlx-lm")
    of = values(result)
    assert (of("adapter.r"), of("adapter.alpha"), of("adapter.layers")) == (16, 320.0, 8)
    assert of("adapter.target_modules") == ("q_proj", "v_proj")
    assert of("training.max_steps") == 334  # 1,000 micro-batches, 3 a step
    assert (outcome(result, "learning-rate"), outcome(result, "alpha")) == (Outcome.IGNORED, Outcome.IGNORED)
    assert of("training.learning_rate") == 1e-5
    assert (of("training.lr_schedule"), of("training.max_grad_norm")) == ("constant", None)
    assert of("data.train_on") == "all_tokens"
    assert ([s.split for s in of("data.train")], [s.split for s in of("data.eval")]) == (["train"], ["valid"])


def test_oumi_has_an_alpha_of_8_and_its_collator_says_the_mask(tmp_path):
    """Traps 3 and 4."""
    result = sample(tmp_path, "oumi")
    of = values(result)
    assert (of("adapter.r"), of("adapter.alpha"), of("adapter.dropout")) == (64, 8.0, 0.0)
    assert of("model.quantization") == "4bit"
    assert of("data.train_on") == "all_assistant_messages"
    assert of("training.max_grad_norm") is None
    assert (
        values(sample(tmp_path, "oumi", ("    collator_name: text_completions_only_with_padding\n", "")))(
            "data.train_on"
        )
        == "all_tokens"
    )


def test_nemo_reads_its_data_set_classes_and_adam_without_decay(tmp_path):
    of = values(sample(tmp_path, "nemo"))
    assert of("training.gradient_accumulation_steps") == 8
    assert of("adapter.target_modules") == r"(.*\.)?.*_proj"
    assert of("data.train")[0].columns == {"prompt": "{context} {question}", "completion": "answers.text.0"}
    assert of("data.eval")[0].max_samples == 64
    assert (of("training.optimizer"), of("training.weight_decay")) == ("adamw", 0.0)
    assert of("training.min_lr_ratio") == pytest.approx(0.1)


def test_nemo_adam_with_decay_is_another_optimizer(tmp_path):
    result = sample(tmp_path, "nemo", ("weight_decay: 0}", "weight_decay: 0.1}"))
    assert outcome(result, "optimizer._target_") is Outcome.NONE
    assert not result.is_whole


def test_soup_reads_past_keys_that_it_does_not_declare(tmp_path):
    """Trap 8."""
    result = sample(tmp_path, "soup")
    assert outcome(result, "training.my_switch") is Outcome.IGNORED
    assert values(result)("training.batch_size") == "auto"


def test_llama_factory_v1_divides_the_global_batch(tmp_path):
    of = values(sample(tmp_path, "llama-factory-v1"))
    assert (of("training.batch_size"), of("training.gradient_accumulation_steps")) == (2, 8)
    assert of("adapter.target_modules") == "all-linear"


# --- the command


def test_the_config_goes_to_stdout_and_the_report_to_stderr(tmp_path, capsys):
    name, text = SAMPLES["axolotl"]
    (tmp_path / name).write_text(text)
    assert run(["config", "import", name]) == 0
    captured = capsys.readouterr()
    assert parse_config(captured.out).config.adapter.r == 8
    assert "Axolotl, recognised by `base_model`" in captured.err
    assert "every key has an equivalent, or changes nothing that is trained" in captured.err


def test_json_is_data(tmp_path, capsys):
    name, text = SAMPLES["litgpt"]
    (tmp_path / name).write_text(text)
    run(["config", "import", name, "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["toolkit"] == "litgpt"
    (row,) = [row for row in data["keys"] if row["key"] == "train.global_batch_size"]
    assert (row["outcome"], row["text"], row["ours"]) == (
        "computed",
        "8 / 2 = 4",
        ["training.gradient_accumulation_steps"],
    )


def test_an_existing_file_is_not_written_over(tmp_path, capsys):
    name, text = SAMPLES["axolotl"]
    (tmp_path / name).write_text(text)
    (tmp_path / "mine.yaml").write_text("kept")
    assert run(["config", "import", name, "--output", "mine.yaml"]) == 2
    assert (tmp_path / "mine.yaml").read_text() == "kept"


def test_a_file_of_no_toolkit_and_a_toolkit_without_a_table_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="belong to no toolkit"):
        imported(tmp_path, "colour: blue\n")
    with pytest.raises(UsageError, match="no toolkit is called `axolotol`"):
        imported(tmp_path, "base_model: m\n", peer="axolotol")
    with pytest.raises(ConfigError, match="holds no config"):
        imported(tmp_path, "echo hello\n", "x.sh")


def test_a_vocabulary_with_a_few_words_of_a_toolkit_is_no_config(tmp_path):
    words = {word: number for number, word in enumerate(["base", "task", "backend", "output", *map(str, range(500))])}
    with pytest.raises(ConfigError, match="belong to no toolkit"):
        imported(tmp_path, json.dumps(words), "vocab.json")
    few = {word: number for word, number in words.items() if number < 50}
    assert imported(tmp_path, json.dumps(few), "few.json").peer.id == "soup"


def test_of_several_command_lines_one_is_taken_and_said(tmp_path, capsys):
    (tmp_path / "x.sh").write_text(
        "trl sft --model_name_or_path a --dataset_name d\ntrl sft --model_name_or_path b --dataset_name d\n"
    )
    assert run(["config", "import", "x.sh", "--number", "2"]) == 0
    captured = capsys.readouterr()
    assert "x.sh:2: 2 of 2 command lines" in captured.err
    assert parse_config(captured.out).config.model.name == "b"


def test_a_secret_of_the_file_is_in_no_line(tmp_path):
    token = "hf_" + "a1B2" * 9
    result = sample(
        tmp_path, "axolotl", ("base_model:", f"hf_use_auth_token: {token}\nwandb_name: {token}\nbase_model:")
    )
    assert token not in result.yaml + "\n".join(report_lines(result, 100))


@pytest.mark.parametrize("peer", SAMPLES)
@pytest.mark.parametrize("command", [["config", "validate"], ["train", "--dry-run", "--config"]])
def test_validate_and_train_name_the_toolkit_and_the_command(tmp_path, capsys, peer, command):
    name, text = SAMPLES[peer]
    (tmp_path / name).write_text(text)
    assert run([*command, name]) == 2
    err = capsys.readouterr().err
    assert f"this looks like a config of {peer_of(peer).name}" in err
    assert f"`llmtune config import {name} --output FILE`" in err
    assert "unknown key" not in err


def test_a_file_of_which_every_key_is_known_here_too_is_noted(tmp_path, capsys):
    (tmp_path / "sft.yaml").write_text("model_name_or_path: m\ndataset_name: d\nassistant_only_loss: true\nseed: 1\n")
    assert run(["config", "validate", "sft.yaml"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "this looks like a config of TRL" in said
    assert "`llmtune config import sft.yaml --output FILE`" in said


def test_a_config_of_ours_with_a_typo_is_told_the_key_and_no_toolkit(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: {name: custom-nano}\ntraining: {lerning_rate: 1}\nbase_model: x\n")
    assert run(["config", "validate", "mine.yaml"]) == 2
    err = capsys.readouterr().err
    assert "lerning_rate" in err
    assert "looks like a config of" not in err


def test_the_page_for_those_who_switch_is_made_of_the_tables():
    """`python -m llmtune.config.importers.page > docs/switching.md`."""
    assert (ROOT / "docs" / "switching.md").read_text(encoding="utf-8") == page()
    assert all(f"## Coming from {peer_of(peer).name}\n" in page() for peer in SAMPLES)


FLAT = """\
model_name_or_path: custom-nano
train_file: rows.jsonl
num_train_epochs: 0.5
train_on_inputs: false
use_lora: true
lora_r: 8
max_seq_length: 512
"""


@pytest.mark.parametrize(
    "more",
    [
        "load_in_4bit: false",  # counts for Unsloth
        "per_device_train_batch_size: 2\ngradient_accumulation_steps: 2\nlearning_rate: 1e-4\noutput_dir: out",  # TRL
        "do_train: true\ncutoff_len: 512",  # LLaMA-Factory
        "lora_target_linear: true\nsequence_len: 512",  # Axolotl
        "",
    ],
)
def test_a_flat_file_of_names_that_many_share_is_no_ones_and_loses_no_key(more, tmp_path):
    with pytest.raises(ConfigError, match="are those of no one toolkit") as refused:
        imported(tmp_path, FLAT + more)
    assert "configs take these keys as they are: `llmtune config show --config " in str(refused.value)
    assert "config.yaml`; or name it with `--from`: axolotl" in str(refused.value)
    read = parse_config(FLAT + more)
    assert read.config.data.train[0].path == "rows.jsonl"
    assert not any("looks like a config of" in note for note in read.notes)


def test_a_key_of_another_toolkit_does_not_hide_whose_a_file_is(tmp_path):
    result = imported(tmp_path, SAMPLES["axolotl"][1] + "train_file: rows.jsonl\n", "lora.yml")
    assert result.peer.id == "axolotl"
    assert row_of(result, "train_file").outcome is Outcome.NONE
