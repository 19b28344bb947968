"""Forms of values in other toolkits' files: sums of the shell, lists of data sets, nulls, keys that stand twice."""

import pytest

from import_samples import imported, row_of, values
from llmtune.config.importers.rules import Outcome
from llmtune.errors import ConfigError

SWIFT = "swift sft --model org/m --dataset a.jsonl --gradient_accumulation_steps "
TORCHTUNE = (
    "model: {_component_: torchtune.models.qwen2_5.qwen2_5_0_5b}\ncheckpointer: {_component_: x, checkpoint_dir: /m}\n"
)
NEMO = """step_scheduler: {global_batch_size: 8, local_batch_size: 8}
model: {_target_: x, pretrained_model_name_or_path: o/m}
"""


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (SWIFT + "$(expr 16 / 1)", 16),
        (SWIFT + "`expr 32 / 4`", 8),
        ("n=4\n" + SWIFT + "$(expr 16 / $n) --seed 7", 4),
        ("n=4\n" + SWIFT + "$((16 / n * 2))", 8),
        ("n=2\n" + SWIFT + '"$(expr 9 / $n)"', 4),
        ("export NPROC_PER_NODE=4\n" + SWIFT + "2", 8),
        ("nproc=2\nNPROC_PER_NODE=$nproc \\\n" + SWIFT + "$(expr 16 / $nproc)", 16),
    ],
)
def test_sums_and_exported_variables_of_a_shell_script_are_read(tmp_path, text, steps):
    assert values(imported(tmp_path, text, "a.sh"))("training.gradient_accumulation_steps") == steps


@pytest.mark.parametrize("word", ["$(nproc)", "$((16 / $(nproc)))", "$STEPS", "`cat steps`"])
def test_a_number_that_only_the_shell_knows_is_asked_for_and_never_guessed(tmp_path, word):
    result = imported(tmp_path, SWIFT + word, "a.sh")
    assert row_of(result, "gradient_accumulation_steps").outcome is Outcome.NEEDS


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("python -m trl dpo --model_name_or_path o/m --dataset_name d/e", "dpo"),
        ("export M=o/m\ntrl sft --model_name_or_path $M --dataset_name d/e", "sft"),
        ("llamafactory-cli train --model_name_or_path o/m --stage kto --finetuning_type lora --dataset d", "kto"),
    ],
)
def test_commands_are_found_however_they_are_started(tmp_path, text, method):
    of = values(imported(tmp_path, text, "a.sh"))
    assert (of("objective.method"), of("model.name")) == (method, "o/m")


def test_a_script_that_names_a_config_says_so(tmp_path):
    with pytest.raises(ConfigError, match="import that file") as refusal:
        imported(tmp_path, "llamafactory-cli train examples/lora.yaml", "a.sh")
    assert "`examples/lora.yaml`" in str(refusal.value)


def test_rows_of_a_file_may_be_counted_too(tmp_path):
    of = values(imported(tmp_path, "model: o/m\ntrain_type: lora\ndataset: [a.jsonl, 'b.jsonl#200']\n"))
    assert [(source.path, source.max_samples) for source in of("data.train")] == [("a.jsonl", None), ("b.jsonl", 200)]


def test_torchtune_lists_several_data_sets(tmp_path):
    text = """dataset:
  - {_component_: torchtune.datasets.slimorca_dataset, packed: true}
  - {_component_: torchtune.datasets.chat_dataset, source: json, data_files: b.json, conversation_column: talk}
"""
    result = imported(tmp_path, TORCHTUNE + text)
    assert [source.path for source in values(result)("data.train")] == ["Open-Orca/SlimOrca-Dedup", "b.json"]
    assert values(result)("data.train")[1].columns == {"messages": "talk"}
    assert result.is_whole


@pytest.mark.parametrize(
    ("text", "paths", "splits"),
    [
        ("hf_dataset: {path: o/a, prompt_feature: q, completion_feature: r}", ["o/a"], ["train[:80%]"]),
        ("hf_dataset: [{path: o/a, train_split: train}, {path: o/b}]", ["o/a", "o/b"], ["train", "train[:80%]"]),
        ("data: elsewhere\nhf_dataset: {path: o/a}", ["o/a"], ["train[:80%]"]),
    ],
)
def test_mlx_takes_the_data_sets_of_the_hub_before_a_folder(tmp_path, text, paths, splits):
    result = imported(tmp_path, f"model: o/m\niters: 10\nlora_parameters: {{rank: 8, scale: 20.0}}\n{text}\n")
    train, held_out = (values(result)(key) for key in ("data.train", "data.eval"))
    assert [source.path for source in train] == [source.path for source in held_out] == paths
    assert [source.split for source in train] == splits
    assert [source.columns for source in held_out] == [source.columns for source in train]
    assert {source.split for source in held_out} == {"train[-10%:]"}


