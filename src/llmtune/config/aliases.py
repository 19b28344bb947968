"""Other toolkits' names for our keys: rows of tables, each accepted with one line that says the name used here.

Three tables: `NAMES` (another name, same value; in `names.py`), `TRANSLATED` (another way to say it) and `NOT_HERE`
(refused, and why). A name with a dot stands in a section of that name. `FLAT_SECTIONS` are sections whose content is
read as if it stood at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

from llmtune.config.convert import Mismatch
from llmtune.config.document import Listing, Node, Scalar
from llmtune.config.other_toolkits_names import FLAT_SECTIONS, LORA_SECTIONS, NAMES
from llmtune.config.schema import TrainOn

__all__ = [
    "FLAT_SECTIONS",
    "LORA_SECTIONS",
    "NAMES",
    "NOT_HERE",
    "SECTION_VALUES",
    "TRANSLATED",
    "VALUES",
    "Change",
    "other_names",
]


class Change(NamedTuple):
    """What another toolkit's key asks for here.

    A weak change gives way to anything else the same file says about that key.
    """

    key: str
    value: Node
    weak: bool = False


Translation = Callable[[Node], list[Change]]

_YES = {"true", "yes", "on", "1"}
_NO = {"false", "no", "off", "0"}


def _is_on(node: Node) -> bool:
    text = node.text.lower() if isinstance(node, Scalar) else ""
    if text not in _YES | _NO:
        raise Mismatch("true or false", node)
    return text in _YES


def _says(node: Node, text: str) -> Scalar:
    return Scalar(text, False, node.origin)


def _switch(key: str, on: str, off: str, *, is_vague: bool = False) -> Translation:
    """`true` asks for `on`; `false` asks for `off`, unless the same file asks for something else.

    A vague `true` gives way likewise.
    """

    def translate(node: Node) -> list[Change]:
        is_on = _is_on(node)
        return [Change(key, _says(node, on if is_on else off), weak=is_vague or not is_on)]

    return translate


def _words(key: str, words: dict[str, str]) -> Translation:
    """Another spelling of a choice; a spelling that is not in the table goes on as it is."""

    def translate(node: Node) -> list[Change]:
        text = node.text.lower() if isinstance(node, Scalar) else ""
        return [Change(key, _says(node, words[text]) if text in words else node)]

    return translate


def _implies_lora(key: str) -> Translation:
    """A LoRA setting of a toolkit in which giving it turns LoRA on."""

    def translate(node: Node) -> list[Change]:
        return [Change(key, node), Change("adapter.method", _says(node, "lora"), weak=True)]

    return translate


def _report_to(node: Node) -> list[Change]:
    """The console and metrics.jsonl are always kept; `none` leaves them alone, `all` adds both others."""
    items = node.items if isinstance(node, Listing) else (node,)
    names = [item.text.lower() if isinstance(item, Scalar) else "" for item in items]
    if names in (["none"], [""], ["null"]):
        names = []
    if names == ["all"]:
        names = ["tensorboard", "wandb"]
    wanted = ["console", "jsonl", *names]
    return [Change("tracking.trackers", Listing(tuple(_says(node, name) for name in wanted), node.origin))]


def _use_wandb(node: Node) -> list[Change]:
    names = ("console", "jsonl", "tensorboard", "wandb") if _is_on(node) else ("console", "jsonl", "tensorboard")
    return [
        Change(
            "tracking.trackers", Listing(tuple(_says(node, name) for name in names), node.origin), weak=not _is_on(node)
        )
    ]


def _adapter(node: Node) -> list[Change]:
    """`adapter: qlora` is LoRA on a base held in 4 bit."""
    text = node.text.lower() if isinstance(node, Scalar) else ""
    if text == "qlora":
        return [Change("adapter.method", _says(node, "lora")), Change("model.quantization", _says(node, "4bit"))]
    return [Change("adapter.method", _says(node, "none" if text in ("", "full", "null") else text))]


def _recomputed(node: Node) -> list[Change]:
    """A plain `true` gives way to a request for offloading, which other toolkits write beside it."""
    is_plain = isinstance(node, Scalar) and node.text.lower() in _YES
    return [Change("model.gradient_checkpointing", node, weak=is_plain)]


def _offloaded(node: Node) -> list[Change]:
    return [Change("model.gradient_checkpointing", _says(node, "offload"))] if _is_on(node) else []


def _only(word: str, reason: str) -> Translation:
    """A key of which one value describes what happens here anyway; any other value is refused."""

    def translate(node: Node) -> list[Change]:
        if isinstance(node, Scalar) and node.text.lower() == word:
            return []
        raise Mismatch(f"`{word}`: {reason}", node)

    return translate


def _beta(index: int) -> Translation:
    """One of Adam's two betas; joined by the layer that reads them."""

    def translate(node: Node) -> list[Change]:
        return [Change(f"training.betas[{index}]", node)]

    return translate


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
_TRAIN_ON = {name: name for name in get_args(TrainOn)} | {
    "trainonwhat.all_assistant_messages": "all_assistant_messages"
}

