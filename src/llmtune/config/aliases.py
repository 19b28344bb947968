"""Other toolkits' names for our keys: tables, each name accepted with one line that says the name used here.

`NAMES` holds names with the same value, `TRANSLATED` names whose values are written otherwise here, `NOT_HERE` names
that are refused, and why. A name with a dot is a key in a section of that name. The keys of `FLAT_SECTIONS` are read as
if they were written at the top of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from llmtune.config.document import Listing, Node, Scalar
from llmtune.config.keys import LEAVES, SECTIONS
from llmtune.config.schema import TrainOn
from llmtune.config.translation import Change, Rule, Translation, nodes_of

__all__ = [
    "NAMES",
    "NOT_HERE",
    "SECTION_VALUES",
    "TRANSLATED",
    "VALUES",
    "other_names",
    "section_prefix",
    "translation_of",
]


def translation_of(key: str) -> Translation | None:
    """Return the translation of another toolkit's key, by its whole name or by its last part inside the right section.

    None where no table has it.
    """
    section, _, leaf = key.rpartition(".")
    names = [key, key.lower()]
    if section in FLAT_SECTIONS or (section in SECTIONS and _KEYS.get(leaf, "").startswith(f"{section}.")):
        names.append(leaf)
    for name in names:
        if name in TRANSLATED:
            return TRANSLATED[name]
        if name in NAMES:
            return Rule(NAMES[name])
    return None


def section_prefix(key: str) -> str | None:
    """The prefix under which the content of another toolkit's section is read, or None where it is not one."""
    if key in FLAT_SECTIONS:
        return ""
    return key if any(name.startswith(f"{key}.") for name in (*NAMES, *TRANSLATED)) else None


def other_names(key: str) -> list[str]:
    """Return every other name of one of our keys, in the order of the tables; other toolkits' sections are left out."""
    return [name for name, target in _KEYS.items() if target == key]


# --- names with the same value

FLAT_SECTIONS = (
    *("training_args", "training_arguments", "trainer", "train", "sft", "sft_config", "common_config"),
    *("quantization_config", "bnb_config", "bitsandbytes"),
)
LORA_SECTIONS = ("lora", "lora_config", "peft", "peft_config", "adapter_config")

_NAMES_OF = {
    "run.output_dir": "output_dir log_path checkpoint_dir",
    "run.name": "run_name wandb_name wandb_run_name experiment_name",
    "run.seed": "seed random_seed",
    "model.name": "model_name model_name_or_path pretrained_model_name_or_path base_model model_id model_path",
    "model.revision": "model_revision revision_of_model",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_config",
    "model.chat_template": "chat_template chat_template_path chat_template_jinja",
    "model.gradient_checkpointing": (
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing use_gradient_checkpointing"
    ),
    "adapter.r": "lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.target_modules": "lora_target lora_target_modules target_modules",
    "adapter.modules_to_save": "modules_to_save lora_modules_to_save additional_target",
    "adapter.rslora": "use_rslora peft_use_rslora",
    "adapter.dora": "use_dora peft_use_dora",
    "data.train": (
        "train_file train_files train_data train_dataset file_path data_path dataset datasets dataset_name dataset_path"
    ),
    "data.eval": "eval_file eval_files eval_data eval_dataset validation_file test_datasets",
    "data.format": "dataset_format",
    "data.text_column": "dataset_text_field text_column text_field",
    "data.test_size": "val_set_size val_size test_size",
    "data.shuffle_seed": "shuffle_seed data_seed",
    "data.max_length": "max_length max_seq_length max_seq_len sequence_len model_max_length block_size cutoff_len",
    "data.min_length": "min_length",
    "data.max_samples": "max_samples max_train_samples",
    "data.packing": "packing_strategy",
    "data.num_workers": "preprocessing_num_workers dataset_num_proc dataset_processes",
    "data.cache_dir": "dataset_prepared_path",
    "training.epochs": "epochs num_epochs num_train_epochs",
    "training.max_steps": "max_steps max_train_steps",
    "training.batch_size": "batch_size per_device_train_batch_size train_batch_size micro_batch_size",
    "training.gradient_accumulation_steps": "gradient_accumulation_steps grad_accum_steps",
    "training.learning_rate": "learning_rate lr",
    "training.weight_decay": "weight_decay",
    "training.eps": "adam_epsilon",
    "training.lr_schedule": "lr_schedule lr_scheduler lr_scheduler_type",
    "training.warmup_steps": "warmup_steps num_warmup_steps",
    "training.warmup_ratio": "warmup_ratio",
    "training.min_lr_ratio": "min_lr_ratio cosine_min_lr_ratio",
    "training.max_grad_norm": "max_grad_norm gradient_clipping clip_grad_norm gradient_clip_val",
    "training.compile": "torch_compile compile",
    "training.neftune_alpha": "neftune_noise_alpha",
    "training.step_in_backward": "optimizer_in_bwd",
    "evaluation.every_steps": "eval_every eval_steps",
    "evaluation.before_training": "eval_on_start",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size",
    "evaluation.early_stopping_patience": "early_stopping_patience",
    "evaluation.early_stopping_threshold": "early_stopping_threshold",
    "checkpoint.every_steps": "save_every save_steps",
    "checkpoint.keep_last": "save_total_limit",
    "checkpoint.keep_best": "load_best_model_at_end",
    "tracking.every_steps": "logging_steps log_every_n_steps",
    "tracking.project": "wandb_project project_name project",
    "tracking.wandb_mode": "wandb_mode",
    "tracking.tags": "wandb_tags",
    "tracking.watch": "wandb_watch",
    "distributed.deepspeed_config": "deepspeed deepspeed_config",
    "distributed.timeout_s": "ddp_timeout",
}
"""Our keys -> names of the same value at the top of a file."""

