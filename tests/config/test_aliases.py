"""Other toolkits' names are read, each with one line that says ours; no row of the tables is dead."""

from __future__ import annotations

import re

import pytest

from llmtune.config import aliases
from llmtune.config.keys import LEAVES, SECTIONS
from llmtune.config.layers import parse_config
from llmtune.config.schema import SourceConfig
from llmtune.errors import ConfigError


def value_of(resolved, key):
    value = resolved.config
    for name in key.split("."):
        value = getattr(value, name)
    return value


# text -> {our key: the value it must have}
READ = {
    "num_train_epochs: 2": {"training.epochs": 2.0},
    "num_epochs: 2": {"training.epochs": 2.0},
    "per_device_train_batch_size: 2": {"training.batch_size": 2},
    "train_batch_size: 2": {"training.batch_size": 2},
    "batch_size: 2": {"training.batch_size": 2},
    "default_system: Be brief.": {"data.system": "Be brief."},
    "system_prompt: Be brief.": {"data.system": "Be brief."},
    "enable_thinking: false": {"data.template_args": {"enable_thinking": False}},
    "stage: pt": {"objective.method": "sft", "data.format": "text"},
    "chat_template_kwargs: {enable_thinking: false}": {"data.template_args": {"enable_thinking": False}},
    "max_seq_length: 512": {"data.max_length": 512},
    "max_seq_len: 512": {"data.max_length": 512},
    "max_length: 512": {"data.max_length": 512},
    "lr_scheduler_type: cosine": {"training.lr_schedule": "cosine"},
    "lr_scheduler: cosine": {"training.lr_schedule": "cosine"},
    "save_steps: 10": {"checkpoint.every_steps": 10},
    "save_every: 10": {"checkpoint.every_steps": 10},
    "eval_steps: 10\ndata: {test_size: 5}": {"evaluation.every_steps": 10},
    "eval_every: 10\ndata: {test_size: 5}": {"evaluation.every_steps": 10},
    "save_total_limit: 2": {"checkpoint.keep_last": 2},
    "log_path: out": {"run.output_dir": "out"},
    "bf16: true": {"training.precision": "bf16"},
    "fp16: true": {"training.precision": "fp16"},
    "bf16: false\nfp16: true": {"training.precision": "fp16"},
    "fp16: true\nbf16: false": {"training.precision": "fp16"},
    "bf16: false\nfp16: false": {"training.precision": "fp32"},
    "use_amp: true\namp_dtype: float16": {"training.precision": "fp16"},
    "amp_dtype: bfloat16": {"training.precision": "bf16"},
    "use_amp: false": {"training.precision": "fp32"},
    "lora_rank: 8": {"adapter.r": 8, "adapter.method": "lora"},
    "lora_target: all": {"adapter.target_modules": "all-linear", "adapter.method": "lora"},
    "lora_target: q_proj,v_proj": {"adapter.target_modules": ("q_proj", "v_proj")},
    "lora_target: 'q_proj, k_proj , v_proj'": {"adapter.target_modules": ("q_proj", "k_proj", "v_proj")},
    "lora_target_linear: true\nlora_r: 8\nlora_alpha: 8": {"adapter.target_modules": "all-linear", "adapter.r": 8},
    "adapter: lora\nlora_target_linear: false": {"adapter.method": "lora"},
    "adapter: lora\nadditional_target: embed_tokens,lm_head": {"adapter.modules_to_save": ("embed_tokens", "lm_head")},
    "adapter: {method: lora, target_modules: all}": {"adapter.target_modules": "all-linear"},
    "special_tokens: {pad_token: <pad>, eos_token: </s>}": {"model.pad_token": "<pad>", "model.eos_token": "</s>"},
    "adapter_name_or_path: runs/x": {"adapter.start_from": "runs/x", "adapter.method": "lora"},
    "adapter: {method: lora, path: runs/x}": {"adapter.start_from": "runs/x"},
    "max_steps: -1": {"training.max_steps": None},
    "training: {max_steps: -1}": {"training.max_steps": None},
    "max_grad_norm: 0": {"training.max_grad_norm": None},
    "gradient_clipping: 0.0": {"training.max_grad_norm": None},
    "neftune_noise_alpha: 0": {"training.neftune_alpha": None},
    "max_samples: -1": {"data.max_samples": None},
    "save_total_limit: null": {"checkpoint.keep_last": 0},
    "save_total_limit:": {"checkpoint.keep_last": 0},
    "eval_steps: 0.1\nsave_steps: 0.2\nval_set_size: 5": {"evaluation.every_steps": 0.1, "checkpoint.every_steps": 0.2},
    "warmup_steps: 0.1": {"training.warmup_ratio": 0.1},
    "warmup_steps: 10": {"training.warmup_steps": 10},
    "bf16: auto": {"training.precision": "auto"},
    "bf16: auto\nfp16: false": {"training.precision": "auto"},
    "fp16: false\nbf16: auto": {"training.precision": "auto"},
    "bf16: full": {"training.precision": "bf16", "model.dtype": "bfloat16"},
    'eval_strategy: "no"': {"evaluation.every_steps": None},
    "eval_strategy: epoch\nval_size: 5": {"evaluation.every_epochs": 1.0},
    "eval_strategy: steps\neval_steps: 5\nval_size: 5": {"evaluation.every_steps": 5},
    "evals_per_epoch: 4\nval_set_size: 0.1": {"evaluation.every_epochs": 0.25},
    "saves_per_epoch: 2": {"checkpoint.every_epochs": 0.5},
    "saves_per_epoch: 0": {"checkpoint.every_epochs": None},
    "save_strategy: epoch": {"checkpoint.every_epochs": 1.0},
    'save_strategy: "no"': {"checkpoint.every_steps": 1_000_000_000},
    "save_strategy: best": {"checkpoint.every_steps": 1_000_000_000, "checkpoint.keep_best": True},
    "optim: adafactor": {"training.optimizer": "adafactor"},
    "optim: adamw_torch_8bit": {"training.optimizer": "adamw_8bit"},
    "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 3}": {
        "training.lr_schedule": "cosine_with_restarts",
        "training.num_cycles": 3,
    },
    "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}": {
        "training.lr_schedule": "cosine",
        "training.min_lr_ratio": 0.1,
    },
    "lr_scheduler_type: warmup_stable_decay": {"training.lr_schedule": "wsd"},
    "load_best_model_at_end: true\nval_size: 5": {"checkpoint.final": "best"},
    "load_best_model_at_end: false": {"checkpoint.final": "last"},
    "metric_for_best_model: eval_loss": {"evaluation.best_by": "eval_mean_nll"},
    "metric_for_best_model: perplexity": {"evaluation.best_by": "eval_perplexity"},
    "train_on_prompt: true": {"data.train_on": "all_tokens"},
    "completion_only_loss: true": {"data.train_on": "all_assistant_messages"},
    "mask_history: true": {"data.train_on": "last_assistant_turn"},
    "auto_find_batch_size: true": {"training.batch_size": "auto"},
    "report_to: tensorboard,wandb": {"tracking.trackers": ("console", "jsonl", "system", "tensorboard", "wandb")},
    "lora_r: 8\nlora_alpha: 16\nlora_dropout: 0.05": {
        "adapter.r": 8,
        "adapter.alpha": 16.0,
        "adapter.dropout": 0.05,
        "adapter.method": "lora",
    },
    "use_lora: true": {"adapter.method": "lora"},
    "use_lora: false": {"adapter.method": "none"},
    "use_lora: true\nload_in_4bit: true": {"model.quantization": "4bit", "adapter.method": "lora"},
    "use_lora: true\nload_in_8bit: True": {"model.quantization": "8bit"},
    "load_in_4bit: false\nload_in_8bit: false": {"model.quantization": "none"},
    "load_in_4bit: true\nload_in_8bit: false\nadapter: lora": {"model.quantization": "4bit", "adapter.method": "lora"},
    "adapter: qlora": {"model.quantization": "4bit", "adapter.method": "lora"},
    "adapter: dora": {"adapter.dora": True, "adapter.method": "lora"},
    "adapter.method: qlora": {"model.quantization": "4bit", "adapter.method": "lora"},
    "adapter.method: DoRA": {"adapter.dora": True, "adapter.method": "lora"},
    "adapter.method: full": {"adapter.method": "none"},
    "model: {quantization: nf4}\nadapter: lora": {"model.quantization": "4bit"},
    "model: {quantization: 4}\nadapter: lora": {"model.quantization": "4bit"},
    "model: {quantization: int8}\nadapter: lora": {"model.quantization": "8bit"},
    "model: {quantization: false}": {"model.quantization": "none"},
    "finetuning_type: full": {"adapter.method": "none"},
    "report_to: wandb": {"tracking.trackers": ("console", "jsonl", "system", "wandb")},
    "report_to: [tensorboard, wandb]": {"tracking.trackers": ("console", "jsonl", "system", "tensorboard", "wandb")},
    "report_to: none": {"tracking.trackers": ("console", "jsonl", "system")},
    "report_to: []": {"tracking.trackers": ("console", "jsonl", "system")},
    "use_wandb: true\nwandb_project: p\nwandb_name: n": {
        "tracking.trackers": ("console", "jsonl", "system", "tensorboard", "wandb"),
        "tracking.project": "p",
        "run.name": "n",
    },
    "packing: true": {"data.packing": "best_fit"},
    "sample_packing: true": {"data.packing": "best_fit"},
    "data: {packing: true}": {"data.packing": "best_fit"},
    "pack_sequences: true\npacking_strategy: first_fit": {"data.packing": "first_fit"},
    "pack_sequences: true": {"data.packing": "greedy"},
    "train_on_what: all_tokens": {"data.train_on": "all_tokens"},
    "train_on_inputs: true": {"data.train_on": "all_tokens"},
    "optim: adamw_torch_fused": {"training.optimizer": "adamw"},
    "optim: paged_adamw_8bit": {"training.optimizer": "paged_adamw_8bit"},
    "adam_beta2: 0.95": {"training.betas": (0.9, 0.95)},
    "adam_beta1: 0.8\nadam_beta2: 0.95": {"training.betas": (0.8, 0.95)},
    "torch_dtype: bf16": {"model.dtype": "bfloat16"},
    "attn_implementation: flash_attention_2": {"model.attention": "flash"},
    "flash_attention: true": {"model.attention": "flash"},
    "model_name_or_path: gpt2": {"model.name": "gpt2"},
    "base_model: gpt2": {"model.name": "gpt2"},
    "model: gpt2": {"model.name": "gpt2"},
    "data: rows.jsonl": {"data.train": (SourceConfig("rows.jsonl"),)},
    "data: [a.jsonl, b.jsonl]": {"data.train": (SourceConfig("a.jsonl"), SourceConfig("b.jsonl"))},
    "datasets:\n  - path: a.jsonl\n    split: train": {"data.train": (SourceConfig("a.jsonl", split="train"),)},
    "train_file: a.jsonl\neval_file: b.jsonl": {
        "data.train": (SourceConfig("a.jsonl"),),
        "data.eval": (SourceConfig("b.jsonl"),),
    },
    "dataset_name: wikitext\ndataset_config: raw\ndataset_split: train": {
        "data.train": (SourceConfig("wikitext", "raw", "train"),)
    },
    "gradient_checkpointing: true": {"model.gradient_checkpointing": True},
    "gradient_checkpointing: offload": {"model.gradient_checkpointing": "offload"},
    "use_gradient_checkpointing: unsloth": {"model.gradient_checkpointing": "offload"},
    "enable_activation_checkpointing: true\nenable_activation_offloading: true": {
        "model.gradient_checkpointing": "offload"
    },
    "activation_offloading: true\ngradient_checkpointing: true": {"model.gradient_checkpointing": "offload"},
    "enable_activation_offloading: false\nenable_activation_checkpointing: true": {
        "model.gradient_checkpointing": True
    },
    "lora_config: {r: 4, lora_alpha: 8, bias: none, task_type: CAUSAL_LM}": {
        "adapter.r": 4,
        "adapter.alpha": 8.0,
        "adapter.method": "lora",
    },
    "peft: {rank: 4, target_modules: [q_proj]}": {
        "adapter.r": 4,
        "adapter.target_modules": ("q_proj",),
        "adapter.method": "lora",
    },
    "training_args: {num_train_epochs: 1, bf16: true, output_dir: o}": {
        "training.epochs": 1.0,
        "training.precision": "bf16",
        "run.output_dir": "o",
    },
    "training: {num_train_epochs: 1, bf16: true}": {"training.epochs": 1.0, "training.precision": "bf16"},
    "adapter: {lora_r: 4, lora_alpha: 8}": {"adapter.r": 4, "adapter.method": "lora"},
    "optimizer: {lr: 1e-4, weight_decay: 0.1}": {"training.learning_rate": 1e-4, "training.weight_decay": 0.1},
    "optimizer: {early_step_in_backward: true}\nmax_grad_norm: null": {
        "training.step_in_backward": True,
        "training.max_grad_norm": None,
    },
    "optimizer: adamw": {"training.optimizer": "adamw"},
    "model_config: {d_model: 64, n_heads: 4}": {"model.architecture.d_model": 64, "model.architecture.n_heads": 4},
    "use_deepspeed: true\ndeepspeed_config: ds.json": {
        "distributed.strategy": "deepspeed",
        "distributed.deepspeed_config": "ds.json",
    },
    "logging_steps: 10": {"tracking.every_steps": 10},
    "seed: 7": {"run.seed": 7},
    "neftune_noise_alpha: 5": {"training.neftune_alpha": 5.0},
    "val_set_size: 0.1": {"data.test_size": 0.1},
    "training: {precision: bfloat16}": {"training.precision": "bf16"},
    "model: {dtype: bf16}": {"model.dtype": "bfloat16"},
}


