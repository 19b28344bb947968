"""Keys whose values contradict each other, as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from llmtune.common.text import excerpt
from llmtune.config.contradiction import Contradiction
from llmtune.config.distributed_checks import DISTRIBUTED_CONTRADICTIONS, WEIGHT_CONTRADICTIONS
from llmtune.config.document import Origin
from llmtune.config.dump import value_text
from llmtune.config.keys import value_of
from llmtune.config.objective_checks import OBJECTIVE_CONTRADICTIONS
from llmtune.config.schema import Config, ObjectiveConfig
from llmtune.errors import Problem

__all__ = ["CONTRADICTIONS", "Contradiction", "contradictions"]


def contradictions(config: Config, origins: Mapping[str, Origin], failed: Collection[str] = ()) -> list[Problem]:
    """Return every contradiction between keys that were read; each names where their values are written."""
    problems = []
    # Most runs compare no answers, and need not go through what contradicts a comparison.
    compares = config.objective != ObjectiveConfig()
    for row in CONTRADICTIONS if compares else _OF_EVERY_RUN:
        if not any(key in failed for key in row.keys) and row.when(config, origins):
            given = [key for key in row.keys if _is_given(origins, key)]
            where = " and ".join(dict.fromkeys(origins[key].where for key in given))
            values = ", ".join(f"`{key}: {excerpt(value_text(value_of(config, key)))}`" for key in given)
            problems.append(Problem(f"{row.problem} ({values})" if values else row.problem, where or None, row.fix))
    return problems


def _is_given(origins: Mapping[str, Origin], key: str) -> bool:
    return origins[key].kind != "default"


def _has_held_out(config: Config) -> bool:
    return bool(config.data.eval) or config.data.test_size > 0


def _intervals(config: Config, section: str) -> tuple[float | None, float | None]:
    part = getattr(config, section)
    return part.every_steps, part.every_epochs


def _evaluates(config: Config) -> bool:
    return _intervals(config, "evaluation") != (None, None)


def _does_not_divide(divisor: int | None, number: int | None) -> bool:
    return divisor is not None and number is not None and number % divisor != 0


_LORA_KEYS = (
    "start_from",
    "init",
    "exclude_modules",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "r",
    "alpha",
    "dropout",
    "target_modules",
    "rslora",
    "dora",
    "modules_to_save",
)

_OF_EVERY_RUN: tuple[Contradiction, ...] = (
    Contradiction(
        ("data.one_example_per_turn", "data.train_on"),
        lambda c, _: (
            c.data.one_example_per_turn
            and "all_tokens" in {c.data.train_on, *(source.train_on for source in (*c.data.train, *c.data.eval))}
        ),
        "every token would be trained once for each later turn",
        "set `data.train_on: all_messages`, or `data.one_example_per_turn: false`",
    ),
    Contradiction(
        ("model.quantization", "adapter.method"),
        lambda c, _: c.model.quantization != "none" and c.adapter.method == "none",
        "a quantized base is frozen, so it needs an adapter to train",
        "set `adapter.method: lora`, or `model.quantization: none`",
    ),
    *(
        Contradiction(
            (f"adapter.{name}", "adapter.method"),
            lambda _, origins, name=name: (
                _is_given(origins, f"adapter.{name}") and not _is_given(origins, "adapter.method")
            ),  # type: ignore[misc]
            "this adapter setting does nothing without an adapter",
            "set `adapter.method: lora` (or `none` to say that every weight is trained)",
        )
        for name in _LORA_KEYS
    ),
    Contradiction(
        ("model.train_only", "adapter.method"),
        lambda c, _: bool(c.model.train_only) and c.adapter.method != "none",
        "an adapter freezes the whole model, and some of its own parameters are to be trained",
        "name modules with `adapter.modules_to_save`, or set `adapter.method: none`",
    ),
    Contradiction(
        ("adapter.init", "adapter.start_from"),
        lambda c, _: c.adapter.init != "kaiming" and c.adapter.start_from is not None,
        "an adapter that is started from has its first values",
        "remove one of the two",
    ),
    Contradiction(
        ("adapter.init", "model.quantization"),
        lambda c, _: c.adapter.takes_from_base and c.model.quantization != "none",
        "it changes the base's weights, and quantized again they are others than the base that is saved with the run",
        "set `model.quantization: none`, or `adapter.init: orthogonal`",
    ),
    Contradiction(
        ("adapter.init", "model.quantization"),
        lambda c, _: c.adapter.init == "loftq" and c.model.quantization != "4bit",
        "it begins with what quantizing to 4 bits took from the base",
        "set `model.quantization: 4bit`, or `adapter.init: pissa`",
    ),
    Contradiction(
        ("training.loraplus_lr_ratio", "adapter.method"),
        lambda c, _: c.training.loraplus_lr_ratio is not None and c.adapter.method == "none",
        "LoRA+ sets the rates of an adapter's matrices, and none is trained",
        "set `adapter.method: lora`, or remove the ratio",
    ),
    Contradiction(
        ("training.warmup_steps", "training.warmup_ratio"),
        lambda c, _: c.training.warmup_steps is not None and c.training.warmup_ratio is not None,
        "warm-up is given both in steps and as a ratio",
        "set one of them to null",
    ),
    Contradiction(
        ("training.lr_schedule", "training.warmup_steps", "training.warmup_ratio"),
        lambda c, _: c.training.lr_schedule == "constant" and bool(c.training.warmup_steps or c.training.warmup_ratio),
        "the schedule `constant` has no warm-up",
        "set `training.lr_schedule: constant_with_warmup`, or the warm-up to null",
    ),
    Contradiction(
        ("training.min_lr_ratio", "training.lr_schedule"),
        lambda c, _: c.training.min_lr_ratio > 0 and c.training.lr_schedule.startswith("constant"),
        "a constant schedule has no lower end",
        "set `training.min_lr_ratio: 0`, or another `training.lr_schedule`",
    ),
    Contradiction(
        ("training.warmup_steps", "training.max_steps"),
        lambda c, _: (
            c.training.warmup_steps is not None
            and c.training.max_steps is not None
            and c.training.warmup_steps > c.training.max_steps
        ),
        "the warm-up is longer than the training",
        "lower `training.warmup_steps`",
    ),
    Contradiction(
        ("training.precision", "model.dtype", "adapter.method"),
        lambda c, _: c.training.precision == "fp16" and c.model.dtype == "float16" and c.adapter.method == "none",
        "fp16 arithmetic cannot scale the gradients of weights that are float16 themselves",
        "set `model.dtype: auto`",
    ),
    Contradiction(
        ("training.step_in_backward", "training.max_grad_norm"),
        lambda c, _: c.training.step_in_backward and c.training.max_grad_norm is not None,
        "weights that move in the backward pass cannot be clipped by a norm that is known only after it",
        "set `training.max_grad_norm: null` to train without clipping, or `training.step_in_backward: false`",
    ),
    Contradiction(
        ("training.step_in_backward", "training.precision"),
        lambda c, _: c.training.step_in_backward and c.training.precision == "fp16",
        "fp16's loss scale skips steps whose gradients overflow, "
        "and weights that move in the backward pass have moved by then",
        "set `training.precision: bf16` (or fp32), or `training.step_in_backward: false`",
    ),
    Contradiction(
        ("training.step_in_backward", "tracking.watch"),
        lambda c, _: c.training.step_in_backward and bool(c.tracking.watch),
        "histograms are taken while all gradients are there, "
        "and weights that move in the backward pass leave no such moment",
        "set `tracking.watch: false`, or `training.step_in_backward: false`",
    ),
    Contradiction(
        ("training.compile", "model.gradient_checkpointing"),
        lambda c, _: c.training.compile and c.model.gradient_checkpointing == "offload",
        "blocks whose inputs wait in host memory cannot be compiled",
        "set `training.compile: false`, or `model.gradient_checkpointing: true`",
    ),
    Contradiction(
        ("evaluation.early_stopping_patience", "data.test_size", "data.eval"),
        lambda c, _: c.evaluation.early_stopping_patience is not None and not _has_held_out(c),
        "early stopping watches the held-out loss, but no rows are held out",
        "set `data.test_size` or `data.eval`, or the patience to null",
    ),
    Contradiction(
        ("evaluation.early_stopping_patience", "evaluation.every_steps"),
        lambda c, _: c.evaluation.early_stopping_patience is not None and not _evaluates(c),
        "early stopping needs evaluations during training",
        "set `evaluation.every_steps` or `evaluation.every_epochs`",
    ),
    Contradiction(
        ("evaluation.early_stopping_threshold", "evaluation.early_stopping_patience"),
        lambda c, _: c.evaluation.early_stopping_threshold > 0 and c.evaluation.early_stopping_patience is None,
        "the threshold of early stopping does nothing without a patience",
        "set `evaluation.early_stopping_patience`",
    ),
    Contradiction(
        ("checkpoint.final", "checkpoint.keep_best"),
        lambda c, _: c.checkpoint.final == "best" and not c.checkpoint.keep_best,
        "the best model cannot become the result unless it is kept",
        "set `checkpoint.keep_best: true`, or `checkpoint.final: last`",
    ),
    Contradiction(
        ("checkpoint.final", "data.test_size", "data.eval"),
        lambda c, _: c.checkpoint.final == "best" and not _has_held_out(c),
        "which model is the best is decided by held-out rows, and there are none",
        "set `data.test_size` or `data.eval`, or `checkpoint.final: last`",
    ),
    Contradiction(
        ("evaluation.top_k", "evaluation.temperature"),
        lambda c, _: c.evaluation.top_k > 0 and c.evaluation.temperature == 0,
        "no token is drawn at temperature 0, so this changes nothing",
        "set `evaluation.temperature: 0.7`, or leave `evaluation.top_k` out",
    ),
    Contradiction(
        ("evaluation.top_p", "evaluation.temperature"),
        lambda c, _: c.evaluation.top_p < 1 and c.evaluation.temperature == 0,
        "no token is drawn at temperature 0, so this changes nothing",
        "set `evaluation.temperature: 0.7`, or leave `evaluation.top_p` out",
    ),
    Contradiction(
        ("evaluation.score", "data.test_size", "data.eval"),
        lambda c, _: c.evaluation.score is not None and not _has_held_out(c),
        "answers to held-out prompts are judged, and no rows are held out",
        "set `data.test_size` or `data.eval`, or `evaluation.score: null`",
    ),
    Contradiction(
        ("evaluation.best_by", "evaluation.exact_match"),
        lambda c, _: c.evaluation.best_by.startswith("eval_exact") and not c.evaluation.exact_match,
        "the best model is chosen by exact answers, and they are not counted",
        "set `evaluation.exact_match: true`",
    ),
    Contradiction(
        ("evaluation.every_steps", "data.test_size", "data.eval", "evaluation.prompts"),
        lambda c, _: c.evaluation.every_steps is not None and not _has_held_out(c) and not c.evaluation.prompts,
        "there is nothing to evaluate: no held-out rows and no prompts",
        "set `data.test_size` or `data.eval` or `evaluation.prompts`, or `evaluation.every_steps: null`",
    ),
    Contradiction(
        ("evaluation.every_epochs", "data.test_size", "data.eval", "evaluation.prompts"),
        lambda c, _: c.evaluation.every_epochs is not None and not _has_held_out(c) and not c.evaluation.prompts,
        "there is nothing to evaluate: no held-out rows and no prompts",
        "set `data.test_size` or `data.eval` or `evaluation.prompts`, or `evaluation.every_epochs: null`",
    ),
    *(
        Contradiction(
            (f"{section}.every_steps", f"{section}.every_epochs"),
            lambda c, _, section=section: None not in _intervals(c, section),  # type: ignore[misc]
            "the interval is given both in steps and in epochs",
            "set one of them to null",
        )
        for section in ("evaluation", "checkpoint")
    ),
    Contradiction(
        ("training.num_cycles", "training.lr_schedule"),
        lambda c, _: c.training.num_cycles > 1 and c.training.lr_schedule != "cosine_with_restarts",
        "only one schedule has cycles",
        "set `training.lr_schedule: cosine_with_restarts`, or `training.num_cycles: 1`",
    ),
    Contradiction(
        ("data.min_length", "data.max_length"),
        lambda c, _: c.data.min_length is not None and c.data.min_length > c.data.max_length,
        "no row can be that long and that short",
        "lower `data.min_length`, or raise `data.max_length`",
    ),
    Contradiction(
        ("data.text_column", "data.format"),
        lambda c, _: c.data.text_column is not None and c.data.format not in ("auto", "text"),
        "only text rows have a text column",
        "set `data.format: text`, or remove `data.text_column`",
    ),
    Contradiction(
        ("data.train", "data.packing"),
        lambda c, _: c.data.packing != "none" and any(source.share or source.repeat % 1 for source in c.data.train),
        "packs are laid once, and rows of a `share` or of a fraction of `repeat` are drawn anew each epoch",
        "set `data.packing: none`, or whole numbers of `repeat`",
    ),
    Contradiction(
        ("data.max_length", "model.architecture.max_seq_len"),
        lambda c, origins: (
            c.model.architecture.max_seq_len is not None
            and c.data.max_length > c.model.architecture.max_seq_len
            and _is_given(origins, "data.max_length")  # else it is fitted to the model
        ),
        "examples may be longer than the model can see",
        "lower `data.max_length`, or raise `model.architecture.max_seq_len`",
    ),
    Contradiction(
        ("model.architecture.d_model", "model.architecture.n_heads"),
        lambda c, _: _does_not_divide(c.model.architecture.n_heads, c.model.architecture.d_model),
        "the heads must divide the width evenly",
        "make `d_model` a multiple of `n_heads`",
    ),
    Contradiction(
        ("model.architecture.n_heads", "model.architecture.n_kv_heads"),
        lambda c, _: _does_not_divide(c.model.architecture.n_kv_heads, c.model.architecture.n_heads),
        "the key/value heads must divide the heads evenly",
        "make `n_heads` a multiple of `n_kv_heads`",
    ),
    Contradiction(
        ("tracking.graph", "tracking.trackers"),
        lambda c, _: c.tracking.graph and "tensorboard" not in c.tracking.trackers,
        "a graph is drawn by TensorBoard alone, and it is not a tracker",
        "add `tensorboard` to `tracking.trackers`, or remove the graph",
    ),
    Contradiction(
        ("tracking.wandb_mode", "tracking.trackers"),
        lambda c, _: c.tracking.wandb_mode is not None and "wandb" not in c.tracking.trackers,
        "a mode for wandb does nothing while wandb is not a tracker",
        "add `wandb` to `tracking.trackers`, or remove the mode",
    ),
    Contradiction(
        ("tracking.wandb_entity", "tracking.trackers"),
        lambda c, _: c.tracking.wandb_entity is not None and "wandb" not in c.tracking.trackers,
        "an entity of wandb does nothing while wandb is not a tracker",
        "add `wandb` to `tracking.trackers`, or remove the entity",
    ),
    Contradiction(
        ("tracking.wandb_group", "tracking.trackers"),
        lambda c, _: c.tracking.wandb_group is not None and "wandb" not in c.tracking.trackers,
        "a group of wandb does nothing while wandb is not a tracker",
        "add `wandb` to `tracking.trackers`, or remove the group",
    ),
    Contradiction(
        ("tracking.watch", "tracking.trackers"),
        lambda c, _: bool(c.tracking.watch) and not {"tensorboard", "wandb"} & set(c.tracking.trackers),
        "no tracker takes histograms",
        "add `tensorboard` or `wandb` to `tracking.trackers`, or set `tracking.watch: false`",
    ),
    *DISTRIBUTED_CONTRADICTIONS,
    *WEIGHT_CONTRADICTIONS,
    Contradiction(
        ("data.format", "data.train", "data.eval", "objective.method"),
        lambda c, _: (
            c.objective.method == "sft"
            and bool(
                {"preference", "unpaired", "prompt", "classification"}
                & {c.data.format, *(source.format for source in (*c.data.train, *c.data.eval))}
            )
        ),
        "rows of this format are for methods that compare answers, and supervised fine-tuning compares none",
        "set `objective.method` to dpo, simpo, orpo, reward (pairs), kto, grpo (prompts) or classification, or another "
        "format",
    ),
)

CONTRADICTIONS: tuple[Contradiction, ...] = (*_OF_EVERY_RUN, *OBJECTIVE_CONTRADICTIONS)