NAMES: dict[str, str] = {
    **{name: key for key, names in _NAMES_OF.items() for name in names.split()},
    "wandb.project": "tracking.project",
    "wandb.name": "run.name",
    "wandb.mode": "tracking.wandb_mode",
    "wandb.tags": "tracking.tags",
    "optimizer.lr": "training.learning_rate",
    "optimizer.weight_decay": "training.weight_decay",
    "optimizer.betas": "training.betas",
    "optimizer.eps": "training.eps",
    "optimizer.early_step_in_backward": "training.step_in_backward",
    "lr_scheduler.num_warmup_steps": "training.warmup_steps",
    "tokenizer.path": "model.tokenizer",
    **{
        f"{section}.{key.rpartition('.')[2]}": key
        for section in ("architecture", "model_config")
        for key in LEAVES
        if key.startswith("model.architecture.")
    },
    **{
        f"{section}.{name}": f"adapter.{name.replace('rank', 'r')}"
        for section in LORA_SECTIONS
        for name in ("r", "rank", "alpha", "dropout", "rslora", "dora")
    },
}
"""Names of the same value, those of sections among them -> our keys."""

# --- names whose values are written otherwise

_YES = ("true", "yes", "on", "1")
_NO = ("false", "no", "off", "0")
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "torch.optim.adamw": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
    "lion_32bit": "lion",
}
_PRECISIONS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "no": "fp32",
    "bf16-mixed": "bf16",
    "16-mixed": "fp16",
    "32": "fp32",
}
_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.float32": "float32",
}
_ATTENTION = {
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "flash_attn": "flash",
    "fa2": "flash",
    "flex_attention": "flex",
}
_TRAIN_ON = {"trainonwhat.all_assistant_messages": "all_assistant_messages"}


def _words(key: str, words: Mapping[str, str]) -> Rule:
    """Other spellings of a choice; a value that is not in `words` is taken as it is written."""
    return Rule(key, {word: {key: value} for word, value in words.items()})


def _switch(key: str, on: str | tuple[str, ...], off: str | tuple[str, ...], *, is_vague: bool = False) -> Rule:
    """`true` stands for `on`, `false` weakly for `off`: `bf16: false` beside `fp16: true` gives way.

    A vague `true` gives way too.
    """
    words = {word: {key: on} for word in _YES} | {word: {key: off} for word in _NO}
    return Rule(words=words, expected="true or false", weak=frozenset((*_NO, *_YES) if is_vague else _NO))


def _only(word: str, reason: str) -> Rule:
    """A key with one possible value here, which changes nothing; any other value is refused."""
    return Rule(words={word: {}}, expected=f"`{word}`: {reason}")


def _report_to(node: Node) -> list[Change]:
    """The console and metrics.jsonl are always trackers; `none` adds none, `all` adds both others."""
    items = node.items if isinstance(node, Listing) else (node,)
    names = tuple(item.text.lower() if isinstance(item, Scalar) else "" for item in items)
    if len(names) == 1:
        names = {"none": (), "": (), "null": (), "all": ("tensorboard", "wandb")}.get(names[0], names)
    return [Change(*row) for row in nodes_of({"tracking.trackers": ("console", "jsonl", *names)}, node.origin).items()]


