"""What TRL makes of the configs of trl_configs.yaml, for test_import_trl.py:

    PYTHON -m pip install trl==1.16.0 --no-deps
    PYTHONPATH=src:tests PYTHON tests/record_trl.py > tests/trl_resolved.json

Each config goes through TRL's own parser and its own trainer, with a tiny model; read is what the trainer holds.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

import yaml

CONFIGS = Path(__file__).with_name("trl_configs.yaml")
STEPS = 200
POINTS = (0, 1, 5, 10, 50, 100, 150, 199)
"""Steps of 200 at which the learning rate is compared."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ROWS = {
    "messages": [
        {
            "messages": [
                *([{"role": "system", "content": "Be brief."}] if number % 2 else []),
                {"role": "user", "content": f"What is {number} + {number}?"},
                {"role": "assistant", "content": f"{2 * number}"},
                *(
                    [{"role": "user", "content": "And once more?"}, {"role": "assistant", "content": "The same."}]
                    if number % 3 == 0
                    else []
                ),
            ]
        }
        for number in range(20)
    ],
    "pairs": [
        {"prompt": f"Count to {number}:", "completion": f" {' '.join('abcdefgh'[: 1 + number % 8])}"}
        for number in range(20)
    ],
    "texts": [{"text": f"Row {number} of plain text" + " that goes on" * (number % 4)} for number in range(20)],
}
"""Rows that the masks are compared on."""


def make_model(folder: Path) -> None:
    """Write a tiny Llama with a tokenizer of bytes, whose template marks what the assistant writes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=0, eos_token_id=2, bos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)


def resolve(text: str, rows: str | None, model: Path, folder: Path) -> dict[str, object]:
    """What TRL's parser and trainer make of a config: a YAML file, or a command line."""
    from datasets import Dataset

    text = text.replace("MODEL", str(model)).replace("ROWS", "rows")
    words = shlex.split(text)
    method = words[1] if words[0] == "trl" else "sft"
    arguments = words[2:] if words[0] == "trl" else ["--config", str(folder / "config.yaml")]
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    parser = importlib.import_module(f"trl.scripts.{method}").make_parser()
    added = ["--use_cpu", "true", "--output_dir", str(folder / "out"), "--report_to", "none"]
    _, args, model_args, _ = parser.parse_args_and_config([*arguments, *added])
    trainer = make_trainer(method, args, model_args, model, Dataset.from_list(rows_for(method, rows)))
    found = {"method": method, **values_of(trainer, args)}
    if rows is not None:
        found["masks"] = masks_of(trainer)
    return found


def rows_for(method: str, rows: str | None) -> list[dict[str, object]]:
    """Rows of the form that a method learns from."""
    pair = {"prompt": "Say a", "chosen": " a", "rejected": " b"}
    single = {"prompt": "Say a", "completion": " a", "label": True}
    forms = {"dpo": pair, "reward": pair, "kto": single, "grpo": {"prompt": "Say a"}}
    return ROWS[rows or "messages"] if method == "sft" else [forms[method], {**forms[method], "prompt": "Now say a"}]


def make_trainer(method, args, model_args, model, rows):
    """TRL's trainer for a method, as its own script makes it."""
    import trl
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if method == "reward":
        loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=model_args.dtype)
    kind = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO"}[method]
    more = {"reward_funcs": [lambda completions, **_: [0.0] * len(completions)]} if method == "grpo" else {}
    return getattr(trl, f"{kind}Trainer")(
        model=loaded,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=trl.get_peft_config(model_args),
        **more,
    )


def values_of(trainer, args) -> dict[str, object]:
    """The values that a trainer trains with."""
    trainer.create_optimizer_and_scheduler(STEPS)
    groups = trainer.optimizer.param_groups
    rates = []
    for step in range(STEPS):
        if step in POINTS:
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    found = {
        "rates": [float(f"{rate:.9g}") for rate in rates],
        "betas": groups[0].get("betas"),
        "eps": groups[0].get("eps"),
        "weight_decay": max(group["weight_decay"] for group in groups),
        "max_grad_norm": args.max_grad_norm or None,
        "rows_per_step": rows // getattr(args, "num_generations", 1),
        "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "seed": args.seed,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "gradient_checkpointing": args.gradient_checkpointing,
        "max_length": getattr(args, "max_length", None),
        "packing": bool(getattr(args, "packing", False)),
        "logging_steps": args.logging_steps,
        "save_steps": args.save_steps,
        "neftune_alpha": args.neftune_noise_alpha,
        "adapter": adapter_of(trainer.model),
    }
    names = ("beta", "label_smoothing", "desirable_weight", "undesirable_weight", "num_generations", "temperature")
    names += ("max_completion_length", "epsilon", "epsilon_high", "mask_truncated_completions", "scale_rewards")
    found |= {
        name: getattr(args, name) for name in (*names, "loss_type", "steps_per_generation") if hasattr(args, name)
    }
    return found | ({"epsilon_high": trainer.epsilon_high} if hasattr(trainer, "epsilon_high") else {})


def adapter_of(model) -> dict[str, object] | None:
    """The adapter that a model has: its shape, its layers, and the dropout that is applied."""
    if not hasattr(model, "peft_config"):
        return None
    config = next(iter(model.peft_config.values()))
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    drops = {getattr(drop, "p", 0.0) for module in adapted.values() for drop in module.lora_dropout.values()}
    (dropout,) = drops
    scalings = {scale for module in adapted.values() for scale in module.scaling.values()}
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "dropout": dropout,
        "scaling": scalings.pop(),
        "layers": sorted({name.rpartition(".")[2] for name in adapted}),
        "dora": config.use_dora,
        "modules_to_save": sorted(config.modules_to_save or ()),
    }


def masks_of(trainer) -> list[list[object]]:
    """Of each row: a digest of its ids but the last, the last, and a mark for each: `x` where it is trained."""
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        length = len(row["input_ids"])
        marks = "".join("x" if label >= 0 else "." for label in labels[:length])
        found.append([digest(ids[: length - 1]), ids[length - 1], "." + marks[1:]])  # nothing predicts the first token
    return found


def digest(ids: list[int]) -> str:
    """A short name for a list of token ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:12]


def main() -> None:
    """Print what TRL makes of every config."""
    import trl

    configs = yaml.safe_load(CONFIGS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_model(model)
        found = [resolve(config["text"], config.get("rows"), model, Path(folder)) for config in configs]
    text = json.dumps({"trl": trl.__version__, "configs": found}, indent=1)
    print(re.sub(r"\[([^\[\]{}]*)\]", lambda match: f"[{' '.join(match[1].split())}]", text))


if __name__ == "__main__":
    sys.exit(main())