def test_the_alignment_handbooks_mixer_names_the_rows(tmp_path):
    text = "model_name_or_path: o/m\ndataset_mixer:\n  o/a: 1.0\n  o/b: 0.25\ndataset_splits: [train_sft, test_sft]\n"
    of = values(imported(tmp_path, text))
    assert [(s.path, s.split) for s in of("data.train")] == [("o/a", "train_sft"), ("o/b", "train_sft[:25%]")]
    assert [(s.path, s.split) for s in of("data.eval")] == [("o/a", "test_sft"), ("o/b", "test_sft")]


@pytest.mark.parametrize("value", ["null", "", "0", "0.0", "~"])
@pytest.mark.parametrize(
    ("peer", "text"), [("oumi", "training:\n  max_grad_norm: {}\n"), ("trl", "max_grad_norm: {}\n")]
)
def test_clipping_that_is_switched_off_stays_off(tmp_path, peer, text, value):
    assert values(imported(tmp_path, text.format(value), peer=peer))("training.max_grad_norm") is None
    assert values(imported(tmp_path, "seed: 1\n", peer=peer))("training.max_grad_norm") == 1.0


@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        ("'*_proj'", r"(.*\.)?.*_proj"),
        ("['*_proj', gate]", r"(.*\.)?.*_proj|(.*\.)?gate"),
        ("['*.q_proj']", ("q_proj",)),
    ],
)
def test_names_with_a_star_match_the_layers_they_match_there(tmp_path, targets, pattern):
    text = NEMO + f"peft: {{_target_: PeftConfig, dim: 8, target_modules: {targets}, exclude_modules: []}}\n"
    of = values(imported(tmp_path, text))
    assert of("adapter.target_modules") == pattern
    assert not of("adapter.exclude_modules")


@pytest.mark.parametrize(
    ("text", "decay"),
    [
        (TORCHTUNE + "optimizer: {_component_: torch.optim.SGD, lr: 1e-2}\n", 0.0),
        (TORCHTUNE + "optimizer: {_component_: torch.optim.Adam, lr: 1e-2}\n", 0.0),
        (TORCHTUNE + "optimizer: {_component_: torch.optim.AdamW, lr: 1e-2}\n", 0.01),
        (NEMO + "optimizer: {_target_: torch.optim.Adam, lr: 1e-2}\n", 0.0),
        (NEMO + "optimizer: {_target_: torch.optim.AdamW, lr: 1e-2}\n", 0.01),
        ("out_dir: o\ncheckpoint_dir: c\ntrain: {global_batch_size: 4, micro_batch_size: 4}\noptimizer: SGD\n", 0.0),
        ("out_dir: o\ncheckpoint_dir: c\ntrain: {global_batch_size: 4, micro_batch_size: 4}\noptimizer: AdamW\n", 0.01),
    ],
)
def test_each_optimizer_has_its_own_default_of_decay(tmp_path, text, decay):
    assert values(imported(tmp_path, text))("training.weight_decay") == decay


def test_litgpt_pretrains_with_another_seed_than_it_fine_tunes(tmp_path):
    text = "out_dir: o\ntrain: {global_batch_size: 4, micro_batch_size: 4}\n"
    assert values(imported(tmp_path, text))("run.seed") == 42
    assert values(imported(tmp_path, text + "checkpoint_dir: c\n"))("run.seed") == 1337


def test_of_keys_that_stand_twice_the_last_one_counts_as_there_and_the_first_is_named(tmp_path):
    result = imported(tmp_path, "base_model: o/m\nadapter: lora\nlora_r: 8\nlora_r: 16\n")
    assert values(result)("adapter.r") == 16
    first, second = (row for row in result.keys if row.key == "lora_r")
    assert (first.value, first.where, first.outcome) == ("8", "line 3", Outcome.IGNORED)
    assert (second.value, second.where, second.outcome) == ("16", "line 4", Outcome.KEPT)


@pytest.mark.parametrize("word", ["yes", "On", "true", "True"])
def test_words_of_yaml_1_1_for_true_are_read_as_there(tmp_path, word):
    text = f"base_model: o/m\nadapter: lora\nlora_target_linear: {word}\nsample_packing: no\n"
    of = values(imported(tmp_path, text, peer="axolotl"))
    assert (of("adapter.target_modules"), of("data.packing")) == ("all-linear", "none")


def test_a_key_that_others_take_is_no_key_without_an_equivalent(tmp_path):
    result = imported(tmp_path, TORCHTUNE + "base: /b\noutput_dir: ${base}/out\n")
    assert values(result)("run.output_dir") == "/b/out"
    assert row_of(result, "base").outcome is Outcome.DROPPED
