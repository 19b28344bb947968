"""`llmtune config import`: the rules of its tables, each with the arithmetic of the toolkit that it stands for."""

from __future__ import annotations

import pytest

from import_samples import imported, row_of, values
from llmtune.config.document import Entry, Origin, Table, from_python
from llmtune.config.importers.convert import import_source
from llmtune.config.importers.report import report_lines
from llmtune.config.importers.rules import Outcome
from llmtune.config.importers.source import Source
from llmtune.config.importers.tables import own_table, peer_names, peer_of
from llmtune.config.schema import SourceConfig

GRPO = """\
swift rlhf --rlhf_type grpo --model m --dataset d --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \\
    --num_generations 16 --temperature 0.7 --epsilon 0.1 --max_completion_length 300 --steps_per_generation 16 \\
    --reward_funcs accuracy format --use_vllm true --vllm_mode colocate --overlong_filter true --tuner_type lora \\
    --scale_rewards none --top_p 1.0 --num_iterations 1
"""


# --- a step's rows


def test_grpo_counts_prompts_where_trl_counts_answers(tmp_path):
    """TRL: 4 x 8 answers a step, 16 to each prompt, are 2 prompts; 16 micro-batches for a drawing are 2 steps."""
    result = imported(tmp_path, GRPO, "run.sh")
    of = values(result)
    assert (of("training.batch_size"), of("training.gradient_accumulation_steps")) == (1, 2)
    assert (of("objective.num_generations"), of("objective.steps_per_generation")) == (16, 2)
    said = "4 x 8 answers / 16 to each prompt = 2 prompts a step"
    assert said in result.yaml
    row = row_of(result, "gradient_accumulation_steps")
    assert (row.outcome, row.text) == (Outcome.COMPUTED, said)
    assert f"-> training.gradient_accumulation_steps: 2 ({said})" in " ".join(report_lines(result, 400))
    (source,) = of("data.train")
    assert source.format == "prompt"


@pytest.mark.parametrize(
    ("batch", "accumulation", "drawn", "prompts_of_a_micro_batch", "micro_batches"),
    [(8, 4, 8, 1, 4), (16, 4, 8, 2, 4), (4, 4, 8, 1, 2), (8, 1, 8, 1, 1), (32, 3, 8, 4, 3), (24, 1, 16, 1, 2)],
)
def test_the_prompts_of_a_step_are_its_answers_divided(
    tmp_path, batch, accumulation, drawn, prompts_of_a_micro_batch, micro_batches
):
    text = f"trl grpo --model_name_or_path m --dataset_name d --per_device_train_batch_size {batch} "
    text += f"--gradient_accumulation_steps {accumulation} --num_generations {drawn}"
    of = values(imported(tmp_path, text, "run.sh"))
    found = (of("training.batch_size"), of("training.gradient_accumulation_steps"))
    assert found == (prompts_of_a_micro_batch, micro_batches)


def test_grpo_of_two_toolkits_has_other_defaults(tmp_path):
    """TRL's GRPOConfig: dapo, beta 0, temperature 1; ms-swift: grpo, 0.04, 0.9. Both clip as far above 1 as below."""
    swift = values(imported(tmp_path, GRPO, "run.sh"))
    trl = values(imported(tmp_path, "trl grpo --model_name_or_path m --dataset_name d --epsilon 0.3", "run.sh"))
    keys = [f"objective.{name}" for name in ("loss", "beta", "temperature", "clip", "clip_high", "max_new_tokens")]
    assert [swift(key) for key in keys] == ["grpo", 0.04, 0.7, 0.1, 0.1, 300]
    assert [trl(key) for key in keys] == ["dapo", 0.0, 1.0, 0.3, 0.3, 512]
    assert (swift("objective.scale_rewards"), swift("objective.mask_truncated")) == (False, True)