_ADAPTER = Rule(
    "adapter.method",
    {
        **{word: {"adapter.method": "none"} for word in ("", "full", "null", "none")},
        "lora": {"adapter.method": "lora"},
        "qlora": {"adapter.method": "lora", "model.quantization": "4bit"},
    },
)
_OFFLOADED = Rule(
    words={
        **{word: {"model.gradient_checkpointing": "offload"} for word in _YES},
        **{word: {} for word in _NO},
    },
    expected="true or false",
)
_LORA_ONLY = {
    "bias": _only("none", "biases are trained in full tuning only"),
    "task_type": _only("causal_lm", "llmtune trains causal language models"),
}
_STEPS = _only("steps", "give the steps as `evaluation.every_steps`")

_TRANSLATIONS_TO: dict[str, dict[str, Translation]] = {
    "adapter.method": {
        "use_lora": _switch("adapter.method", "lora", "none"),
        "use_peft": _switch("adapter.method", "lora", "none"),
        "finetuning_type": _ADAPTER,
        "adapter": _ADAPTER,
    },
    "model.gradient_checkpointing": {
        # A plain `true` gives way to a request for offloading, which other toolkits write beside it.
        **{
            name: Rule("model.gradient_checkpointing", weak=frozenset(_YES))
            for name in _NAMES_OF["model.gradient_checkpointing"].split()
        },
        "activation_offloading": _OFFLOADED,
        "enable_activation_offloading": _OFFLOADED,
    },
    "model.quantization": {
        "load_in_4bit": _switch("model.quantization", "4bit", "none"),
        "load_in_8bit": _switch("model.quantization", "8bit", "none"),
        "quantization_bit": _words("model.quantization", {"4": "4bit", "8": "8bit"}),
    },
    "training.precision": {
        "bf16": _switch("training.precision", "bf16", "fp32"),
        "fp16": _switch("training.precision", "fp16", "fp32"),
        "use_amp": _switch("training.precision", "auto", "fp32", is_vague=True),
        "amp_dtype": _words("training.precision", _PRECISIONS),
        "mixed_precision": _words("training.precision", _PRECISIONS),
        "bnb_4bit_compute_dtype": _words("training.precision", _PRECISIONS),
    },
    "model.dtype": dict.fromkeys(("torch_dtype", "dtype", "model_dtype"), _words("model.dtype", _DTYPES)),
    "model.attention": {
        "attn_implementation": _words("model.attention", _ATTENTION),
        "flash_attn": _words("model.attention", {"true": "flash", "false": "auto", **_ATTENTION}),
        **dict.fromkeys(
            ("flash_attention", "use_flash_attention", "use_flash_attention_2"),
            _switch("model.attention", "flash", "auto"),
        ),
        "sdp_attention": _switch("model.attention", "sdpa", "auto"),
    },
    "training.optimizer": dict.fromkeys(("optim", "optimizer"), _words("training.optimizer", _OPTIMIZERS)),
    "training.betas": {"adam_beta1": Rule("training.betas[0]"), "adam_beta2": Rule("training.betas[1]")},
    "data.train_on": {
        **dict.fromkeys(
            ("train_on_what", "train_on"),
            _words("data.train_on", {name: name for name in get_args(TrainOn)} | _TRAIN_ON),
        ),
        "train_on_inputs": _switch("data.train_on", "all_tokens", "all_assistant_messages"),
        "assistant_only_loss": _switch("data.train_on", "all_assistant_messages", "all_tokens"),
    },
    "data.packing": {
        "packing": _words("data.packing", {"true": "best_fit", "false": "none"}),
        "sample_packing": _switch("data.packing", "best_fit", "none"),
        "pack_sequences": _switch("data.packing", "greedy", "none", is_vague=True),
    },
    "data.train[].config": {
        "dataset_config": Rule("data.train[].config"),
        "dataset_config_name": Rule("data.train[].config"),
    },
    "data.train[].split": {"dataset_split": Rule("data.train[].split")},
    "data.eval[].split": {"validation_split": Rule("data.eval[].split")},
    "tracking.trackers": {
        "report_to": _report_to,
        "use_wandb": _switch(
            "tracking.trackers", ("console", "jsonl", "tensorboard", "wandb"), ("console", "jsonl", "tensorboard")
        ),
    },
    "distributed.strategy": {"use_deepspeed": _switch("distributed.strategy", "deepspeed", "auto")},
    "": {  # keys with one possible value
        "bnb_4bit_quant_type": _only("nf4", "4 bit is always NF4 here"),
        "bnb_4bit_use_double_quant": _only("true", "4 bit always quantizes its constants too"),
        **_LORA_ONLY,
        **{f"{section}.{name}": rule for section in LORA_SECTIONS for name, rule in _LORA_ONLY.items()},
        "stage": _only("sft", "llmtune does supervised fine-tuning"),
        "save_strategy": _only(
            "steps", "give the steps as `checkpoint.every_steps`; without it every epoch's end is saved"
        ),
        "eval_strategy": _STEPS,
        "evaluation_strategy": _STEPS,
        "do_train": _only("true", "`llmtune train` trains; `llmtune evaluate` only measures"),
        "do_eval": _only("true", "held-out rows are always measured"),
    },
}
"""Our keys -> names and the rule that translates their values."""

