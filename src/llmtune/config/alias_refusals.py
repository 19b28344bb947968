"""Other toolkits' names that have no equivalent here: those that are refused, and those that would change nothing."""

from __future__ import annotations

__all__ = ["NOT_HERE", "REFUSED_VALUES", "UNUSED"]

_UPLOADS = ("llmtune uploads nothing", "upload the run's `final/` folder with the hub's own tool")
_IMPORTS = "it names code to import, and llmtune imports nothing that a config names"
_DEVICE = ("the device is chosen where the command runs", "run `llmtune train --no-cuda`")
_PROCESSES = (
    "the number of processes is chosen where the command runs",
    "start it with `llmtune train --devices N`, or `torchrun`",
)
_SHARDING = (
    "what to shard and how is decided here",
    "set `distributed.strategy: fsdp`, and start with `llmtune train --devices N`",
)
_MASK = (
    "the answers are found from the chat template itself",
    "remove it; `data.train_on` says which messages are trained",
)
_TOKENS = (
    "special tokens belong to the tokenizer",
    "set `model.pad_token` and `model.eos_token`; others in a tokenizer's folder, and name that with `model.tokenizer`",
)
_FROM_ROWS = (
    "it begins with what the training rows do to the base (activations for eva and corda, gradients for lora_ga)",
    "set `adapter.init: pissa`, which begins with the weights alone",
)
_LAYERS = (
    "layers are chosen by their number from the end, or by name",
    "set `adapter.layers: 4` for the last four blocks, or write a regular expression in `adapter.target_modules`",
)
_NEW_TOKENS = (
    "new tokens are listed with the adapter, in full tuning too",
    "set `adapter.train_tokens: ['<tool>', '</tool>']`",
)
_MIXTURE = (
    "a mixture is written at its sources",
    "give each entry of `data.train` a `share` of the epoch, or a `repeat`",
)
_REWARDS = (
    "rewards are named with their weights; code for one is named on the command line",
    "write `objective.rewards: {f1: 1.0}`, or `llmtune train --reward FILE.py:FUNCTION=WEIGHT`",
)
_CONTEXT = ("the shape of a model is read from its own folder", "change it in that folder's config.json")
NOT_HERE: dict[str, tuple[str, str]] = {
    "trust_remote_code": (
        "it runs code that comes with the model, so it is allowed on the command line only, where you see it",
        "remove it here, and add `--trust-remote-code` to the command if you have read that code",
    ),
    "sweep": ("it describes several runs", "name the file itself: `llmtune sweep FILE`"),
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
    "checkpoint_dir": (
        "litgpt and torchtune call their base model's folder so, others the folder of the runs",
        "write `model.name: DIR` for the base model, or `run.output_dir: DIR` for the runs",
    ),
    "wandb_run_id": ("every run has an id of its own, and keeps it when it is resumed", "remove it"),
    "wandb_log_model": _UPLOADS,
    "hub_strategy": _UPLOADS,
    "hub_private_repo": _UPLOADS,
    "template": (
        "conversations are written by the chat template that belongs to the tokenizer",
        "remove it, or name a file with `model.chat_template`",
    ),
    "response_template": _MASK,
    "instruction_template": _MASK,
    "instruction_part": _MASK,
    "response_part": _MASK,
    "min_lr": (
        "the end of a schedule is given as a fraction of its peak",
        "divide it by the learning rate: `training.min_lr_ratio`",
    ),
    "predict_with_generate": ("answers are written by a command of its own", "run `llmtune generate`"),
    "do_predict": ("answers are written by a command of its own", "run `llmtune generate`"),
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "dataset_dir": ("data files are named by their whole path", "write it before the names in `data.train`"),
    "dataset_info": ("data files are named by their path", "name them in `data.train`"),
    "eval_max_new_tokens": ("it has another name here", "set `evaluation.max_new_tokens`"),
    "bos_token": _TOKENS,
    "unk_token": _TOKENS,
    "label_smoothing_factor": ("the loss here is the plain negative log-likelihood", "remove it"),
    "global_batch_size": (
        "it is `training.batch_size` x `training.gradient_accumulation_steps`",
        "set both: `training.batch_size` sequences at once, so many times in a step",
    ),
    "peft_type": ("the adapter here is LoRA", "set `adapter.method: lora`, or take it out"),
    "logging_dir": ("logs stand in the run's own folder", "set `run.output_dir`"),
    "micro_batch_size_eval": ("it has another name here", "set `evaluation.batch_size`"),
    "loftq_config": ("it has one step and 4 bits here", "set `adapter.init: loftq` and `model.quantization: 4bit`"),
    "relora_steps": ("an adapter is trained once, and merged when it is done", "remove it"),
    "relora": ("an adapter is trained once, and merged when it is done", "remove it"),
    "layers_to_transform": _LAYERS,
    "peft_layers_to_transform": _LAYERS,
    "freeze_trainable_layers": ("layers are chosen by name", "set `model.train_only: ['.*layers.(30|31).*']`"),
    "tokens": _NEW_TOKENS,
    "add_tokens": _NEW_TOKENS,
    "new_special_tokens": _NEW_TOKENS,
    "added_tokens_overrides": ("a tokenizer is changed in its own folder", "name that with `model.tokenizer`"),
    "roles_to_train": ("messages are chosen by a rule", "set `data.train_on: all_messages` or another rule"),
    "train_on_split": ("a split belongs to a source", "write `data.train: [{path: ..., split: train}]`"),
    "mix_strategy": _MIXTURE,
    "interleave_probs": _MIXTURE,
    "streaming": ("rows are tokenized once, and read from the disk while a run trains", "remove it"),
    "skip_prepare_dataset": ("rows are always tokenized here", "give them as text or messages"),
    "xformers_attention": ("there is no such backend here", "leave `model.attention: auto`, which takes the fastest"),
    "torch_compile_backend": ("it compiles with torch's own default", "set `training.compile: true` alone"),
    "torch_compile_mode": ("it compiles with torch's own default", "set `training.compile: true` alone"),
    "steps_per_generation": (
        "TRL counts micro-batches with it, and llmtune counts steps",
        "divide it by the gradient accumulation steps: `objective.steps_per_generation`",
    ),
    "reward_funcs": _REWARDS,
    "reward_weights": _REWARDS,
    "use_dft_loss": ("the loss here is the plain negative log-likelihood", "remove it"),
    "rope_scaling": _CONTEXT,
    "rope_theta": _CONTEXT,
    "unsloth": ("fast paths need no switch here", "leave `training.engine: auto`"),
}
"""Names people know from elsewhere that are refused: the reason and what to do."""

