"""Model cards: the README.md beside a trained, merged or exported model, with the front matter that hubs read.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llmtune.models.save import PROMPT_DEFAULTS
from llmtune.version import __version__

__all__ = ["THIS_FOLDER", "exported_model_card", "merged_model_card", "trained_model_card"]

THIS_FOLDER = "THIS_FOLDER"
"""Stands for the folder in the code and the commands of its card."""

_METRICS = (
    "train_mean_nll",
    "train_loss",
    "eval_mean_nll",
    "eval_loss",
    "eval_accuracy",
    "eval_macro_f1",
    "eval_rewards_margin",
    "eval_perplexity",
    "eval_bits_per_byte",
    "eval_exact_answers",
    "eval_num_answers",
)


def trained_model_card(
    *,
    run: str,
    base: str,
    base_path: str | None,
    num_rows: int | None,
    is_adapter: bool,
    step: int,
    total_steps: int,
    metrics: Mapping[str, object],
    data: Mapping[str, Mapping[str, object]],
    config: str,
    prompts: str = "",
    usage: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> str:
    """Return the card of a run's adapter or fully tuned model, in Markdown.

    base: name of the base model. base_path: folder or hub id that transformers loads it from, None for a model made
    from scratch. num_rows: those of the embedding, where tokens were added beyond the base's. metrics: as in
    metrics.jsonl. data: the ledger's summary. config: the run's config as YAML, redacted. prompts: what stands around
    each prompt. usage: command lines that serve the folder `THIS_FOLDER`. labels: of the units of its head, where it
    gives scores.
    """
    numbers = {name: metrics.get(name) for name in _METRICS}
    rows = "\n".join(
        f"| `{name}` | {value:.6g} |" for name, value in numbers.items() if isinstance(value, (int, float))
    )
    counts = "; ".join(f"{part}: {count['input']:,} rows, {count['used']:,} used" for part, count in data.items())
    kind, method = ("adapter", "LoRA") if is_adapter else ("model", "full")
    summary = f"after {step} of {total_steps} steps of {method} tuning with llmtune {__version__}"
    is_sft = "train_loss" not in metrics and "eval_loss" not in metrics
    unit = "Loss is in nats per trained token." if is_sft else "Loss is the mean of a pair of answers, or of an answer."
    if labels:
        unit = f"Loss is the mean of {'a pair of answers' if len(labels) == 1 else 'a row'}."
    text = f"""This {kind} is `{base}` {summary}.

| metric | value |
| --- | --- |
{rows}

{unit} Data: {counts}.
{_about_prompts(prompts)}"""
    folder = base_path if is_adapter else THIS_FOLDER
    load = _load_code(folder, is_adapter=is_adapter, num_rows=num_rows, labels=labels)
    card = _card(
        run,
        text,
        load,
        tags=(method.lower(),),
        base_model=base_path,
        library="peft" if is_adapter else None,
        usage=usage,
        labels=labels,
    )
    return f"{card}\n## Config\n\n```yaml\n{config.rstrip()}\n```\n"


def merged_model_card(
    *, adapter: str, base: str, prompts: str = "", usage: Sequence[str] = (), labels: Sequence[str] = ()
) -> str:
    """Return the card of `base` with the adapter merged into it, in Markdown.

    prompts, usage, labels: as in `trained_model_card`.
    """
    text = (
        f"The adapter `{adapter}` merged into `{base}` with llmtune. "
        "`merge_report.json` says how close the result is to base and adapter.\n"
        f"{_about_prompts(prompts)}"
    )
    load = _load_code(THIS_FOLDER, labels=labels)
    return _card(f"{base}, tuned", text, load, tags=("merged",), base_model=base, usage=usage, labels=labels)


def exported_model_card(name: str, *, prompts: str = "", usage: Sequence[str] = (), labels: Sequence[str] = ()) -> str:
    """Return the card of a model that was exported as it is, in Markdown.

    prompts, usage, labels: as in `trained_model_card`.
    """
    text = (
        "Exported with llmtune. `export_report.json` says how close the weights are to the source.\n"
        f"{_about_prompts(prompts)}"
    )
    title = json.dumps(name).strip('"')  # the name of a folder may hold any character
    return _card(title, text, _load_code(THIS_FOLDER, labels=labels), usage=usage, labels=labels)


def _about_prompts(prompts: str) -> str:
    """Return the sentence on what stands around each prompt; '' for a plain chat."""
    if not prompts:
        return ""
    return (
        f"\nIn training: {prompts}. llmtune reads that from `{PROMPT_DEFAULTS}`. In other programs add the system "
        "message yourself, and give the arguments to `tokenizer.apply_chat_template`.\n"
    )


def _load_code(
    base: str | None, *, is_adapter: bool = False, num_rows: int | None = None, labels: Sequence[str] = ()
) -> str:
    """Return the Markdown that says how the folder is loaded.

    base: what transformers loads; None for the base of an adapter that was built from scratch. num_rows, labels: see
    `trained_model_card`.
    """
    if base is None:
        use = "llmtune predict RUN --data FILE" if labels else "llmtune generate RUN"
        return f"Its base was built from scratch and is stored nowhere: use it with `{use}`.\n"
    class_name = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    # Of a base that predicts tokens; a folder of scores says it in its config.
    given = f", id2label={dict(enumerate(labels))!r}" if labels and is_adapter else ""
    lines = [
        *(["from peft import PeftModel"] if is_adapter else []),
        f"from transformers import {', '.join([class_name, *(['AutoTokenizer'] if labels else [])])}",
        "",
    ]
    lines.append(f"model = {class_name}.from_pretrained({json.dumps(base)}{given})")
    if is_adapter and num_rows is not None:
        lines.append(f"model.resize_token_embeddings({num_rows}, mean_resizing=False)  # rows for the tokens it added")
    if is_adapter:
        lines.append(f'model = PeftModel.from_pretrained(model, "{THIS_FOLDER}")')
    if labels:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{THIS_FOLDER}")',
            "model.config.pad_token_id = tokenizer.pad_token_id  # by it the last token of a padded row is found",
            'batch = tokenizer(["a text", "another text"], padding=True, return_tensors="pt")',
            f"scores = model(**batch).logits  # {list(labels[:8])!r}",
        ]
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n"


def _card(
    title: str,
    text: str,
    load: str,
    *,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    library: str | None = None,
    usage: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> str:
    """Return front matter, title, text and the Markdown that says how the folder is loaded and served."""
    origin = f"base_model: {base_model}\n" if base_model else ""
    listed = ", ".join(["llmtune", *tags])
    task = "text-classification" if labels else "text-generation"
    front = f"{origin}library_name: {library or 'transformers'}\npipeline_tag: {task}\ntags: [{listed}]"
    # Those commands serve a model that answers.
    served = "\n```bash\n" + "\n".join(usage) + "\n```\n" if usage and not labels else ""
    return f"---\n{front}\n---\n\n# {title}\n\n{text}\n{load}{served}"