def test_rewards_that_are_code_are_asked_for_and_how_answers_are_drawn_is_dropped(tmp_path):
    result = imported(tmp_path, GRPO, "run.sh")
    assert row_of(result, "reward_funcs").outcome is Outcome.NEEDS
    assert "--reward FILE.py:FUNCTION" in row_of(result, "reward_funcs").text
    assert row_of(result, "vllm_mode").outcome is Outcome.DROPPED
    assert row_of(result, "num_iterations").outcome is Outcome.DROPPED
    again = imported(tmp_path, GRPO.replace("num_iterations 1", "num_iterations 2"), "run.sh")
    assert row_of(again, "num_iterations").outcome is Outcome.NONE


@pytest.mark.parametrize(
    ("peer", "text", "batch", "accumulation"),
    [
        # 2 on each of 4 devices, 3 times
        ("trl", "per_device_train_batch_size: 2\ngradient_accumulation_steps: 3\nnum_processes: 4", 2, 12),
        ("llama-factory", "per_device_train_batch_size: 2\ngradient_accumulation_steps: 3", 2, 3),
        ("oumi", "training: {per_device_train_batch_size: 2, gradient_accumulation_steps: 3}", 2, 3),
        ("axolotl", "micro_batch_size: 2\ngradient_accumulation_steps: 3", 2, 3),
        # litgpt: ceil(global / devices / micro) micro-batches on each device
        ("litgpt", "devices: 2\ntrain: {global_batch_size: 32, micro_batch_size: 4}", 4, 8),
        ("nemo", "step_scheduler: {global_batch_size: 64, local_batch_size: 8}", 8, 8),
        ("llama-factory-v1", "global_batch_size: 16\nmicro_batch_size: 2", 2, 8),
        ("torchtune", "batch_size: 2\ngradient_accumulation_steps: 8", 2, 8),
        ("mlx-lm", "batch_size: 4\ngrad_accumulation_steps: 3", 4, 3),
        ("soup", "training: {batch_size: 2, gradient_accumulation_steps: 8}", 2, 8),
        ("unsloth-studio", "training: {batch_size: 2, gradient_accumulation_steps: 8}", 2, 8),
    ],
)
def test_a_step_has_the_rows_of_the_toolkits_step(tmp_path, peer, text, batch, accumulation):
    of = values(imported(tmp_path, text + "\n", peer=peer))
    assert (of("training.batch_size"), of("training.gradient_accumulation_steps")) == (batch, accumulation)


@pytest.mark.parametrize(("processes", "batch", "rows"), [(1, 1, 16), (1, 3, 18), (4, 1, 16), (4, 3, 24), (8, 4, 32)])
def test_ms_swift_chooses_its_accumulation_on_each_device(tmp_path, processes, batch, rows):
    """max(1, ceil(16 / batch / processes)) micro-batches on each of them."""
    text = f"NPROC_PER_NODE={processes} swift sft --model m --dataset d --per_device_train_batch_size {batch}\n"
    of = values(imported(tmp_path, text, "run.sh"))
    assert of("training.batch_size") * of("training.gradient_accumulation_steps") == rows


def test_a_hash_within_a_word_begins_no_comment(tmp_path):
    text = "swift sft --model m --dataset org/d#500 'org/e#20' --lora_rank 4 # don't\n"
    of = values(imported(tmp_path, text, "run.sh"))
    assert [source.max_samples for source in of("data.train")] == [500, 20]
    assert of("adapter.r") == 4


def test_mlx_counts_micro_batches_in_all_its_intervals(tmp_path):
    text = "iters: 1000\ngrad_accumulation_steps: 4\nsteps_per_eval: 100\nsave_every: 50\ndata: d\n"
    of = values(imported(tmp_path, text, peer="mlx-lm"))
    keys = ("training.max_steps", "evaluation.every_steps", "checkpoint.every_steps", "tracking.every_steps")
    assert [of(key) for key in keys] == [250, 25, 13, 3]


# --- warm-up, schedule, clipping


