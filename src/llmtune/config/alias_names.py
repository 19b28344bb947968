"""Other toolkits' names for our keys whose values are the same, and those of their sections."""

from __future__ import annotations

__all__ = ["FLAT_SECTIONS", "LORA_SECTIONS", "NAMES_OF", "SECTION_NAMES"]

FLAT_SECTIONS = (
    *("training_args", "training_arguments", "trainer", "train", "sft", "sft_config", "common_config"),
    *("quantization_config", "bnb_config", "bitsandbytes"),
)
LORA_SECTIONS = ("lora", "lora_config", "peft", "peft_config", "adapter_config")

NAMES_OF = {
    "run.output_dir": "output_dir log_path",
    "run.name": "run_name wandb_name wandb_run_name experiment_name",
    "run.seed": "seed random_seed",
    "model.name": "model_name model_name_or_path pretrained_model_name_or_path base_model model_id model_path",
    "model.revision": "model_revision revision_of_model",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_config",
    "model.chat_template": "chat_template chat_template_path chat_template_jinja",
    "model.train_only": "unfrozen_parameters",
    "model.pad_token": "pad_token",
    "model.eos_token": "eos_token",
    "model.gradient_checkpointing": (
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing use_gradient_checkpointing"
    ),
    "adapter.r": "lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.target_modules": "lora_target lora_target_modules target_modules",
    "adapter.modules_to_save": "modules_to_save lora_modules_to_save additional_target",
    "adapter.rslora": "use_rslora peft_use_rslora",
    "adapter.exclude_modules": "exclude_modules lora_exclude_modules",
    "adapter.rank_pattern": "rank_pattern",
    "adapter.alpha_pattern": "alpha_pattern",
    "training.loraplus_lr_ratio": "loraplus_lr_ratio",
    "training.embedding_learning_rate": "embedding_learning_rate embedding_lr loraplus_lr_embedding",
    "adapter.dora": "use_dora peft_use_dora",
    "data.train": (
        "train_file train_files train_data train_dataset file_path data_path dataset datasets dataset_name dataset_path"
    ),
    "data.eval": "eval_file eval_files eval_data eval_dataset validation_file test_datasets",
    "data.format": "dataset_format",
    "data.text_column": "dataset_text_field text_column text_field",
    "data.system": "system default_system default_system_message system_prompt",
    "data.template_args": "chat_template_kwargs template_kwargs",
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
    "training.num_cycles": "num_cycles",
    "training.warmup_ratio": "warmup_ratio",
    "training.min_lr_ratio": "min_lr_ratio cosine_min_lr_ratio",
    "training.max_grad_norm": "max_grad_norm gradient_clipping clip_grad_norm gradient_clip_val",
    "training.compile": "torch_compile compile",
    "training.neftune_alpha": "neftune_noise_alpha",
    "objective.beta": "pref_beta rl_beta orpo_alpha dpo_beta kto_beta",
    "objective.label_smoothing": "dpo_label_smoothing",
    "objective.desirable_weight": "kto_chosen_weight kto_desirable_weight desirable_weight",
    "objective.undesirable_weight": "kto_rejected_weight kto_undesirable_weight undesirable_weight",
    "training.step_in_backward": "optimizer_in_bwd",
    "evaluation.every_steps": "eval_every eval_steps",
    "evaluation.every_epochs": "eval_every_epochs",
    "evaluation.before_training": "eval_on_start",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size",
    "evaluation.early_stopping_patience": "early_stopping_patience",
    "evaluation.early_stopping_threshold": "early_stopping_threshold",
    "checkpoint.every_steps": "save_every save_steps",
    "checkpoint.every_epochs": "save_every_epochs",
    "checkpoint.keep_last": "save_total_limit",
    "tracking.every_steps": "logging_steps log_every_n_steps",
    "tracking.project": "wandb_project project_name project",
    "tracking.wandb_mode": "wandb_mode",
    "tracking.tags": "wandb_tags",
    "tracking.watch": "wandb_watch",
    "distributed.deepspeed_config": "deepspeed deepspeed_config",
    "distributed.timeout_s": "ddp_timeout",
}
"""Our keys -> names of the same value at the top of a file."""

SECTION_NAMES = {
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
    "lr_scheduler_kwargs.num_cycles": "training.num_cycles",
    "lr_scheduler_kwargs.min_lr_rate": "training.min_lr_ratio",
    "lr_scheduler_kwargs.min_lr_ratio": "training.min_lr_ratio",
    "tokenizer.path": "model.tokenizer",
}
"""Names in sections of other toolkits -> our keys."""
