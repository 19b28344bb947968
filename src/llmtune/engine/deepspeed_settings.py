"""DeepSpeed's settings of a run: what llmtune decides itself, and the user's own JSON file around it.

A key of the file that llmtune decides must have its value or be `auto`; one that would change what is trained is
refused; all others are passed on, and named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune.common.decisions import Decision
from llmtune.config.schema import Config
from llmtune.errors import ConfigError, Problem

__all__ = ["check_deepspeed", "engine_settings", "offload_of", "settings_problems", "zero_stage_of"]

Settings = dict[str, Any]


OLDEST_DEEPSPEED = (0, 19, 8)
"""The first with windows of any number of backward passes (`managed_gradient_accumulation: false`)."""


def check_deepspeed(config: Config) -> None:
    """Raise ConfigError, for a config that takes DeepSpeed, where the package or the file of settings does not fit."""
    problems = settings_problems(config)
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        problem = "the package `deepspeed` is not installed"
    else:
        is_old = tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_DEEPSPEED
        problem = f"DeepSpeed {version} is too old" if is_old else ""
    if problem:
        oldest = ".".join(map(str, OLDEST_DEEPSPEED))
        fix = f"install it (`pip install 'llmtune[deepspeed]'`, {oldest} or newer), or set `distributed.strategy: fsdp`"
        problems.insert(0, Problem(problem, "distributed.strategy", fix))
    if problems:
        raise ConfigError.all(problems)


def settings_problems(config: Config) -> list[Problem]:
    """Give what is wrong with the file that the config names; nothing where it names none."""
    name = config.distributed.deepspeed_config
    if name is None:
        return []
    try:
        file = _read(name)
    except ConfigError as error:
        return list(error.problems)
    problems = []
    for key, value in _leaves(file):
        if value == "auto":
            continue
        if key in OWN:
            wanted, decided_by = OWN[key][0](config), OWN[key][1]
            if not _is_met(value, wanted):
                makes = "leaves it open" if wanted is None else f"makes it {json.dumps(wanted)}"
                problem = f"`{key}` is {json.dumps(value)}, but `{decided_by}` {makes}"
                problems.append(Problem(problem, name, f'set `{key}: "auto"`, and `{decided_by}` to what you want'))
        elif (reason := _refusal(key)) is not None and value not in (False, None, "none"):
            problems.append(Problem(f"`{key}` is {json.dumps(value)}: {reason}", name, "take it out of the file"))
    return problems


def _refusal(key: str) -> str | None:
    return next((reason for start, reason in REFUSED.items() if f"{key}.".startswith(f"{start}.")), None)


def zero_stage_of(config: Config) -> int:
    """Give the stage of ZeRO: the config's, else the file's, else 3."""
    if config.distributed.zero_stage is not None:
        return config.distributed.zero_stage
    stage = _zero_section(config).get("stage", "auto")
    return 3 if stage == "auto" else int(stage)


def offload_of(config: Config) -> str:
    """Give what waits on the host: the config's `distributed.offload`, else the file's, else `none`."""
    if config.distributed.offload is not None:
        return config.distributed.offload
    section = _zero_section(config)
    for part, name in (("offload_param", "all"), ("offload_optimizer", "optimizer")):
        if isinstance(section.get(part), dict) and section[part].get("device") == "cpu":
            return name
    return "none"


def engine_settings(
    config: Config, *, world_size: int, hidden_size: int, page_locked: bool
) -> tuple[Settings, list[Decision]]:
    """Give the settings of DeepSpeed's engine, and what became of the file's keys.

    The engine's own counts are of one row for each process, because it is not told of windows: they are any number of
    backward passes, and one step. hidden_size: of the model, from which `auto` sizes of buffers follow. page_locked:
    memory of the host that a GPU copies from directly.
    """
    name = config.distributed.deepspeed_config
    file = {} if name is None else _read(name)
    resolved, passed_on = _passed_on(file, hidden_size)
    stage, offload = zero_stage_of(config), offload_of(config)
    zero = {**resolved.pop("zero_optimization", {}), "stage": stage}
    on_host = {"device": "cpu", "pin_memory": page_locked}
    for part, wanted in (("offload_optimizer", offload != "none"), ("offload_param", offload == "all")):
        if wanted:
            zero[part] = {**on_host, **_section(zero, part), "device": "cpu"}
        else:
            zero.pop(part, None)
    if stage == 1:
        zero["overlap_comm"] = False  # there is nothing that windows of our own could overlap with
    settings = {
        "steps_per_print": 2**31,
        **resolved,
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.training.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    decisions = []
    if name is not None:
        said = f"passed on as they are: {', '.join(passed_on)}" if passed_on else "nothing in it is passed on"
        decisions.append(Decision("distributed.deepspeed_config", name, said))
    if offload != "none":
        reason = "asked for: it waits in the host's memory, and the optimizer moves it there"
        decisions.append(Decision("distributed.offload", offload, reason))
    return settings, decisions


def _passed_on(file: Settings, hidden_size: int) -> tuple[Settings, list[str]]:
    """Give the file without what llmtune decides, its `auto` values resolved, and the names of what is left."""
    left: Settings = {}
    names = []
    for key, value in _leaves(file):
        if key in OWN or _refusal(key) is not None:
            continue
        if value == "auto":
            if key not in AUTO:
                continue  # DeepSpeed has a default of its own
            value = AUTO[key](hidden_size)
        *sections, last = key.split(".")
        place = left
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
        names.append(key)
    return left, names


def _read(name: str) -> Settings:
    """Read the file. Raises ConfigError for one that is missing or is no JSON object."""
    fix = "name a JSON file of DeepSpeed's settings, or remove `distributed.deepspeed_config`"
    try:
        file = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "is no JSON"
        raise ConfigError(f"the DeepSpeed file {what}: {error}", where=name, fix=fix) from error
    if not isinstance(file, dict):
        raise ConfigError("the DeepSpeed file is no JSON object", where=name, fix=fix)
    return file


def _zero_section(config: Config) -> Settings:
    name = config.distributed.deepspeed_config
    return {} if name is None else _section(_read(name), "zero_optimization")


def _section(table: Settings, key: str) -> Settings:
    section = table.get(key)
    return section if isinstance(section, dict) else {}


def _leaves(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Give every value with its dotted name; of a section that is off, only that.

    >>> _leaves({"a": 1, "b": {"c": 2}, "fp16": {"enabled": False, "loss_scale_window": 1000}})
    [('a', 1), ('b.c', 2), ('fp16.enabled', False)]
    """
    leaves: list[tuple[str, Any]] = []
    is_off = "enabled" in table and table["enabled"] in (False, "auto")
    for key, value in table.items():
        if is_off and key != "enabled":
            continue
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return leaves