REFUSED_VALUES: dict[str, dict[str, tuple[str, str]]] = {
    "adapter.init": {
        "corda|eva|lora_ga": _FROM_ROWS,
        r"pissa_niter_\d+": ("here it takes 4 or 16 iterations", "set `adapter.init: pissa_niter_16`, or `pissa`"),
    },
    "evaluation.score": {
        r".*\.py(:.*)?": (
            "it is a file with code, and llmtune imports nothing that a config names",
            "name it on the command line: `llmtune train --score FILE.py:FUNCTION`",
        ),
    },
    "training.lr_schedule": {
        "reduce_lr_on_plateau": (
            "every rate is known before the first step",
            "set `evaluation.early_stopping_patience`, or `training.lr_schedule: cosine`",
        ),
        "inverse_sqrt": ("there is no such schedule here", "set `training.lr_schedule: wsd`, or `cosine`"),
        "one_cycle": (
            "there is no such schedule here",
            "set `training.lr_schedule: cosine` and `training.warmup_ratio`",
        ),
    },
    "adapter.method": {
        "freeze": (
            "some weights of a model are trained without an adapter",
            "set `adapter.method: none` and name them in `model.train_only`",
        ),
    },
}
"""Values of our keys that people know from elsewhere, as regular expressions: why they are not taken, what to do."""