@pytest.mark.parametrize("text", READ)
def test_another_toolkits_name_is_read_with_a_line_that_says_ours(text):
    resolved = parse_config(text, "their.yaml")
    assert {key: value_of(resolved, key) for key in READ[text]} == READ[text]
    told = " ".join(resolved.notes)
    for key in READ[text]:
        if resolved.origins[key].kind != "default" and f"{key.split('.')[0]}: {{{key.split('.')[1]}" not in text:
            assert key in told or "here" in told
    assert all(
        (note.startswith("their.yaml:") and note.endswith(" here")) or "anyway" in note for note in resolved.notes
    )
    assert resolved.notes


UNUSED = {
    "tf32: true": "training.precision",
    "logging_first_step: true": "tracking.every_steps",
    "group_by_length: true": "without padding",
    "dataloader_num_workers: 4": "data.num_workers",
    "overwrite_output_dir: true": "a folder of its own",
    "gradient_checkpointing_kwargs: {use_reentrant: false}": "without re-entry",
    "training_args: {disable_tqdm: true}": "nothing that is trained",
    "pad_to_sequence_len: true": "without padding",
}


@pytest.mark.parametrize("text", UNUSED)
def test_a_name_that_changes_nothing_is_named_with_its_reason_and_not_used(text):
    resolved = parse_config(text, "their.yaml")
    (note,) = resolved.notes
    assert note.startswith("their.yaml:1: `")
    assert "is not used here: " in note
    assert UNUSED[text] in note
    assert resolved.config == parse_config("").config


