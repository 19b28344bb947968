"""The README.md beside what a user takes away: what it is, what it was made from, how, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.version import __version__

__all__ = ["model_card"]

_METRICS = (
    "train_mean_nll",
    "eval_mean_nll",
    "eval_perplexity",
    "eval_bits_per_byte",
    "eval_exact_answers",
    "eval_num_answers",
)


def model_card(
    *,
    run: str,
    base: str,
    base_path: str | None,
    method: str,
    step: int,
    total_steps: int,
    metrics: Mapping[str, Any],
    data: Mapping[str, Any],
    config: str,
) -> str:
    """A model card in Markdown with the front matter that hubs read.

    base: name of the base model; base_path: the folder or hub id that transformers loads it from, None for a model made
    from scratch. metrics: as in metrics.jsonl. data: the ledger's summary.
    """
    rows = "\n".join(
        f"| `{name}` | {metrics[name]:.6g} |" for name in _METRICS if isinstance(metrics.get(name), (int, float))
    )
    counts = "; ".join(f"{part}: {fates['input']:,} rows, {fates['used']:,} used" for part, fates in data.items())
    kind = "adapter" if method == "LoRA" else "model"
    load = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base_path}"), "THIS_FOLDER")'
        if method == "LoRA"
        else 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
    )
    origin = f"base_model: {base_path}\n" if base_path else ""
    return f"""---
{origin}library_name: {"peft" if method == "LoRA" else "transformers"}
pipeline_tag: text-generation
tags: [llmtune, {method.lower()}]
---

# {run}

This {kind} is `{base}` after {step} of {total_steps} steps of {method} tuning with llmtune {__version__}.

| metric | value |
| --- | --- |
{rows}

Loss is in nats per trained token. Data: {counts}.

```python
{load}
```

## Config

```yaml
{config.rstrip()}
```
"""