_FAST = "the fast paths of llmtune are chosen for the device and need no switch"
_LOADED = "rows are tokenized before training starts (`data.num_workers`), and none is loaded while it runs"
_SHOWN = "it changes what a trainer shows, and nothing that is trained"
_KNOWN = "it is read from the model's own folder"
UNUSED: dict[str, str] = {
    "tf32": "products of float32 keep their precision; `training.precision: bf16` is the fast form",
    "logging_first_step": "`tracking.every_steps` says which steps are logged; the last always is",
    "logging_strategy": "`tracking.every_steps` says which steps are logged",
    "group_by_length": "rows are laid end to end without padding, so nothing is gained by their order",
    "length_column_name": "rows are laid end to end without padding, so nothing is gained by their order",
    "pad_to_sequence_len": "rows are laid end to end without padding",
    "pad_to_multiple_of": "rows are laid end to end without padding",
    "neat_packing": "packed rows never see each other here",
    "padding_free": "rows are laid end to end without padding",
    "eval_packing": "held-out rows are measured one by one, whatever their batch",
    "shuffle_merged_datasets": "rows of all sources are shuffled together (`data.shuffle_seed`)",
    "fp16_full_eval": "held-out rows are measured in the precision of training",
    "bf16_full_eval": "held-out rows are measured in the precision of training",
    "eval_accumulation_steps": "held-out losses are added up as they come",
    "use_cache": "it is off in training and on where answers are written",
    "resize_vocab": "the embedding gets the rows that new tokens need",
    "resize_token_embeddings": "the embedding gets the rows that new tokens need",
    "deterministic": "a run with the same seed on the same machine gives the same bytes without it",
    "lora_fan_in_fan_out": _KNOWN,
    "lora_on_cpu": _FAST,
    **dict.fromkeys(
        ("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation", "liger_cross_entropy"), _FAST
    ),
    "liger_fused_linear_cross_entropy": _FAST,
    "ds_type": "the kind of a file is read from its name and content",
    "padding_side": "rows are laid end to end without padding",
    "dataloader_num_workers": _LOADED,
    "dataloader_pin_memory": _LOADED,
    "dataloader_prefetch_factor": _LOADED,
    "dataloader_persistent_workers": _LOADED,
    "ignore_data_skip": "a resumed run goes on with the row after the last one it used",
    "remove_unused_columns": "fields that are not used are named once for each file",
    "overwrite_output_dir": "a run never writes over another one; each has a folder of its own",
    "overwrite_cache": "the cache knows which rows have changed",
    "save_only_model": "a checkpoint holds all that a resumed run needs; `final/` is the model alone",
    "greater_is_better": "the direction follows from the metric",
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all devices",
    "gradient_checkpointing_kwargs": "recomputation has one form here, without re-entry",
    "torch_empty_cache_steps": _FAST,
    "use_liger_kernel": _FAST,
    "use_liger": _FAST,
    "enable_liger_kernel": _FAST,
    "use_unsloth": _FAST,
    "lora_mlp_kernel": _FAST,
    "lora_qkv_kernel": _FAST,
    "lora_o_kernel": _FAST,
    "low_cpu_mem_usage": _FAST,
    "full_determinism": "a run with the same seed on the same machine gives the same bytes without it",
    "ddp_find_unused_parameters": "every trained weight is used",
    "disable_tqdm": _SHOWN,
    "log_level": _SHOWN,
    "plot_loss": _SHOWN,
    "include_num_input_tokens_seen": _SHOWN,
    "include_tokens_per_second": _SHOWN,
    "model_type": _KNOWN,
    "tokenizer_type": _KNOWN,
    "use_fast_tokenizer": _KNOWN,
    "is_llama_derived_model": _KNOWN,
}
"""Names whose value makes no difference to what is trained here: named in a line, with the reason, and not used."""