@pytest.mark.parametrize(
    ("peer", "text", "steps", "ratio"),
    [
        ("trl", "warmup_steps: 20", 20, None),
        ("trl", "warmup_steps: 0.1", None, 0.1),
        ("trl", "warmup_ratio: 0.1", None, 0.1),
        ("oumi", "training: {warmup_steps: 0.1}", None, 0.1),
        ("axolotl", "warmup_steps: 10\nwarmup_ratio: 0.2", 10, None),  # the steps count there, too
        ("nemo", "lr_scheduler: {lr_decay_style: cosine}", None, 0.1),  # a tenth, where nothing is said
        ("nemo", "lr_scheduler: {lr_decay_style: cosine, lr_warmup_steps: 7}", 7, None),
        ("unsloth-studio", "training: {warmup_ratio: 0.1}", None, 0.1),
        ("unsloth-studio", "training: {learning_rate: 1e-4}", 5, None),
    ],
)
def test_warm_up_in_steps_or_as_a_fraction(tmp_path, peer, text, steps, ratio):
    of = values(imported(tmp_path, text + "\n", peer=peer))
    assert (of("training.warmup_steps"), of("training.warmup_ratio")) == (steps, ratio)


@pytest.mark.parametrize(
    ("peer", "text", "schedule", "ratio"),
    [
        ("trl", "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}", "cosine", 0.1),
        ("trl", "learning_rate: 1e-4\nlr_scheduler_type: cosine\nlr_scheduler_kwargs: {min_lr: 1e-5}", "cosine", 0.1),
        ("litgpt", "train: {min_lr: 6e-5}\noptimizer: {init_args: {lr: 3e-4}}", "cosine", 0.2),
        ("litgpt", "checkpoint_dir: m\ntrain: {min_lr: 6e-5}\noptimizer: {init_args: {lr: 3e-4}}", "cosine", 0.0),
        ("nemo", "optimizer: {lr: 1e-5}\nlr_scheduler: {lr_decay_style: linear, min_lr: 1e-6}", "linear", 0.1),
        ("axolotl", "lr_scheduler: cosine\ncosine_min_lr_ratio: 0.25", "cosine", 0.25),
        ("mlx-lm", "lr_schedule: {name: cosine_decay, arguments: [1e-5, 1000, 1e-6]}", "cosine", 0.1),
        ("mlx-lm", "lr_schedule: {name: cosine_decay, arguments: [1e-5, x]}", "cosine", 0.0),
        ("torchtune", "optimizer: {lr: 1e-4}", "constant", 0.0),
    ],
)
def test_the_end_of_a_schedule_is_a_fraction_of_its_peak(tmp_path, peer, text, schedule, ratio):
    of = values(imported(tmp_path, text + "\n", peer=peer))
    assert (of("training.lr_schedule"), of("training.min_lr_ratio")) == (schedule, pytest.approx(ratio))


@pytest.mark.parametrize(
    ("peer", "text", "norm"),
    [
        ("trl", "max_grad_norm: 0.3", 0.3),
        ("trl", "max_grad_norm: 0", None),
        ("trl", "seed: 1", 1.0),
        ("axolotl", "gradient_clipping: 0.5", 0.5),
        ("torchtune", "clip_grad_norm: null", None),
        ("torchtune", "clip_grad_norm: 2.0", 2.0),
        ("litgpt", "train: {max_norm: 1.0}", 1.0),
        ("litgpt", "train: {max_norm: }", None),
        ("mlx-lm", "iters: 10", None),
        ("nemo", "clip_grad_norm: {max_norm: 0.7}", 0.7),
        ("oumi", "training: {max_grad_norm: 0.0}", None),
    ],
)
def test_clipping_is_on_where_it_is_there(tmp_path, peer, text, norm):
    assert values(imported(tmp_path, text + "\n", peer=peer))("training.max_grad_norm") == norm


# --- rows, masks, seeds, saving


