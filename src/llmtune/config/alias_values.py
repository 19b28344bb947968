"""Other toolkits' names whose values are written otherwise here, and other spellings of values under our own keys."""

from __future__ import annotations

from typing import get_args

from llmtune.config.alias_names import NAMES_OF
from llmtune.config.schema import ObjectiveLoss, TrainOn
from llmtune.config.translation import (
    NO,
    YES,
    Rule,
    Translation,
    Values,
    only,
    report_to,
    switch,
    template_argument,
    times_an_epoch,
    warmup,
    when_on,
    words_of,
)

__all__ = ["LISTS", "LORA_ONLY", "MANY_KEYS", "SECTION_VALUES", "TRANSLATIONS_TO", "VALUES"]

_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "torch.optim.adamw": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_apex_fused": "adamw",
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
_METHODS = {method: {"objective.method": method} for method in ("sft", "dpo", "kto", "grpo")}
_PAIR_LOSSES = {
    "sigmoid": {"objective.method": "dpo", "objective.loss": "sigmoid"},
    "hinge": {"objective.method": "dpo", "objective.loss": "hinge"},
    "ipo": {"objective.method": "dpo", "objective.loss": "ipo"},
    "orpo": {"objective.method": "orpo"},
    "simpo": {"objective.method": "simpo"},
}
_TRL_LOSSES = {
    **{loss: {"objective.loss": loss} for loss in get_args(ObjectiveLoss)},
    "apo_zero_unpaired": {"objective.loss": "apo_zero"},
    "simpo": {"objective.method": "simpo"},
}
_PER_PROMPT: Values = {"objective.scale_rewards": "true"}
_UNSCALED: Values = {"objective.scale_rewards": "false"}
_SCALE_REWARDS = Rule(
    words=dict.fromkeys((*YES, "group"), _PER_PROMPT) | dict.fromkeys((*NO, "none"), _UNSCALED),
    expected="`group` or `none`: rewards are scaled among the answers to one prompt",
)
_OWN_TRAIN_ON = dict(zip(get_args(TrainOn), get_args(TrainOn), strict=True))
_TRAIN_ON = {"trainonwhat.all_assistant_messages": "all_assistant_messages"}
_SCHEDULES = {
    "cosine_with_min_lr": "cosine",  # its end is `min_lr_ratio`, which stands beside it
    "warmup_stable_decay": "wsd",
    "cosine_with_hard_restarts": "cosine_with_restarts",
}
_METRICS = {
    "loss": "eval_mean_nll",
    "eval_loss": "eval_mean_nll",
    "perplexity": "eval_perplexity",
}
_NO_LIMIT = {"-1": "null"}
_QUANTIZATIONS = {
    **dict.fromkeys(("4", "nf4", "int4", "4-bit", "bnb-4bit", "bitsandbytes-4bit", "bnb.nf4", "bnb.nf4-dq"), "4bit"),
    **dict.fromkeys(("8", "int8", "8-bit", "bnb-8bit", "llm.int8", "bnb.int8"), "8bit"),
    **dict.fromkeys(("false", "no"), "none"),
}

_FULL = {"adapter.method": "none"}
_DORA = {"adapter.method": "lora", "adapter.dora": "true"}
_ADAPTER = Rule(
    "adapter.method",
    {
        "": _FULL,
        "full": _FULL,
        "null": _FULL,
        "none": _FULL,
        "lora": {"adapter.method": "lora"},
        "qlora": {"adapter.method": "lora", "model.quantization": "4bit"},
        "dora": _DORA,
    },
)
_OFFLOADED = when_on({"model.gradient_checkpointing": "offload"})
LORA_ONLY = {
    **dict.fromkeys(
        ("bias", "lora_bias"),
        Rule(words={"none": {}, "false": {}, "null": {}}, expected="`none`: biases are trained in full tuning only"),
    ),
    "task_type": only("causal_lm", "for a classifier write `objective.method: classification`"),
}
_BF16 = Rule(
    words={
        **switch("training.precision", "bf16", "fp32").words,
        "auto": {"training.precision": "auto"},
        "full": {"training.precision": "bf16", "model.dtype": "bfloat16"},
    },
    expected="true, false, `auto` or `full`",
    weak=frozenset(NO),
)
_FP16 = Rule(
    words={
        **switch("training.precision", "fp16", "fp32").words,
        "auto": {"training.precision": "auto"},
    },
    expected="true, false or `auto`",
    weak=frozenset(NO),
)
NEVER = "1000000000"
"""Steps that no run has: nothing is saved before the end."""
_EVALUATE = Rule(
    words={
        "no": {"evaluation.every_steps": "null"},
        "false": {"evaluation.every_steps": "null"},
        "steps": {},
        "epoch": {"evaluation.every_epochs": "1"},
    },
    expected="`no`, `steps` or `epoch`",
)
_SAVE = Rule(
    words={
        "no": {"checkpoint.every_steps": NEVER},
        "false": {"checkpoint.every_steps": NEVER},
        "steps": {},
        "epoch": {"checkpoint.every_epochs": "1"},
        "best": {"checkpoint.every_steps": NEVER, "checkpoint.keep_best": "true"},
    },
    expected="`no`, `steps`, `epoch` or `best`",
)
_LAYERS = when_on({"adapter.target_modules": "all-linear", "adapter.method": "lora"})