TRANSLATED: dict[str, Translation] = {
    "use_lora": _switch("adapter.method", "lora", "none"),
    "use_peft": _switch("adapter.method", "lora", "none"),
    "finetuning_type": _adapter,
    "adapter": _adapter,
    **{
        name: _implies_lora(target)
        for name, target in NAMES.items()
        if target.startswith("adapter.") and "." not in name
    },
    **{name: _implies_lora(target) for name, target in NAMES.items() if name.split(".")[0] in LORA_SECTIONS},
    **{
        f"{section}.{name}": _implies_lora(NAMES[name])
        for section in LORA_SECTIONS
        for name in NAMES
        if NAMES[name].startswith("adapter.") and "." not in name
    },
    **{name: _recomputed for name, target in NAMES.items() if target == "model.gradient_checkpointing"},
    "activation_offloading": _offloaded,
    "enable_activation_offloading": _offloaded,
    "load_in_4bit": _switch("model.quantization", "4bit", "none"),
    "load_in_8bit": _switch("model.quantization", "8bit", "none"),
    "quantization_bit": _words("model.quantization", {"4": "4bit", "8": "8bit"}),
    "bf16": _switch("training.precision", "bf16", "fp32"),
    "fp16": _switch("training.precision", "fp16", "fp32"),
    "use_amp": _switch("training.precision", "auto", "fp32", is_vague=True),
    "amp_dtype": _words("training.precision", _PRECISIONS),
    "mixed_precision": _words("training.precision", _PRECISIONS),
    "torch_dtype": _words("model.dtype", _DTYPES),
    "dtype": _words("model.dtype", _DTYPES),
    "model_dtype": _words("model.dtype", _DTYPES),
    "attn_implementation": _words("model.attention", _ATTENTION),
    "flash_attn": _words("model.attention", {"true": "flash", "false": "auto", **_ATTENTION}),
    "flash_attention": _switch("model.attention", "flash", "auto"),
    "use_flash_attention": _switch("model.attention", "flash", "auto"),
    "use_flash_attention_2": _switch("model.attention", "flash", "auto"),
    "sdp_attention": _switch("model.attention", "sdpa", "auto"),
    "optim": _words("training.optimizer", _OPTIMIZERS),
    "optimizer": _words("training.optimizer", _OPTIMIZERS),
    "train_on_what": _words("data.train_on", _TRAIN_ON),
    "train_on": _words("data.train_on", _TRAIN_ON),
    "train_on_inputs": _switch("data.train_on", "all_tokens", "all_assistant_messages"),
    "assistant_only_loss": _switch("data.train_on", "all_assistant_messages", "all_tokens"),
    "packing": _words("data.packing", {"true": "best_fit", "false": "none"}),
    "sample_packing": _switch("data.packing", "best_fit", "none"),
    "pack_sequences": _switch("data.packing", "greedy", "none", is_vague=True),
    "report_to": _report_to,
    "use_wandb": _use_wandb,
    "use_deepspeed": _switch("distributed.strategy", "deepspeed", "auto"),
    "adam_beta1": _beta(0),
    "adam_beta2": _beta(1),
    "dataset_config": lambda node: [Change("data.train[].config", node)],
    "dataset_config_name": lambda node: [Change("data.train[].config", node)],
    "dataset_split": lambda node: [Change("data.train[].split", node)],
    "validation_split": lambda node: [Change("data.eval[].split", node)],
    "bnb_4bit_quant_type": _only("nf4", "4 bit is always NF4 here"),
    "bnb_4bit_use_double_quant": _only("true", "4 bit always quantizes its constants too"),
    "bnb_4bit_compute_dtype": _words("training.precision", _PRECISIONS),
    "bias": _only("none", "biases are trained in full tuning only"),
    "task_type": _only("causal_lm", "llmtune trains causal language models"),
    "stage": _only("sft", "llmtune does supervised fine-tuning"),
    "save_strategy": _only(
        "steps", "give the steps as `checkpoint.every_steps`; without it every epoch's end is saved"
    ),
    "eval_strategy": _only("steps", "give the steps as `evaluation.every_steps`"),
    "evaluation_strategy": _only("steps", "give the steps as `evaluation.every_steps`"),
    "do_train": _only("true", "`llmtune train` trains; `llmtune evaluate` only measures"),
    "do_eval": _only("true", "held-out rows are always measured"),
}
for _section in LORA_SECTIONS:
    TRANSLATED[f"{_section}.bias"] = TRANSLATED["bias"]
    TRANSLATED[f"{_section}.task_type"] = TRANSLATED["task_type"]