@pytest.mark.parametrize(
    ("peer", "text", "save", "evaluate"),
    [
        ("trl", "dataset_name: d\nsave_strategy: epoch\neval_strategy: epoch", ("every_epochs", 1),
         ("every_epochs", 1)),
        ("trl", "dataset_name: d\nsave_steps: 0.2\neval_strategy: steps", ("every_steps", 0.2), ("every_steps", 10)),
        ("trl", "dataset_name: d\neval_strategy: steps\nlogging_steps: 7", ("every_steps", 500), ("every_steps", 7)),
        ("llama-factory", "val_size: 0.1\neval_strategy: steps", ("every_steps", 500), ("every_steps", 500)),
        ("llama-factory", "val_size: 0.1\neval_steps: 50", ("every_steps", 500), ("every_steps", None)),
        ("axolotl", "val_set_size: 0.1\nsaves_per_epoch: 4\nevals_per_epoch: 2", ("every_epochs", 0.25),
         ("every_epochs", 0.5)),
        ("axolotl", "base_model: m", ("every_steps", None), ("every_steps", None)),
        ("oumi", "training: {save_steps: 0, save_epoch: true}", ("every_epochs", 1), ("every_steps", None)),
        ("litgpt", "data: {init_args: {val_split_fraction: 0.1}}\neval: {interval: 50}", ("every_steps", 1000),
         ("every_steps", 50)),
    ],
)  # fmt: skip
def test_saves_and_evaluations_come_as_often_as_there(tmp_path, peer, text, save, evaluate):
    of = values(imported(tmp_path, text + "\n", peer=peer))
    assert (of(f"checkpoint.{save[0]}"), of(f"evaluation.{evaluate[0]}")) == (save[1], evaluate[1])


@pytest.mark.parametrize(
    ("peer", "kept"), [("trl", 0), ("llama-factory", 0), ("ms-swift", 0), ("oumi", 0), ("axolotl", 4), ("soup", 3)]
)
def test_as_many_checkpoints_are_kept(tmp_path, peer, kept):
    assert values(imported(tmp_path, "x: 1\n", peer=peer))("checkpoint.keep_last") == kept


@pytest.mark.parametrize(
    ("peer", "text", "seed", "order"),
    [
        ("trl", "seed: 7", 7, 7),
        ("trl", "seed: 7\ndata_seed: 3", 7, 3),
        ("llama-factory", "seed: 7", 7, 7),
        ("llama-factory", "seed: 7\ndisable_shuffling: true", 7, None),
        ("axolotl", "seed: 7\nshuffle_merged_datasets: false", 7, None),
        ("mlx-lm", "iters: 3", 0, 0),
        ("oumi", "training: {seed: 9}", 9, 9),
        ("torchtune", "seed: 5\nshuffle: false", 5, None),  # its sampler has a seed of its own
        ("unsloth-studio", "training: {random_seed: 3407}", 3407, 3407),
    ],
)
def test_seeds_of_training_and_of_the_order_of_the_rows(tmp_path, peer, text, seed, order):
    of = values(imported(tmp_path, text + "\n", peer=peer))
    assert (of("run.seed"), of("data.shuffle_seed")) == (seed, order)


ASSISTANT = "all_assistant_messages"
ROWS_OF_TORCHTUNE = "dataset: {{_component_: torchtune.datasets.{}, source: d{}}}"


@pytest.mark.parametrize(
    ("peer", "text", "form", "trained"),
    [
        ("axolotl", "datasets: [{path: d, type: alpaca}]", "alpaca", ASSISTANT),
        ("axolotl", "datasets: [{path: d, type: alpaca}]\ntrain_on_inputs: true", "alpaca", "all_tokens"),
        ("axolotl", "datasets: [{path: d, type: completion, field: t}]", "text", "all_tokens"),
        ("axolotl", "datasets: [{path: d, type: chat_template.default}]", "messages", ASSISTANT),
        ("llama-factory", "mask_history: true\ndataset: d", None, "last_assistant_turn"),
        ("llama-factory", "train_on_prompt: true\ndataset: d", None, "all_tokens"),
        ("llama-factory", "stage: pt\ndataset: d", None, "all_tokens"),
        ("torchtune", ROWS_OF_TORCHTUNE.format("alpaca_dataset", ""), "alpaca", "all_tokens"),
        ("torchtune", ROWS_OF_TORCHTUNE.format("alpaca_dataset", ", train_on_input: false"), "alpaca", ASSISTANT),
        ("torchtune", ROWS_OF_TORCHTUNE.format("chat_dataset", ", conversation_style: openai"), "messages",
         ASSISTANT),
        ("litgpt", "data: {class_path: litgpt.data.JSON, init_args: {json_path: d}}", "alpaca", "all_tokens"),
        ("litgpt", "data: {class_path: litgpt.data.JSON, init_args: {json_path: d, mask_prompt: true}}", "alpaca",
         ASSISTANT),
        ("mlx-lm", "data: d\nmask_prompt: true", None, ASSISTANT),
        ("mlx-lm", "data: d", None, "all_tokens"),
        ("trl", "dataset_name: d", None, "all_tokens"),
        ("trl", "dataset_name: d\nassistant_only_loss: true", None, ASSISTANT),
        ("soup", "data: {train: d, format: chatml, mask_history: true}", "messages", "last_assistant_turn"),
        ("unsloth-studio", "data: {dataset: d}\ntraining: {train_on_completions: false}", None, "all_tokens"),
    ],
)  # fmt: skip
def test_which_tokens_are_trained_and_in_what_form_rows_are_read(tmp_path, peer, text, form, trained):
    of = values(imported(tmp_path, text + "\n", peer=peer))
    (source, *_) = of("data.train")
    assert (source.path, source.format, source.train_on or of("data.train_on")) == ("d", form, trained)