_LORA_NAMES = {
    **{name: key for name, key in NAMES.items() if key.startswith("adapter.")},
    **{
        f"{section}.{name}": key
        for section in LORA_SECTIONS
        for name, key in NAMES.items()
        if key.startswith("adapter.") and "." not in name
    },
}
TRANSLATED: dict[str, Translation] = {
    # A LoRA setting turns LoRA on in toolkits that have no other switch.
    **{name: Rule(key, implies={"adapter.method": "lora"}) for name, key in _LORA_NAMES.items()},
    **{name: rule for rules in _TRANSLATIONS_TO.values() for name, rule in rules.items()},
}
"""Names whose values are translated."""

_KEYS = {
    **{name: key for name, key in NAMES.items() if "." not in name},
    **{name: key for key, rules in _TRANSLATIONS_TO.items() if key in LEAVES for name in rules if name not in SECTIONS},
}
"""Every name at the top of a file -> our key."""

SECTION_VALUES: dict[str, Translation] = {
    "model": Rule("model.name"),
    "data": Rule("data.train"),
    "adapter": _ADAPTER,
}
"""Sections for which a bare value is a well-known short form."""

VALUES: dict[str, dict[str, str]] = {
    "data.packing": {"true": "best_fit", "false": "none"},
    "training.precision": _PRECISIONS,
    "training.optimizer": _OPTIMIZERS,
    "model.dtype": _DTYPES,
    "model.attention": _ATTENTION,
    "model.gradient_checkpointing": {"unsloth": "offload"},
    "data.train_on": _TRAIN_ON,
}
"""Other spellings of a choice under our own key."""

# --- names that are refused

_UPLOADS = ("llmtune uploads nothing", "upload the run's `final/` folder with the hub's own tool")
_IMPORTS = "it names code to import, and llmtune imports nothing that a config names"
_DEVICE = ("the device is chosen where the command runs", "run `llmtune train --no-cuda`")
_PROCESSES = ("the number of processes is chosen where the command runs", "start it with `torchrun --nproc-per-node N`")
NOT_HERE: dict[str, tuple[str, str]] = {
    "trust_remote_code": (
        "it runs code that comes with the model, so it is allowed on the command line only, where you see it",
        "remove it here, and add `--trust-remote-code` to the command if you have read that code",
    ),
    "resume_from_checkpoint": ("resuming is a command of its own", "run `llmtune resume RUN`"),
    "auto_resume_from_checkpoints": ("resuming is a command of its own", "run `llmtune resume`"),
    "push_to_hub": _UPLOADS,
    "hub_model_id": _UPLOADS,
    "_component_": (_IMPORTS, "use the keys of `llmtune config schema`"),
    "_target_": (_IMPORTS, "use the keys of `llmtune config schema`"),
    "plugins": (_IMPORTS, "remove it"),
    "no_cuda": _DEVICE,
    "use_cpu": _DEVICE,
    "world_size": _PROCESSES,
    "local_rank": _PROCESSES,
    "label_smoothing_factor": ("the loss here is the plain negative log-likelihood", "remove it"),
    "logging_dir": ("logs stand in the run's own folder", "set `run.output_dir`"),
    "micro_batch_size_eval": ("it has another name here", "set `evaluation.batch_size`"),
    "unsloth": ("fast paths need no switch here", "leave `training.engine: auto`"),
}
"""Names people know from elsewhere that are refused: the reason and what to do."""