TRANSLATIONS_TO: dict[str, dict[str, Translation]] = {
    "adapter.method": {
        "use_lora": switch("adapter.method", "lora", "none"),
        "use_peft": switch("adapter.method", "lora", "none"),
        **dict.fromkeys(("finetuning_type", "fine_tune_type", "adapter"), _ADAPTER),
    },
    "model.gradient_checkpointing": {
        # A plain `true` gives way to a request for offloading, which other toolkits write beside it.
        **dict.fromkeys(
            NAMES_OF["model.gradient_checkpointing"].split(),
            Rule("model.gradient_checkpointing", weak=frozenset(YES)),
        ),
        "activation_offloading": _OFFLOADED,
        "enable_activation_offloading": _OFFLOADED,
    },
    "adapter.init": {
        **dict.fromkeys(
            ("init_lora_weights", "lora_init_weights", "peft_init_lora_weights"),
            words_of("adapter.init", dict.fromkeys(("true", "default"), "kaiming")),
        ),
        "pissa_init": switch("adapter.init", "pissa_niter_16", "kaiming"),
    },
    "model.quantization": {
        "load_in_4bit": switch("model.quantization", "4bit", "none"),
        "load_in_8bit": switch("model.quantization", "8bit", "none"),
        "quantization_bit": words_of("model.quantization", {"4": "4bit", "8": "8bit"}),
    },
    "training.precision": {
        "bf16": _BF16,
        "fp16": _FP16,
        "use_amp": switch("training.precision", "auto", "fp32", is_vague=True),
        "amp_dtype": words_of("training.precision", _PRECISIONS),
        "mixed_precision": words_of("training.precision", _PRECISIONS),
        "bnb_4bit_compute_dtype": words_of("training.precision", _PRECISIONS),
    },
    "model.dtype": dict.fromkeys(("torch_dtype", "dtype", "model_dtype"), words_of("model.dtype", _DTYPES)),
    "model.attention": {
        "attn_implementation": words_of("model.attention", _ATTENTION),
        "flash_attn": words_of("model.attention", {"true": "flash", "false": "auto", **_ATTENTION}),
        **dict.fromkeys(
            ("flash_attention", "flash_attention_2", "use_flash_attention", "use_flash_attention_2"),
            switch("model.attention", "flash", "auto"),
        ),
        "sdp_attention": switch("model.attention", "sdpa", "auto"),
    },
    "training.optimizer": dict.fromkeys(("optim", "optimizer"), words_of("training.optimizer", _OPTIMIZERS)),
    "training.batch_size": {"auto_find_batch_size": when_on({"training.batch_size": "auto"})},
    "training.warmup_steps": {"warmup_steps": warmup, "num_warmup_steps": warmup},
    "evaluation.every_steps": {"eval_strategy": _EVALUATE, "evaluation_strategy": _EVALUATE},
    "evaluation.every_epochs": {"evals_per_epoch": times_an_epoch("evaluation.every_epochs")},
    "evaluation.best_by": {"metric_for_best_model": words_of("evaluation.best_by", _METRICS)},
    "checkpoint.every_steps": {"save_strategy": _SAVE},
    "checkpoint.every_epochs": {"saves_per_epoch": times_an_epoch("checkpoint.every_epochs")},
    "checkpoint.final": {"load_best_model_at_end": switch("checkpoint.final", "best", "last")},
    "adapter.target_modules": {"lora_target_linear": _LAYERS},
    "training.betas": {"adam_beta1": Rule("training.betas[0]"), "adam_beta2": Rule("training.betas[1]")},
    "data.train_on": {
        **dict.fromkeys(
            ("train_on_what", "train_on"),
            words_of("data.train_on", _OWN_TRAIN_ON | _TRAIN_ON),
        ),
        "train_on_inputs": switch("data.train_on", "all_tokens", "all_assistant_messages"),
        "train_on_prompt": switch("data.train_on", "all_tokens", "all_assistant_messages"),
        "completion_only_loss": switch("data.train_on", "all_assistant_messages", "all_tokens"),
        "mask_prompt": switch("data.train_on", "all_assistant_messages", "all_tokens"),
        "mask_history": when_on({"data.train_on": "last_assistant_turn"}),
        "train_on_responses_only": switch("data.train_on", "all_assistant_messages", "all_tokens"),
        "assistant_only_loss": switch("data.train_on", "all_assistant_messages", "all_tokens"),
    },
    "data.template_args": {name: template_argument(name) for name in ("enable_thinking", "reasoning_effort")},
    "data.packing": {
        "packing": words_of("data.packing", {"true": "best_fit", "false": "none"}),
        "sample_packing": switch("data.packing", "best_fit", "none"),
        "pack_sequences": switch("data.packing", "greedy", "none", is_vague=True),
    },
    "objective.method": {
        "stage": Rule(
            "objective.method",
            _METHODS | {"pt": {"objective.method": "sft", "data.format": "text"}, "rm": {"objective.method": "reward"}},
            "`sft`, `pt`, `rm`, `dpo`, `kto` or `grpo`: other stages are not there",
        ),
        "rl": Rule(
            "objective.method", _METHODS | _PAIR_LOSSES, "dpo, ipo, simpo, orpo, kto or grpo: others are not there"
        ),
        "pref_loss": Rule("objective.loss", _PAIR_LOSSES, "sigmoid, hinge, ipo, orpo or simpo: others are not there"),
    },
    "objective.loss": {
        "loss_type": Rule("objective.loss", _TRL_LOSSES, "a loss of dpo, kto or grpo, or simpo: others are not there"),
    },
    "objective.scale_rewards": {"scale_rewards": _SCALE_REWARDS},
    "data.train[].config": {
        "dataset_config": Rule("data.train[].config"),
        "dataset_config_name": Rule("data.train[].config"),
    },
    "data.train[].split": {"dataset_split": Rule("data.train[].split")},
    "data.eval[].split": {"validation_split": Rule("data.eval[].split")},
    "tracking.trackers": {
        "report_to": report_to,
        "use_wandb": switch(
            "tracking.trackers",
            ("console", "jsonl", "system", "tensorboard", "wandb"),
            ("console", "jsonl", "system", "tensorboard"),
        ),
        "use_mlflow": switch(
            "tracking.trackers",
            ("console", "jsonl", "system", "mlflow"),
            ("console", "jsonl", "system", "tensorboard"),
        ),
    },
    "distributed.strategy": {"use_deepspeed": switch("distributed.strategy", "deepspeed", "auto")},
    "": {  # keys with one possible value
        "bnb_4bit_quant_type": only("nf4", "4 bit is always NF4 here"),
        "bnb_4bit_use_double_quant": only("true", "4 bit always quantizes its constants too"),
        "double_quantization": only("true", "4 bit always quantizes its constants too"),
        "train_on_eos": only("turn", "the token that ends a trained answer is trained, and no other"),
        **LORA_ONLY,
        "dataloader_drop_last": only("false", "every row is trained in every epoch"),
        "save_adapter": only("true", "a run with an adapter always saves it"),
        "save_safetensors": only("true", "weights are always safetensors"),
        "num_iterations": only("1", "drawn answers are learnt from once; `objective.steps_per_generation` draws ahead"),
        "do_train": only("true", "`llmtune train` trains; `llmtune evaluate` only measures"),
        "do_eval": only("true", "held-out rows are always measured"),
    },
}
"""Our keys -> names and the rule that translates their values."""