@pytest.mark.parametrize(
    ("peer", "text", "packing"),
    [
        ("axolotl", "sample_packing: true", "first_fit"),
        ("axolotl", "sample_packing: false", "none"),
        ("trl", "packing: true", "best_fit"),
        ("llama-factory", "packing: true", "best_fit"),
        ("llama-factory", "stage: pt", "best_fit"),
        ("torchtune", "dataset: {packed: true}\ntokenizer: {max_seq_len: 64}", "greedy"),
        ("nemo", "packed_sequence: {packed_sequence_size: 0}", "none"),
        ("nemo", "packed_sequence: {packed_sequence_size: 64}", "best_fit"),
    ],
)
def test_rows_are_packed_where_they_are_there(tmp_path, peer, text, packing):
    assert values(imported(tmp_path, text + "\n", peer=peer))("data.packing") == packing


@pytest.mark.parametrize("order", ["path: json, data_files: x.jsonl", "data_files: x.jsonl, path: json"])
def test_the_file_is_read_and_not_the_name_of_its_kind(tmp_path, order):
    result = imported(tmp_path, f"datasets: [{{{order}, type: alpaca}}]\n", peer="axolotl")
    (source,) = values(result)("data.train")
    assert source.path == "x.jsonl"
    assert row_of(result, "datasets[0].path").outcome is Outcome.DROPPED
    alone = imported(tmp_path, "datasets: [{path: json, type: alpaca}]\n", peer="axolotl")
    assert row_of(alone, "datasets[0].path").outcome is Outcome.KEPT


@pytest.mark.parametrize(
    ("name", "batch", "accumulation", "decay", "optimizer", "warmup"),
    [("SFTConfig", 4, 2, 0.001, "adamw_8bit", 0.1), ("TrainingArguments", 8, 1, 0.0, "adamw", None)],
)
def test_unsloth_has_defaults_of_its_own_in_the_configs_that_it_replaces(
    tmp_path, name, batch, accumulation, decay, optimizer, warmup
):
    text = (
        "model, t = FastLanguageModel.from_pretrained('org/m')\nmodel = FastLanguageModel.get_peft_model(model, r=8)\n"
        f"SFTTrainer(model=model, args={name}(output_dir='o', learning_rate=1e-4))\n"
    )
    of = values(imported(tmp_path, text, "tune.py"))
    keys = ("batch_size", "gradient_accumulation_steps", "weight_decay", "optimizer", "warmup_ratio")
    assert [of(f"training.{key}") for key in keys] == [batch, accumulation, decay, optimizer, warmup]