def _is_met(value: object, wanted: object) -> bool:
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _global_batch(config: Config) -> object:
    size = config.training.batch_size
    return size if size == "auto" else size * config.training.gradient_accumulation_steps


OWN: dict[str, tuple[Callable[[Config], object], str]] = {
    "train_batch_size": (_global_batch, "training.batch_size"),
    "train_micro_batch_size_per_gpu": (lambda c: c.training.batch_size, "training.batch_size"),
    "gradient_accumulation_steps": (
        lambda c: c.training.gradient_accumulation_steps,
        "training.gradient_accumulation_steps",
    ),
    "gradient_clipping": (lambda c: c.training.max_grad_norm or 0.0, "training.max_grad_norm"),
    "bf16.enabled": (lambda c: c.training.precision == "bf16", "training.precision"),
    "fp16.enabled": (lambda c: c.training.precision == "fp16", "training.precision"),
    "zero_optimization.stage": (zero_stage_of, "distributed.zero_stage"),
    "zero_optimization.offload_optimizer.device": (
        lambda c: "cpu" if offload_of(c) != "none" else "none",
        "distributed.offload",
    ),
    "zero_optimization.offload_param.device": (
        lambda c: "cpu" if offload_of(c) == "all" else "none",
        "distributed.offload",
    ),
    "managed_gradient_accumulation": (lambda _: False, "distributed.strategy"),
    "zero_allow_untested_optimizer": (lambda _: True, "training.optimizer"),
    "zero_force_ds_cpu_optimizer": (lambda _: False, "training.optimizer"),
    "optimizer.type": (lambda _: "AdamW", "training.optimizer"),
    "optimizer.params.lr": (lambda c: c.training.learning_rate, "training.learning_rate"),
    "optimizer.params.betas": (lambda c: list(c.training.betas), "training.betas"),
    "optimizer.params.eps": (lambda c: c.training.eps, "training.eps"),
    "optimizer.params.weight_decay": (lambda c: c.training.weight_decay, "training.weight_decay"),
}
"""Keys that llmtune decides: their value by the config, and the key of it that does."""

_ANOTHER = "it would change what is trained, or how exactly"
REFUSED: dict[str, str] = {
    "scheduler": "the learning rate follows `training.lr_schedule`",
    "optimizer.params": "`training.optimizer` is set up by the section `training`",
    "amp": "the arithmetic is `training.precision`",
    "torch_autocast": "the arithmetic is `training.precision`",
    "bf16": "the arithmetic is `training.precision`",
    "fp16": "the arithmetic is `training.precision`",
    "checkpoint": "checkpoints are llmtune's own, and no file of DeepSpeed's format is written",
    "nebula": "checkpoints are llmtune's own, and no file of DeepSpeed's format is written",
    "load_universal_checkpoint": "checkpoints are llmtune's own, and no file of DeepSpeed's format is read",
    "activation_checkpointing": "blocks are recomputed by `model.gradient_checkpointing`",
    "zero_optimization.zero_quantized_weights": _ANOTHER,
    "zero_optimization.zero_quantized_gradients": _ANOTHER,
    "zero_optimization.zero_quantized_nontrainable_weights": _ANOTHER,
    "zero_optimization.zenflow": _ANOTHER,
    "zero_optimization.offload_optimizer.nvme_path": "what lies on a disk cannot be saved: only `cpu` is offloaded to",
    "zero_optimization.offload_param.nvme_path": "what lies on a disk cannot be saved: only `cpu` is offloaded to",
    "elasticity": _ANOTHER,
    "curriculum_learning": _ANOTHER,
    "data_efficiency": _ANOTHER,
    "compression_training": _ANOTHER,
    "sparse_attention": _ANOTHER,
    "pipeline": _ANOTHER,
    "tensor_parallel": _ANOTHER,
    "sequence_parallel_size": "rows are shared by `distributed.sequence_parallel`",
    "autotuning": "it starts trainings of its own",
}
"""Keys, or sections, that no run takes, with the reason."""

AUTO: dict[str, Callable[[int], object]] = {
    "zero_optimization.reduce_bucket_size": lambda hidden: hidden * hidden,
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""`auto` sizes from the width of the model, as other toolkits that read such files set them."""
