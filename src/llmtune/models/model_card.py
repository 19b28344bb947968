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
) -> str:
    """Return the card of a run's adapter or fully tuned model, in Markdown.

    base: name of the base model. base_path: folder or hub id that transformers loads it from, None for a model made
    from scratch. num_rows: those of the embedding, where tokens were added beyond the base's. metrics: as in
    metrics.jsonl. data: the ledger's summary. config: the run's config as YAML, redacted. prompts: what stands around
    each prompt. usage: command lines that serve the folder `THIS_FOLDER`.
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
    text = f"""This {kind} is `{base}` {summary}.

| metric | value |
| --- | --- |
{rows}

{unit} Data: {counts}.
{_about_prompts(prompts)}"""
    load = _load_code(base_path if is_adapter else THIS_FOLDER, is_adapter=is_adapter, num_rows=num_rows)
    library = "peft" if is_adapter else None
    card = _card(run, text, load, tags=(method.lower(),), base_model=base_path, library=library, usage=usage)
    return f"{card}\n## Config\n\n```yaml\n{config.rstrip()}\n```\n"


def merged_model_card(*, adapter: str, base: str, prompts: str = "", usage: Sequence[str] = ()) -> str:
    """Return the card of `base` with the adapter merged into it, in Markdown.

    prompts, usage: as in `trained_model_card`.
    """
    text = (
        f"The adapter `{adapter}` merged into `{base}` with llmtune. "
        "`merge_report.json` says how close the result is to base and adapter.\n"
        f"{_about_prompts(prompts)}"
    )
    return _card(f"{base}, tuned", text, _load_code(THIS_FOLDER), tags=("merged",), base_model=base, usage=usage)


def exported_model_card(name: str, *, prompts: str = "", usage: Sequence[str] = ()) -> str:
    """Return the card of a model that was exported as it is, in Markdown.

    prompts, usage: as in `trained_model_card`.
    """
    text = (
        "Exported with llmtune. `export_report.json` says how close the weights are to the source.\n"
        f"{_about_prompts(prompts)}"
    )
    title = json.dumps(name).strip('"')  # the name of a folder may hold any character
    return _card(title, text, _load_code(THIS_FOLDER), usage=usage)


def _about_prompts(prompts: str) -> str:
    """Return the sentence on what stands around each prompt; '' for a plain chat."""
    if not prompts:
        return ""
    return (
        f"\nIn training: {prompts}. llmtune reads that from `{PROMPT_DEFAULTS}`. In other programs add the system "
        "message yourself, and give the arguments to `tokenizer.apply_chat_template`.\n"
    )


def _load_code(base: str | None, *, is_adapter: bool = False, num_rows: int | None = None) -> str:
    """Return the Markdown that says how the folder is loaded.

    base: what transformers loads; None for the base of an adapter that was built from scratch. num_rows: see
    `trained_model_card`.
    """
    if base is None:
        return "Its base was built from scratch and is stored nowhere: use it with `llmtune generate RUN`.\n"
    lines = [
        *(["from peft import PeftModel"] if is_adapter else []),
        "from transformers import AutoModelForCausalLM",
        "",
    ]
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})")
    if is_adapter and num_rows is not None:
        lines.append(f"model.resize_token_embeddings({num_rows}, mean_resizing=False)  # rows for the tokens it added")
    if is_adapter:
        lines.append(f'model = PeftModel.from_pretrained(model, "{THIS_FOLDER}")')
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
) -> str:
    """Return front matter, title, text and the Markdown that says how the folder is loaded and served."""
    origin = f"base_model: {base_model}\n" if base_model else ""
    listed = ", ".join(["llmtune", *tags])
    front = f"{origin}library_name: {library or 'transformers'}\npipeline_tag: text-generation\ntags: [{listed}]"
    served = "\n```bash\n" + "\n".join(usage) + "\n```\n" if usage else ""
    return f"---\n{front}\n---\n\n# {title}\n\n{text}\n{load}{served}"