def test_axolotls_layers_in_host_memory_are_weights_that_wait_there(tmp_path):
    lora = "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlayer_offloading: true\n"
    kept = imported(tmp_path, lora + "gradient_checkpointing: true\n", peer="axolotl")
    assert values(kept)("model.offload_weights") is True
    whole = imported(tmp_path, lora + "gradient_checkpointing: false\n", peer="axolotl")
    assert row_of(whole, "layer_offloading").outcome is Outcome.DROPPED  # and not: this trains something else


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("num_generations: 4", "grpo"),
        ("reward_funcs: [accuracy_reward]", "grpo"),
        ("loss_type: dr_grpo", "grpo"),
        ("loss_type: bnpo", "grpo"),
        ("desirable_weight: 1.5", "kto"),
        ("undesirable_weight: 1.5", "kto"),
        ("loss_type: apo_zero_unpaired", "kto"),
        ("loss_type: kto\nbeta: 0.2", "kto"),
        ("loss_type: sigmoid", "dpo"),
        ("loss_type: [ipo]", "dpo"),
        ("loss_type: [sigmoid, sft]", "dpo"),
        ("loss_type: robust", "dpo"),
        ("beta: 0.05", "dpo"),
        ("label_smoothing: 0.1", "dpo"),
        ("precompute_ref_log_probs: true", "dpo"),
        ("packing: false", "sft"),
        ("loss_type: nll", "sft"),
        ("loss_type: dft", "sft"),
        ("label_smoothing_factor: 0.0", "sft"),
    ],
)
def test_a_config_of_trl_without_its_command_is_of_the_method_that_alone_reads_its_keys(tmp_path, key, method):
    found = imported(tmp_path, f"model_name_or_path: m\ndataset_name: d\n{key}\n", peer="trl")
    assert values(found)("objective.method") == method


def test_two_data_sets_of_a_script_are_not_mixed_and_the_second_is_named(tmp_path):
    text = (
        "model, t = FastLanguageModel.from_pretrained('org/m')\nmodel = FastLanguageModel.get_peft_model(model, r=8)\n"
        "a = load_dataset('org/a')\nb = load_dataset('org/b', 'main', split='test')\na = load_dataset('org/a')\n"
        "SFTTrainer(model=model, train_dataset=a, eval_dataset=b)\n"
    )
    found = imported(tmp_path, text, "tune.py")
    assert values(found)("data.train") == (SourceConfig("org/a"),)
    for name in ("path", "name", "split"):
        assert row_of(found, f"load_dataset[1].{name}").outcome is Outcome.NEEDS


@pytest.mark.parametrize(
    ("peer", "text", "length", "overlong"),
    [
        ("trl", "seed: 1", 1024, "truncate_right"),
        ("axolotl", "seed: 1", 512, "drop"),
        ("axolotl", "sequence_len: 64\nexcess_length_strategy: truncate", 64, "truncate_right"),
        ("llama-factory", "cutoff_len: 64", 64, "truncate_right"),
        ("ms-swift", "max_length: 64", 64, "drop"),
        ("ms-swift", "lora_rank: 8", 2048, "error"),  # the model's own length there: no row is lost without a word
        ("torchtune", "tokenizer: {max_seq_len: 64}", 64, "truncate_right"),
        ("torchtune", "tokenizer: {max_seq_len: null}", 2048, "error"),
        ("litgpt", "train: {max_seq_length: 64}", 64, "truncate_right"),
        ("litgpt", "lora_r: 8", 2048, "error"),
        ("oumi", "training: {seed: 1}", 2048, "error"),
        ("nemo", "seed: 1", 2048, "error"),
    ],
)
def test_long_rows_are_cut_or_left_out_as_there(tmp_path, peer, text, length, overlong):
    of = values(imported(tmp_path, text + "\n", peer=peer))
    assert (of("data.max_length"), of("data.overlong")) == (length, overlong)


# --- comparing answers


def test_trl_switches_dropout_off_where_answers_are_compared(tmp_path):
    """DPOTrainer and its like set every dropout to 0, the adapter's too, unless `disable_dropout` is false."""
    command = "trl {} --model_name_or_path m --dataset_name d --use_peft --lora_dropout 0.2"
    dpo = imported(tmp_path, command.format("dpo"), "run.sh")
    assert values(dpo)("adapter.dropout") == 0.0
    assert row_of(dpo, "lora_dropout").outcome is Outcome.IGNORED
    kept = imported(tmp_path, command.format("dpo") + " --disable_dropout false", "run.sh")
    assert values(kept)("adapter.dropout") == 0.2
    for method in ("sft", "grpo"):
        assert values(imported(tmp_path, command.format(method), "run.sh"))("adapter.dropout") == 0.2