REFUSED = {
    "checkpoint_dir: checkpoints/meta/Llama": "`model.name: DIR`",
    "bos_token: <s>": "model.tokenizer",
    "special_tokens: {bos_token: <s>}": "model.pad_token",
    "lr_scheduler_kwargs: {min_lr: 1e-6}": "training.min_lr_ratio",
    "response_template: '### Answer'": "data.train_on",
    "template: qwen": "model.chat_template",
    "fsdp: full_shard": "llmtune train --devices N",
    "dataloader_drop_last: true": "`false`",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_refusal_names_the_nearest_thing_that_works(text):
    with pytest.raises(ConfigError) as error:
        parse_config(text)
    (problem,) = error.value.problems
    assert REFUSED[text] in f"{problem.problem} {problem.fix}"
    assert "secret" not in problem.problem


@pytest.mark.parametrize(
    ("text", "alpha"),
    [("lora_rank: 8", True), ("lora_r: 8\nlora_alpha: 16", False), ("adapter: {method: lora, r: 8}", False)],
)
def test_a_rank_without_its_scale_is_said(text, alpha):
    """Other toolkits take twice the rank, or 16, where nothing is given; here it is 32."""
    told = [note for note in parse_config(text).notes if "alone keeps `adapter.alpha: 32`" in note]
    assert bool(told) is alpha
    assert all("updates count 4 times" in note and "`adapter.alpha: 16`" in note for note in told)


OUT_OF_RANGE = [
    ("training.warmup_steps", "0.1"),
    ("training.max_steps", "0"),
    ("training.max_steps", "-5"),
    ("training.max_grad_norm", "-1"),
    ("checkpoint.keep_last", "-2"),
    ("training.batch_size", "0"),
    ("evaluation.every_steps", "0"),
    ("checkpoint.every_steps", "1.5"),
    ("adapter.dropout", "1"),
    ("data.max_length", "1"),
    ("evaluation.best_by", "loss"),
    ("training.warmup_ratio", "3"),
    ("run.seed", "-1"),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_a_line_that_works(key, value):
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError) as error:
        parse_config(f"{section}: {{{name}: {value}}}")
    fixes = [problem.fix for problem in error.value.problems if f"`{key}`" in problem.problem]
    assert fixes
    assert all(fix is not None for fix in fixes)
    for setting in re.findall(r"`([\w.]+: [^`]+)`", fixes[0]):
        fixed, _, written = setting.partition(": ")
        inner, _, leaf = fixed.partition(".")
        parse_config(f"use_lora: true\n{inner}: {{{leaf}: {written}}}")


def test_our_own_names_say_nothing():
    assert parse_config("training: {epochs: 1, precision: bf16}\n").notes == ()


def test_every_other_name_stands_for_a_key_we_have():
    assert set(aliases.NAMES.values()) <= set(LEAVES)
    assert len(aliases.NAMES) > 150


def test_no_other_name_hides_one_of_our_keys_or_sections():
    ours = {*LEAVES, *SECTIONS} - set(aliases.SECTION_VALUES)
    assert not ours & {*aliases.NAMES, *aliases.TRANSLATED}


@pytest.mark.parametrize("name", [name for name in aliases.NAMES if "." not in name])
def test_every_plain_name_reaches_its_key(name):
    """A row that nothing could reach, or whose value another row takes, would be dead."""
    target = aliases.NAMES[name]
    given = SAMPLES.get(target, SAMPLES_BY_TYPE.get(LEAVES[target], "1"))
    try:
        resolved = parse_config(f"{name}: {given}\n{EXTRA.get(target, '')}")
    except ConfigError as error:
        raise AssertionError(str(error)) from error
    assert str(resolved.origins[target]) == "config.yaml:1"


SAMPLES_BY_TYPE = {str: "word", str | None: "word", bool: "true"}
SAMPLES = {
    "data.template_args": "{a: 1}",
    "adapter.rank_pattern": "{q_proj: 2}",
    "adapter.alpha_pattern": "{q_proj: 2}",
    "objective.beta": "0.2",
    "objective.label_smoothing": "0.2",
    "objective.num_generations": "4",
    "objective.clip": "0.1",
    "objective.clip_high": "0.1",
    "data.format": "text",
    "data.packing": "greedy",
    "data.train_on": "all_tokens",
    "training.lr_schedule": "cosine",
    "training.compile": "true",
    "training.betas": "[0.9, 0.99]",
    "training.min_lr_ratio": "0.1",
    "data.max_length": "64",
    "data.train": "word",
    "model.gradient_checkpointing": "true",
    "adapter.dropout": "0.1",
    "adapter.target_modules": "q_proj",
    "tracking.wandb_mode": "offline",
    "tracking.watch": "all",
}
EXTRA = {
    "objective.beta": "objective: {method: dpo}\n",
    "objective.label_smoothing": "objective: {method: dpo}\n",
    "objective.desirable_weight": "objective: {method: kto}\n",
    "objective.undesirable_weight": "objective: {method: kto}\n",
    **dict.fromkeys(
        [f"objective.{key}" for key in ("num_generations", "max_new_tokens", "clip", "clip_high", "mask_truncated")],
        "objective: {method: grpo}\n",
    ),
    "training.loraplus_lr_ratio": "adapter: {method: lora}\n",
    "evaluation.every_steps": "evaluation: {prompts: [a]}\n",
    "evaluation.every_epochs": "evaluation: {prompts: [a]}\n",
    "evaluation.early_stopping_patience": "evaluation: {every_steps: 1}\ndata: {test_size: 1}\n",
    "evaluation.early_stopping_threshold": "evaluation: {every_steps: 1, early_stopping_patience: 1}\ndata: {test_size: 1}\n",  # noqa: E501
    "tracking.wandb_mode": "tracking: {trackers: [wandb]}\n",
    "tracking.wandb_entity": "tracking: {trackers: [wandb]}\n",
    "tracking.wandb_group": "tracking: {trackers: [wandb]}\n",
    "training.step_in_backward": "training: {max_grad_norm: null}\n",
}


def test_remote_code_is_no_other_name_for_anything():
    assert not [name for name in (*aliases.NAMES, *aliases.TRANSLATED) if "remote_code" in name]


@pytest.mark.parametrize("value", ["false", "null", "0", "''", "[]", "no"])
@pytest.mark.parametrize(
    "name", ["push_to_hub", "trust_remote_code", "resume_from_checkpoint", "do_predict", "use_cpu"]
)
def test_a_switch_that_is_not_here_may_be_off(name, value):
    (note,) = parse_config(f"{name}: {value}").notes
    assert note.endswith("asks for what happens here anyway")


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("adapter: {method: lora, init: eva}", "activations for eva", "`adapter.init: pissa`"),
        ("adapter: {method: lora, init: pissa_niter_7}", "4 or 16 iterations", "`adapter.init: pissa_niter_16`"),
        ("data: {test_size: 2}\nevaluation: {score: mine.py:judge}", "a file with code", "--score FILE.py:FUNCTION"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "before the first step", "early_stopping_patience"),
        ("finetuning_type: freeze", "without an adapter", "`model.train_only`"),
        ("layers_to_transform: [0, 1]", "from the end", "`adapter.layers: 4`"),
        ("roles_to_train: [assistant]", "by a rule", "`data.train_on: all_messages`"),
        ("add_tokens: <a>,<b>", "in full tuning too", "adapter.train_tokens"),
        ("interleave_probs: 0.5,0.5", "at its sources", "`share`"),
        ("train_on_eos: all", "must be `turn`", "write `turn`, or take it out"),
        ("report_to: comet_ml", "must be one of", "the default is `tracking.trackers:"),
        ("data: {path: a.jsonl}", "unknown key", "write `data.train`"),
        ("resize_everything: true", "unknown key", "`llmtune config schema`"),
    ],
)
def test_what_is_not_here_is_refused_with_the_nearest_thing_that_works(text, problem, fix):
    with pytest.raises(ConfigError) as refused:
        parse_config(text)
    (row,) = refused.value.problems
    assert problem in row.problem
    assert fix in row.fix


@pytest.mark.parametrize(
    ("entry", "fix"),
    [
        ("{path: a.jsonl, type: chat_template}", "set `format`"),
        ("{file: a.jsonl}", "write it as `path`"),
        ("{path: a.jsonl, field_messages: turns}", "say it in `columns`"),
        ("{path: a.jsonl, ds_type: json}", "take it out"),
        ("{path: a.jsonl, repeet: 3}", "did you mean `repeat`?"),
    ],
)
def test_keys_that_sources_have_elsewhere_are_refused_with_their_form_here(entry, fix):
    with pytest.raises(ConfigError) as refused:
        parse_config(f"data: {{train: [{entry}]}}")
    assert any(fix in row.fix for row in refused.value.problems)


@pytest.mark.parametrize("name", ["tokenizer_default", "default"])
def test_the_usual_words_for_the_tokenizer_s_own_template_name_no_other(name):
    assert value_of(parse_config(f"chat_template: {name}"), "model.chat_template") is None
