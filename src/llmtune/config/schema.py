"""The frozen dataclasses of a run: the only place where a default is written.

The sections have the order of a config file; `Config` at the end puts them together.

The string under a field is its only description: it is the line in the reference page, in an editor and in a commented
YAML file. Units are in the names (`every_steps`, `timeout_s`). `None` means "not given": nothing happens, or llmtune
chooses and prints the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "AdapterConfig",
    "ArchitectureConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ObjectiveLoss",
    "ObjectiveMethod",
    "RunConfig",
    "SourceConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainOn",
    "TrainingConfig",
]

# `run.*`


@dataclass(frozen=True)
class RunConfig:
    """Folder and name of a run, and its seed."""

    output_dir: str = "runs"
    """Folder in which run folders are made."""

    name: str = "{model}-{config}-{timestamp}"
    """Name of the run and of its folder; `{model}`, `{config}`, `{timestamp}` and `{seed}` are filled in."""

    seed: int = 42
    """Seed of everything random in training: initial weights, dropout, order of the rows."""

    tags: tuple[str, ...] = ()
    """Words to find the run by, recorded in run.json and sent to trackers."""

    notes: str | None = None
    """Free text about the run, recorded in run.json and sent to trackers."""


# `model.*`


@dataclass(frozen=True)
class ArchitectureConfig:
    """Shape of a from-scratch model; keys that are not given come from the named custom model."""

    d_model: int | None = None
    """Width of the residual stream."""

    n_heads: int | None = None
    """Attention heads; must divide `d_model`."""

    n_kv_heads: int | None = None
    """Key/value heads for grouped-query attention; must divide `n_heads`. Same as `n_heads` when not given."""

    n_layers: int | None = None
    """Transformer blocks."""

    d_ff: int | None = None
    """Width of the feed-forward layer.

    4 x `d_model` for gelu, 8/3 x `d_model` rounded up to 64 for silu when not given.
    """

    max_seq_len: int | None = None
    """Longest sequence the model can see, in tokens."""

    dropout: float | None = None
    """Fraction of residual activations dropped in training (GPT-2-like architecture only)."""

    attention_dropout: float | None = None
    """Fraction of attention weights dropped in training."""

    activation: Literal["silu", "gelu", "relu"] | None = None
    """Activation of the feed-forward layer."""

    pre_norm: bool | None = None
    """Normalise before each sublayer (true) or after it (false; refused where no standard architecture has it)."""

    positions: Literal["rotary", "learned"] | None = None
    """Rotary positions give a Llama-like architecture, learned positions a GPT-2-like one."""

    tie_embeddings: bool | None = None
    """Share the input embedding and the output head."""

    vocab_size: int | None = None
    """Entries of the tokenizer trained for this model, and of its embedding."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained, and how it is held in memory."""

    name: str = "custom-tiny"
    """A name of `llmtune list-models`, a local folder, a `.gguf` file or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it resolves to is recorded."""

    tokenizer: str | None = None
    """Folder or hub id of another tokenizer; the model's own when not given."""

    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own, or the name of a shipped one (`chatml`)."""

    pad_token: str | None = None
    """Token that fills up short rows; the tokenizer's own when not given."""

    eos_token: str | None = None
    """Token that ends an answer or a text; the tokenizer's own when not given."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which frozen weights are held; trained weights are held in float32 unless this names another type."""

    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen base in 4-bit NF4 with double quantization (QLoRA) or in 8 bit; needs an adapter."""

    train_only: tuple[str, ...] = ()
    """Full tuning of these parameters alone: regular expressions over their full names; all when not given."""

    attention: Literal["auto", "sdpa", "flash", "flex", "eager"] = "auto"
    """Attention implementation; `auto` takes the fastest exact one for this device."""

    gradient_checkpointing: bool | Literal["auto", "offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more work. `offload` is for very long
    rows: also keeps what blocks need for it in host memory, and runs feed-forward layers over tiles of tokens. `auto`
    decides by the plan."""

    offload_weights: bool = False
    """On a GPU, keep the frozen weights of blocks in the memory of the host: two blocks at most are on the device, and
    the next one comes while one computes. For an adapter on a model that does not fit; blocks must be recomputed
    (`gradient_checkpointing`)."""

    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Shape of a from-scratch model."""

    @property
    def recomputes(self) -> bool:
        """Whether blocks are recomputed in the backward pass; False while `auto` is not resolved."""
        return self.gradient_checkpointing in (True, "offload")


# `adapter.*`


AdapterInit = Literal["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "loftq"]


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA: small matrices that are trained beside the frozen base."""

    method: Literal["none", "lora"] = "none"
    """`none` trains every weight of the model, `lora` only low-rank updates."""

    start_from: str | None = None
    """Run or adapter folder whose weights training starts from; its shape is taken over. Anew when not given."""

    r: int = 16
    """Rank of the update."""

    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`)."""

    dropout: float = 0.0
    """Fraction of the adapter's input dropped in training."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: `all-linear`, a list of name endings, or one regular expression over full names."""

    init: AdapterInit = "kaiming"
    """First values of the adapter: A uniform by its inputs or normal by the rank and B 0, or an orthogonal pair whose
    product is 0. `pissa` (fast and nearly: `pissa_niter_4`) and `olora` begin with a part of each weight of the base;
    saved, the adapter has twice the rank and fits the base as it is. `loftq` begins with what 4-bit quantizing took."""

    exclude_modules: str | tuple[str, ...] = ()
    """Layers left out of those: a list of name endings, or one regular expression over full names."""

    layers: int | None = None
    """Adapt only the last so many blocks; all when not given."""

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks by name ending or regular expression: `{down_proj: 32}`."""

    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other scales by name ending or regular expression: `{down_proj: 64}`."""

    rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""

    dora: bool = False
    """Weight-decomposed update (arXiv:2402.09353)."""

    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved beside the adapter, by name ending (for example `lm_head`)."""

    train_tokens: tuple[str, ...] = ()
    """Tokens (added when new) whose embedding rows are trained beside the adapter; full tuning trains all rows."""

    @property
    def begins_at_zero(self) -> bool:
        """Whether its first values change no output: B A = 0."""
        return self.init in ("kaiming", "gaussian", "orthogonal")

    @property
    def takes_from_base(self) -> bool:
        """Whether the adapter's first values are a part of the base, which in memory is then without it."""
        return not self.begins_at_zero and self.init != "loftq"


# `data.*`


TrainOn = Literal[
    "last_assistant_message",
    "last_assistant_turn",
    "all_assistant_messages",
    "all_messages",
    "all_tokens",
    "all_user_and_system_messages",
    "customized",
]
Role = Literal["system", "developer", "user", "assistant", "tool"]
RowFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference", "unpaired", "prompt",
    "classification",
]  # fmt: skip


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows; in YAML a plain string is its `path`."""

    path: str = ""
    """A file (jsonl, json, csv, tsv, parquet, txt; also .gz, .zst), a folder, a glob, `example:NAME`, or a `datasets`
    name.
    """

    config: str | None = None
    """Configuration of a `datasets` name (for example `wikitext-103-raw-v1`) or of a folder that has several."""

    split: str | None = None
    """Split of a `datasets` name, or of a folder or pattern with train/valid/test files; also a slice of its rows such
    as `train[:10%]` or `train[100:200]`, or several joined by `+`.
    """

    weight: float = 1.0
    """Weight of every trained token of this source in the loss."""

    max_samples: int | None = None
    """Use at most this many rows of this source."""

    name: str | None = None
    """Name of the source in reports and metrics; the end of its path when not given."""

    format: RowFormat | None = None
    """Format of its rows; `data.format` when not given."""

    text_column: str | None = None
    """Field of its text rows; `data.text_column` when not given."""

    train_on: TrainOn | None = None
    """Messages of its conversations that carry loss; `data.train_on` when not given."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Fields of a format and the columns they are read from: `{prompt: question, completion: answers.text.0}`. Dots go
    into nested columns; a text such as `"{context}\\n{question}"` joins several. `role` and `content` are the keys of
    each message.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    """Roles by the names its messages have: `{customer: user, agent: assistant}`; case does not matter."""

    repeat: float = 1.0
    """Times each row of this source is seen in an epoch; of a fraction, as many rows are drawn anew each epoch."""

    share: float | None = None
    """Fraction of an epoch's rows that are drawn from this source, anew each epoch. Sources without a share keep their
    rows and make up the rest; where each has one, an epoch has as many rows as all sources together.
    """


@dataclass(frozen=True)
class DataConfig:
    """The rows, how they become examples, and what happens to rows that cannot be used."""

    train: tuple[SourceConfig, ...] = ()
    """Training rows: a list of files, folders, globs, `example:NAME` or `datasets` names, or mappings with `path` and
    more.
    """

    eval: tuple[SourceConfig, ...] = ()
    """Held-out rows, never trained on."""

    format: RowFormat = "auto"
    """Format of a row; `auto` detects it from the first rows, among those that `objective.method` can learn from."""

    text_column: str | None = None
    """Field of a text row; `text` when not given."""

    min_length: int | None = None
    """Drop (and count) text rows shorter than this many tokens."""

    test_size: float = 0.0
    """Held-out rows taken from the training rows: a number of rows (1 or more) or a fraction (below 1)."""

    shuffle_seed: int | None = 42
    """Seed of the order in which rows are held out and shuffled each epoch; null keeps the files' order."""

    train_on: TrainOn = "all_assistant_messages"
    """Messages of a conversation that carry loss."""

    system: str | None = None
    """System prompt of conversations that have none, in training and wherever the run's model answers."""

    template_args: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of the chat template (`{enable_thinking: false}`), in training and wherever the run's model
    answers; a row's `chat_template_kwargs` come before them.
    """

    one_example_per_turn: bool = False
    """Make an example of each turn of the assistant, in which it is the last one. For templates that write the last
    turn differently, such as those that leave out earlier thoughts.
    """

    max_length: int = 2048
    """Longest example, and length of a pack, in tokens."""

    overlong: Literal["error", "drop", "truncate_right", "truncate_left", "split"] = "error"
    """What happens to an example longer than `max_length`; each one is written to the ledger."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at rows that cannot be used (all are named), or skip and count them."""

    on_duplicate: Literal["keep", "drop"] = "keep"
    """Keep or drop rows whose tokens and weights repeat an earlier row; both are counted."""

    on_overlap: Literal["error", "keep", "drop"] = "drop"
    """What happens to a training row that is also among the held-out rows; each one is written to the ledger."""

    packing: Literal["none", "greedy", "first_fit", "best_fit"] = "none"
    """Lay several examples in one sequence of `max_length` tokens; they cannot see each other."""

    max_samples: int | None = None
    """Use at most this many training rows."""

    parse_control_tokens: bool = False
    """Let text in the data match control tokens such as `<|im_end|>`. Off: content is only content."""

    num_workers: int | None = None
    """Processes that tokenize; all cores when not given. The result does not depend on it."""

    cache_dir: str | None = None
    """Folder of the tokenized-data cache; the user's cache folder when not given."""

    @property
    def is_mixed(self) -> bool:
        """Whether an epoch is anything but every training row once."""
        return any(source.share is not None or source.repeat != 1 for source in self.train)


# `training.*`


@dataclass(frozen=True)
class TrainingConfig:
    """How weights are updated."""

    epochs: float = 3.0
    """Passes over the training rows; a fraction is allowed."""

    max_steps: int | None = None
    """Stop after this many steps; replaces `epochs` as the length of the schedule."""

    max_minutes: float | None = None
    """Stop, saved and resumable, after this many minutes of training."""

    batch_size: int | Literal["auto"] = 8
    """Sequences in one micro-batch. `auto` finds one that fits and keeps the global batch."""

    gradient_accumulation_steps: int = 1
    """Micro-batches in one step: it takes this many times `batch_size` sequences, shared by all processes."""

    learning_rate: float | None = None
    """Peak learning rate; when not given 2e-4 for LoRA, 2e-5 for full tuning (a twentieth of both where answers are
    compared), by size from scratch.
    """

    embedding_learning_rate: float | None = None
    """Peak learning rate of the embedding and the output head where they are trained; `learning_rate` when not
    given."""

    loraplus_lr_ratio: float | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of the B matrices as a multiple of that of the A matrices."""

    weight_decay: float | None = None
    """Decoupled decay of matrices (never of norms, biases); when not given 0 for LoRA, 0.01 for full tuning, 0.1 from
    scratch.
    """

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "muon", "sgd"] = (
        "adamw"
    )
    """Optimizer; the 8-bit and paged ones and lion come from bitsandbytes, adafactor from transformers."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""

    eps: float = 1e-8
    """Added to Adam's denominator."""

    lr_schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "polynomial", "wsd"
    ] = "linear"
    """Course of the learning rate after warm-up."""

    num_cycles: int = 1
    """Falls of the learning rate from its peak in `cosine_with_restarts`."""

    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    warmup_ratio: float | None = None
    """Warm-up as a fraction of all steps, rounded up."""

    min_lr_ratio: float = 0.0
    """Learning rate at the end as a fraction of the peak (not of the constant schedules)."""

    max_grad_norm: float | None = 1.0
    """Clip the gradient of a window to this norm; null does not clip, the norm is reported all the same."""

    step_in_backward: bool = False
    """Move each weight as soon as its gradient is complete, and drop that gradient: full tuning then never holds all
    gradients (the window must be one micro-batch for that). Not with clipping (`max_grad_norm: null`), fp16,
    `tracking.watch` or several processes."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the arithmetic in forward and backward; `auto` takes bf16 where the hardware multiplies it natively."""

    master_weights: bool | Literal["auto"] = "auto"
    """Full tuning with the model in bf16, and float32 masters of its weights in the optimizer. `auto` does so on a GPU
    where the arithmetic is bf16 and the plan fits as well with masters; `false` keeps the model in float32."""

    compile: bool = False
    """Compile each decoder block with torch.compile."""

    deterministic: bool = False
    """On a GPU, take only kernels that add in a fixed order, so that the same training repeats every bit; slower. A CPU
    does so in any case."""

    engine: Literal["auto", "plain"] = "auto"
    """`auto` uses the fast paths that are proven equal here; `plain` the library's own forward on padded batches."""

    neftune_alpha: float | None = None
    """Noise added to embeddings in training, alpha / sqrt(length x width) (arXiv:2310.05914)."""

    max_skipped_steps: int = 3
    """Windows with non-finite loss or gradients that are skipped, and named, before the run stops with exit 7."""


# `objective.*`


ObjectiveMethod = Literal["sft", "dpo", "simpo", "orpo", "kto", "grpo", "reward", "classification"]
ObjectiveLoss = Literal["auto", "sigmoid", "ipo", "hinge", "kto", "apo_zero", "dapo", "grpo", "dr_grpo"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimizes: the loss of the answers, or a loss that compares answers."""

    method: ObjectiveMethod = "sft"
    """`sft` learns answers; `dpo`, `simpo` and `orpo` learn from pairs of a chosen and a rejected answer, `kto` also
    from single answers with a label; `grpo` draws answers to prompts and learns from their rewards. `reward` and
    `classification` train a head that reads the last token: a score, by which the chosen answer of a pair is above the
    rejected one, or the label of a row.
    """

    loss: ObjectiveLoss = "auto"
    """Form of the loss: `sigmoid` (chosen by `auto`), `ipo` or `hinge` for `dpo`; `kto` (chosen by `auto`) or
    `apo_zero` for `kto`; for `grpo` the mean over all tokens of a step (`dapo`, chosen by `auto`), over the mean of
    each answer (`grpo`), or the sum of tokens divided by a constant (`dr_grpo`).
    """

    beta: float | None = None
    """Strength of the comparison (`orpo`: weight of the odds ratio; `grpo`: weight of the KL divergence from the
    reference); when not given 2.0 for `simpo`, 0 for `grpo`, else 0.1.
    """

    label_smoothing: float = 0.0
    """Probability that the two sides of a pair are exchanged (`dpo` with `sigmoid`)."""

    sft_weight: float = 0.0
    """Weight of the loss of chosen answers, in nats per chosen token of the window, added to `dpo`."""

    gamma_beta_ratio: float = 0.5
    """Margin that `simpo` asks for, as a part of beta."""

    desirable_weight: float = 1.0
    """Weight of desirable answers in `kto`."""

    undesirable_weight: float = 1.0
    """Weight of undesirable answers in `kto`."""

    num_generations: int = 8
    """Answers that `grpo` draws to each prompt; a step has `training.batch_size` x `gradient_accumulation_steps`
    prompts.
    """

    max_new_tokens: int = 256
    """Longest answer that `grpo` draws, in tokens."""

    temperature: float = 1.0
    """Temperature at which `grpo` draws answers."""

    steps_per_generation: int = 1
    """Steps for which `grpo` draws answers at once: from the second of them on, the policy is no longer the one that
    drew, and the ratio of the two is clipped.
    """

    rewards: Mapping[str, float] = field(default_factory=dict)
    """Rewards of `grpo` and their weights: `exact`, `contains`, `f1`, `number` and `json_fields` compare with the
    row's answer, `regex` asks for `reward_pattern`, `length` punishes answers that are nearly too long, `model` is the
    score of `reward_model`.
    `--reward FILE.py:FUNCTION` adds one of your own.
    """

    reward_pattern: str | None = None
    """Regular expression that an answer holds to earn the reward `regex`."""

    reward_model: str | None = None
    """Run or folder of a model that was trained with `method: reward`; its score is the reward `model`."""

    scale_rewards: bool = True
    """Divide the advantages of a prompt's answers by the standard deviation of their rewards (`grpo`)."""

    clip: float = 0.2
    """Distance from 1 below which the ratio of probabilities no longer counts (`grpo`)."""

    clip_high: float = 0.28
    """The same above 1; more than `clip` keeps unlikely tokens possible."""

    mask_truncated: bool = False
    """Leave answers that reached `max_new_tokens` out of the loss (`grpo`)."""

    reference: Literal["auto", "base", "start", "precomputed", "model"] = "auto"
    """Model that `dpo`, `kto` and (with `beta`) `grpo` compare with: `base` is the model without its adapter, `start` a
    frozen copy of what is trained as it was before step 1, `precomputed` the same measured once before step 1, `model`
    that of `reference_model`. `auto` takes `base` where training begins with a new adapter, else `start`.
    """

    reference_model: str | None = None
    """A second model that answers are compared with, frozen: its tokens must have the same ids."""

    reference_revision: str | None = None
    """Revision of `reference_model` on the hub."""

    @property
    def trains_head(self) -> bool:
        """Whether a head that gives scores is trained in the place of the one that predicts tokens."""
        return self.method in ("reward", "classification")


# `evaluation.*`


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements on held-out rows, and their steps."""

    every_steps: int | float | None = None
    """Evaluate after every so many steps (below 1: this fraction of all steps); only before and after training when
    neither this nor `every_epochs` is given.
    """

    every_epochs: float | None = None
    """Evaluate after every so many epochs; 0.25 is four times an epoch."""

    before_training: bool = True
    """Evaluate the model before training, for comparison."""

    prompts: tuple[str, ...] = ()
    """Prompts the model answers at each evaluation; written to samples.jsonl."""

    max_new_tokens: int = 128
    """Longest answer to a prompt, in tokens."""

    temperature: float = 0.0
    """For the answers to `evaluation.prompts`: 0 takes the most likely token, above 0 tokens are drawn, with `run.seed`
    as their seed.
    """

    top_k: int = 0
    """Draw from so many most likely tokens; 0 from all."""

    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability."""

    repetition_penalty: float = 1.0
    """Above 1, tokens that stand before become less likely in the answers to `evaluation.prompts`."""

    stop: tuple[str, ...] = ()
    """Texts that end an answer to `evaluation.prompts`."""

    exact_match: bool = False
    """Before and after training, answer the held-out prompts greedily and count the answers that equal the reference
    exactly.
    """

    score: Literal["exact", "contains", "f1", "number"] | None = None
    """At each evaluation, answer the held-out prompts greedily and judge the answers: the mean is `eval_score`. `f1`
    compares words, `number` the last number; `--score FILE.py:FUNCTION` judges by a function of your own.
    """

    best_by: str = "eval_mean_nll"
    """Metric of the held-out rows by which the best model is chosen and early stopping decides; the highest
    `eval_exact_answers`, `eval_score` or accuracy is the best, of every other metric the lowest value.
    """

    batch_size: int | None = None
    """Sequences evaluated at once; `training.batch_size` when not given. The result does not depend on it."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without improvement."""

    early_stopping_threshold: float = 0.0
    """Smallest improvement of `evaluation.best_by` (a fall of the held-out loss, in nats per token) that counts."""


# `checkpoint.*`


@dataclass(frozen=True)
class CheckpointConfig:
    """Steps at which the run is saved, and checkpoints that are kept."""

    every_steps: int | float | None = None
    """Save after every so many steps (below 1: this fraction of all steps); at each epoch's end when neither this nor
    `every_epochs` is given. The end and a stop always save.
    """

    every_epochs: float | None = None
    """Save after every so many epochs; 0.25 is four times an epoch."""

    keep_last: int = 3
    """Newest checkpoints kept; older ones are deleted once their successor is verified. 0 keeps all."""

    keep_best: bool = True
    """Keep the model that is best by `evaluation.best_by`, of those evaluated after at least one step, in
    checkpoints/best.
    """

    final: Literal["auto", "last", "best"] = "auto"
    """Model that becomes the result, `final/`: that of the last step, or the best. `auto` takes the best where training
    was stopped early, else the last.
    """


# `tracking.*`


@dataclass(frozen=True)
class TrackingConfig:
    """Trackers that receive the metrics of each step."""

    every_steps: int = 1
    """Steps between two lines of metrics."""

    trackers: tuple[Literal["console", "jsonl", "system", "tensorboard", "wandb", "mlflow", "trackio"], ...] = (
        "console",
        "jsonl",
        "system",
        "tensorboard",
    )
    """Trackers that receive the metrics; `system` writes the figures of the machine."""

    project: str = "llmtune"
    """Project name for trackers that have projects."""

    tags: tuple[str, ...] = ()
    """Tags for trackers beside `run.tags`."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of wandb; its own setting (WANDB_MODE) when not given."""

    wandb_entity: str | None = None
    """User or team that the run belongs to on wandb; its own setting (WANDB_ENTITY) when not given."""

    wandb_group: str | None = None
    """Group of runs on wandb; its own setting (WANDB_RUN_GROUP) when not given."""

    watch: Literal[False, "gradients", "all"] = False
    """Send histograms of gradients, or of gradients and weights, and the gradient norm of each block, to trackers that
    take them.
    """

    graph: bool = False
    """Draw the model's operations in TensorBoard (two of its blocks: the others are alike)."""


# `distributed.*`


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes training one model."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """How several processes hold the weights: each all of them (`ddp`) or a part of each (`fsdp`), or by ZeRO
    (`deepspeed`, an extra). `auto`: `deepspeed` where `zero_stage` or `deepspeed_config` is set; else `ddp` where the
    planned memory fits, else `fsdp`.
    """

    zero_stage: int | None = None
    """What `deepspeed` divides: the optimizer state (1), gradients too (2), weights too (3). The file's, or 3, when not
    given.
    """

    offload: Literal["none", "optimizer", "all"] | None = None
    """What waits in the memory of the host: the optimizer's state (`deepspeed`), or weights too (`fsdp`, or `deepspeed`
    with stage 3). The file's, or `none`, when not given.
    """

    sequence_parallel: int = 1
    """Processes that share each row, for rows too long for one device: each computes a part of its positions, and all
    positions of a part of the attention heads (Ulysses). Divides the processes and the model's attention heads.
    """

    deepspeed_config: str | None = None
    """JSON file of DeepSpeed's own settings; what llmtune decides itself must agree with it or be `auto`."""

    timeout_s: float = 120.0
    """Seconds after which a process counts as lost: one that does not answer, or is at rest while others wait for it.
    One that starts, evaluates, saves or runs code of your own may take longer."""


@dataclass(frozen=True)
class SweepConfig:
    """The section `sweep` of a file for `llmtune sweep`, beside its `keys`; no part of a run's config."""

    name: str | None = None
    """Folder of the runs, below `run.output_dir`; the file's name when not given."""

    method: Literal["grid", "random"] = "grid"
    """`grid`: every combination of the values. `random`: `runs` draws from the values and ranges."""

    runs: int | None = None
    """Draws of `random`."""

    seed: int = 0
    """Seed of the draws. More `runs` with the same seed keep those that were drawn before."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives and what it is called."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is trained."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The part of it that is trained."""

    data: DataConfig = field(default_factory=DataConfig)
    """The rows it is trained on."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How weights are updated."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What it minimizes."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measurements on held-out rows."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Metrics and their trackers."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""