@pytest.mark.parametrize(
    ("peer", "name", "text", "beta", "gamma"),
    [
        ("llama-factory", "c.yaml", "stage: dpo\npref_loss: simpo", 0.1, 5.0),  # 0.5 / 0.1
        ("llama-factory", "c.yaml", "stage: dpo\npref_loss: simpo\npref_beta: 2.0\nsimpo_gamma: 1.0", 2.0, 0.5),
        ("ms-swift", "c.sh", "swift rlhf --rlhf_type simpo --model m --cpo_alpha 0", 2.0, 0.5),  # 1 / 2
        ("ms-swift", "c.sh", "swift rlhf --rlhf_type simpo --model m --cpo_alpha 0 --simpo_gamma 0.4", 2.0, 0.2),
        (
            "trl",
            "c.sh",
            "python examples/scripts/cpo.py --loss_type simpo --model_name_or_path m --cpo_alpha 0 --beta 1.0",
            1.0,
            0.5,
        ),
        ("axolotl", "c.yaml", "rl: simpo\nrl_beta: 0.1\nsimpo_gamma: 0.5\ncpo_alpha: 0", 0.1, 5.0),
        ("soup", "c.yaml", "task: simpo\ntraining: {simpo_gamma: 0.5}", 0.1, 5.0),
    ],
)
def test_the_margin_of_simpo_is_a_part_of_beta(tmp_path, peer, name, text, beta, gamma):
    of = values(imported(tmp_path, text + "\n", name, peer))
    assert of("objective.method") == "simpo"
    assert (of("objective.beta"), of("objective.gamma_beta_ratio")) == (beta, pytest.approx(gamma))


@pytest.mark.parametrize(
    ("peer", "name", "text"),
    [
        ("trl", "c.sh", "python examples/scripts/cpo.py --loss_type simpo --model_name_or_path m"),
        ("ms-swift", "c.sh", "swift rlhf --rlhf_type simpo --model m"),
        ("axolotl", "c.yaml", "rl: simpo"),
    ],
)
def test_the_loss_of_chosen_answers_that_trl_adds_to_simpo_is_said(tmp_path, peer, name, text):
    result = imported(tmp_path, text + "\n", name, peer)
    assert not result.is_whole
    assert any("sft_weight" in said for said in result.rejected)


@pytest.mark.parametrize(
    ("peer", "name", "text", "method", "form"),
    [
        ("llama-factory", "c.yaml", "stage: rm\ndataset: d", "reward", "preference"),
        ("llama-factory", "c.yaml", "stage: kto\ndataset: d", "kto", "unpaired"),
        ("ms-swift", "c.sh", "swift rlhf --rlhf_type rm --model m --dataset d", "reward", "preference"),
        ("ms-swift", "c.sh", "swift rlhf --model m --dataset d", "dpo", "preference"),
        ("ms-swift", "c.sh", "swift sft --task_type seq_cls --model m --dataset d", "classification", None),
        ("trl", "c.sh", "trl reward --model_name_or_path m --dataset_name d", "reward", "preference"),
        ("trl", "c.sh", "trl kto --model_name_or_path m --dataset_name d", "kto", "unpaired"),
        ("axolotl", "c.yaml", "rl: grpo\ndatasets: [{path: d, type: chat_template}]", "grpo", "prompt"),
        ("oumi", "c.yaml", "training: {trainer_type: TRL_GRPO}\ndata: {train: {datasets: [{dataset_name: d}]}}", "grpo",
         "prompt"),
        ("soup", "c.yaml", "task: grpo\ndata: {train: rows.jsonl, format: auto}", "grpo", "prompt"),
    ],
)  # fmt: skip
def test_methods_that_learn_from_other_rows_read_them(tmp_path, peer, name, text, method, form):
    result = imported(tmp_path, text + "\n", name, peer)
    of = values(result)
    assert of("objective.method") == method
    assert of("data.train")[0].format == (form or {"grpo": "prompt"}.get(method, method))