SECTION_VALUES: dict[str, Translation] = {
    "model": lambda node: [Change("model.name", node)],
    "data": lambda node: [Change("data.train", node)],
    "adapter": _adapter,
}
"""Sections for which a bare value is a well-known short form."""

VALUES: dict[str, dict[str, str]] = {
    "data.packing": {"true": "best_fit", "false": "none"},
    "training.precision": _PRECISIONS,
    "training.optimizer": _OPTIMIZERS,
    "model.dtype": _DTYPES,
    "model.attention": _ATTENTION,
    "model.gradient_checkpointing": {"unsloth": "offload"},
    "data.train_on": {"trainonwhat.all_assistant_messages": "all_assistant_messages"},
}
"""Other spellings of a choice under our own key."""

_COMMAND_LINE = "it runs code that comes with the model, so it is allowed on the command line only, where you see it"
NOT_HERE: dict[str, tuple[str, str]] = {
    "trust_remote_code": (
        _COMMAND_LINE,
        "remove it here, and add `--trust-remote-code` to the command if you have read that code",
    ),
    "resume_from_checkpoint": ("resuming is a command of its own", "run `llmtune resume RUN`"),
    "auto_resume_from_checkpoints": ("resuming is a command of its own", "run `llmtune resume`"),
    "push_to_hub": ("llmtune uploads nothing", "upload the run's `final/` folder with the hub's own tool"),
    "hub_model_id": ("llmtune uploads nothing", "upload the run's `final/` folder with the hub's own tool"),
    "_component_": (
        "it names code to import, and llmtune imports nothing that a config names",
        "use the keys of `llmtune config schema`",
    ),
    "_target_": (
        "it names code to import, and llmtune imports nothing that a config names",
        "use the keys of `llmtune config schema`",
    ),
    "plugins": ("it names code to import, and llmtune imports nothing that a config names", "remove it"),
    "no_cuda": ("the device is chosen where the command runs", "run `llmtune train --no-cuda`"),
    "use_cpu": ("the device is chosen where the command runs", "run `llmtune train --no-cuda`"),
    "world_size": (
        "the number of processes is chosen where the command runs",
        "start it with `torchrun --nproc-per-node N`",
    ),
    "local_rank": (
        "the number of processes is chosen where the command runs",
        "start it with `torchrun --nproc-per-node N`",
    ),
    "label_smoothing_factor": ("the loss here is the plain negative log-likelihood", "remove it"),
    "logging_dir": ("logs stand in the run's own folder", "set `run.output_dir`"),
    "micro_batch_size_eval": ("it has another name here", "set `evaluation.batch_size`"),
    "unsloth": ("fast paths need no switch here", "leave `training.engine: auto`"),
}
"""Names people know from elsewhere that are refused: the reason and what to do."""


def other_names(key: str) -> list[str]:
    """Return every other name of one of our keys, in the order of the tables; sections of other toolkits are left out."""
    names = [name for name, target in NAMES.items() if target == key and "." not in name]
    return names + _TRANSLATED_TO.get(key, [])


_TRANSLATED_TO: dict[str, list[str]] = {
    "adapter.method": ["use_lora", "use_peft", "finetuning_type"],
    "model.gradient_checkpointing": ["activation_offloading", "enable_activation_offloading"],
    "model.quantization": ["load_in_4bit", "load_in_8bit", "quantization_bit"],
    "training.precision": ["bf16", "fp16", "use_amp", "amp_dtype", "mixed_precision"],
    "model.dtype": ["torch_dtype", "dtype", "model_dtype"],
    "model.attention": [
        "attn_implementation",
        "flash_attn",
        "flash_attention",
        "use_flash_attention",
        "use_flash_attention_2",
        "sdp_attention",
    ],
    "training.optimizer": ["optim", "optimizer"],
    "data.train_on": ["train_on_what", "train_on", "train_on_inputs", "assistant_only_loss"],
    "data.packing": ["packing", "sample_packing", "pack_sequences"],
    "tracking.trackers": ["report_to", "use_wandb"],
    "distributed.strategy": ["use_deepspeed"],
    "training.betas": ["adam_beta1", "adam_beta2"],
}
