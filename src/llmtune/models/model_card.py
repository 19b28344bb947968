"""Model cards: the README.md beside a trained, merged or exported model, with the front matter that hubs read.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llmtune.version import __version__

__all__ = ["exported_model_card", "merged_model_card", "trained_model_card"]

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
    is_adapter: bool,
    step: int,
    total_steps: int,
    metrics: Mapping[str, object],
    data: Mapping[str, Mapping[str, object]],
    config: str,
) -> str:
    """Return the card of a run's adapter or fully tuned model, in Markdown.

    base: name of the base model. base_path: folder or hub id that transformers loads it from, None for a model made
    from scratch. metrics: as in metrics.jsonl. data: the ledger's summary. config: the run's config as YAML, redacted.
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
"""
    card = _card(run, text, tags=(method.lower(),), base_model=base_path, is_adapter=is_adapter)
    return f"{card}\n## Config\n\n```yaml\n{config.rstrip()}\n```\n"


def merged_model_card(*, adapter: str, base: str) -> str:
    """Return the card of `base` with the adapter merged into it, in Markdown."""
    text = (
        f"The adapter `{adapter}` merged into `{base}` with llmtune. "
        "`merge_report.json` says how close the result is to base and adapter.\n"
    )
    return _card(f"{base}, tuned", text, tags=("merged",), base_model=base)


def exported_model_card(name: str) -> str:
    """Return the card of a model that was exported as it is, in Markdown."""
    text = "Exported with llmtune. `export_report.json` says how close the weights are to the source.\n"
    return _card(json.dumps(name).strip('"'), text)  # the name of a folder may hold any character


def _card(
    title: str, text: str, *, tags: Sequence[str] = (), base_model: str | None = None, is_adapter: bool = False
) -> str:
    """Return front matter, title, text and the code that loads the folder."""
    origin = f"base_model: {base_model}\n" if base_model else ""
    library = "peft" if is_adapter else "transformers"
    imports = ["from peft import PeftModel"] if is_adapter else []
    imports.append("from transformers import AutoModelForCausalLM")
    base = 'AutoModelForCausalLM.from_pretrained("{}")'
    if is_adapter:
        model = f'PeftModel.from_pretrained({base.format(base_model)}, "THIS_FOLDER")'
    else:
        model = base.format("THIS_FOLDER")
    load = "\n".join([*imports, "", f"model = {model}"])
    front = f"{origin}library_name: {library}\npipeline_tag: text-generation\ntags: [{', '.join(['llmtune', *tags])}]"
    return f"---\n{front}\n---\n\n# {title}\n\n{text}\n```python\n{load}\n```\n"