def test_a_second_model_is_the_reference_unless_it_is_the_same(tmp_path):
    text = "model_name_or_path: org/m\nstage: dpo\nfinetuning_type: full\nref_model: org/{}\n"
    of = values(imported(tmp_path, text.format("other")))
    assert (of("objective.reference"), of("objective.reference_model")) == ("model", "org/other")
    same = imported(tmp_path, text.format("m"))
    assert row_of(same, "ref_model").outcome is Outcome.DROPPED
    assert values(same)("objective.reference_model") is None


# --- adapters, trackers, devices


def test_ranks_and_scales_of_single_layers(tmp_path):
    of = values(imported(tmp_path, "adapter: lora\nlora_rank_pattern: {down_proj: 4, up_proj: 8}\n", peer="axolotl"))
    assert of("adapter.rank_pattern") == {"down_proj": 4, "up_proj": 8}


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "pissa_niter_16"])
def test_first_values_from_the_base(tmp_path, init):
    text = f"adapter: lora\nload_in_4bit: true\npeft_init_lora_weights: {init}\n"
    assert values(imported(tmp_path, text, peer="axolotl"))("adapter.init") == init


def test_trackers_are_kept_and_those_that_are_missing_change_nothing_that_is_trained(tmp_path):
    text = "swift sft --model m --dataset d --report_to wandb swanlab mlflow\n"
    result = imported(tmp_path, text, "run.sh")
    assert values(result)("tracking.trackers") == ("console", "jsonl", "wandb", "mlflow")
    row = row_of(result, "report_to")
    assert row.text == "swanlab is no tracker here; nothing that is trained changes"
    assert result.is_whole


def test_how_weights_are_divided_gives_way_to_what_is_trained(tmp_path):
    """DeepSpeed's parts do not hold a reference here: the import keeps dpo, and leaves the parts out."""
    result = imported(tmp_path, "swift rlhf --rlhf_type dpo --model m --dataset d --deepspeed zero3\n", "run.sh")
    of = values(result)
    assert (of("objective.method"), of("distributed.zero_stage")) == ("dpo", None)
    assert row_of(result, "deepspeed").outcome is Outcome.DROPPED
    assert result.is_whole


def test_what_is_said_of_rows_that_no_key_names_is_asked_for(tmp_path):
    result = imported(tmp_path, "model_name_or_path: m\ndataset_train_split: train\nuse_peft: true\n", peer="trl")
    row = row_of(result, "dataset_train_split")
    assert (row.outcome, row.ours) == (Outcome.NEEDS, ())


# --- every value counts

PAIRS = (("1", "2"), ("true", "false"), (["aa", "bb"], ["aa", "cc"]), ("a word " * 50 + "b", "a word " * 50 + "c"))
"""Values that differ as little as two values can: in the last item of a list, at the end of a long text."""


def said_of(peer, key, value):
    origin = Origin("file", "f.yaml:1")
    table = Table((Entry(key, from_python(value, origin), origin),), origin)
    result = import_source(Source("f.yaml", table, "config", "f.yaml"), peer)
    return "\n".join([*report_lines(result, 100), result.yaml])


def keys_of_tables(only_one_of_a_rule):
    seen = set()
    for peer in peer_names():
        tables = [own_table(peer), *([peer_of(peer)] if peer == "trl" else [])]
        for row in [row for table in tables for row in (*table.rows.values(), *(row for _, row in table.patterns))]:
            if (peer, row.rule) in seen and only_one_of_a_rule:
                continue
            seen.add((peer, row.rule))
            yield peer, row.key.replace("[]", "[0]").replace("*", "x")


def assert_every_value_counts(keys):
    for peer, key in keys:
        for one, other in PAIRS:
            said = said_of(peer, key, one)
            assert said != said_of(peer, key, other) or "(not shown)" in said, (peer, key, one)


def test_a_changed_value_changes_the_report_for_each_rule_of_each_table():
    keys = list(keys_of_tables(only_one_of_a_rule=True))
    assert len(keys) > 100
    assert_every_value_counts(keys)


@pytest.mark.campaign
def test_a_changed_value_changes_the_report_for_every_key_of_every_table():
    keys = list(keys_of_tables(only_one_of_a_rule=False))
    assert len(keys) > 2000
    assert_every_value_counts(keys)