SECTION_VALUES: dict[str, Translation] = {
    "model": Rule("model.name"),
    "data": Rule("data.train"),
    "adapter": _ADAPTER,
}
"""Sections for which a bare value is a well-known short form."""

MANY_KEYS: dict[str, Rule] = {"adapter.method": _ADAPTER}
"""Our keys of which other toolkits' values set other keys too."""

VALUES: dict[str, dict[str, str]] = {
    "training.precision": _PRECISIONS,
    "training.optimizer": _OPTIMIZERS,
    "training.lr_schedule": _SCHEDULES,
    "training.max_steps": _NO_LIMIT,
    "training.max_grad_norm": {"0": "null", "0.0": "null"},
    "training.neftune_alpha": {"0": "null", "0.0": "null"},
    "data.max_samples": _NO_LIMIT,
    "checkpoint.keep_last": {"null": "0", "-1": "0"},
    "adapter.method": {"full": "none"},
    "adapter.target_modules": {"all": "all-linear", "all_linear": "all-linear"},
    "model.dtype": _DTYPES,
    "model.quantization": _QUANTIZATIONS,
    "model.attention": _ATTENTION,
    "model.gradient_checkpointing": {"unsloth": "offload"},
    "model.chat_template": {"tokenizer_default": "null", "default": "null", "jinja": "null"},
    "data.packing": {"true": "best_fit", "false": "none", "bfd": "best_fit", "ffd": "first_fit", "wrapped": "greedy"},
    "data.train_on": _TRAIN_ON,
}
"""Other spellings of a choice under our own key."""

LISTS = ("adapter.target_modules", "adapter.modules_to_save", "tracking.trackers", "tracking.tags", "run.tags")
"""Our keys that other toolkits write as one text with commas."""
