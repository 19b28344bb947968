"""`llmtune compare`: base and tuned side by side on the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.generate import MaxNewTokens, Model, System, open_inference_model, read_prompts
from llmtune.cli.options import NoCuda

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmtune.evaluation.generate import Answer
    from llmtune.evaluation.inference_model import InferenceModel

__all__ = ["compare"]


def compare(
    run: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; those of the run's config when none.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="File with one prompt a line.")] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt.")] = False,
    no_cuda: NoCuda = False,
) -> None:
    """Show what the base says and what the tuned model says."""
    loaded = open_inference_model(run, no_cuda=no_cuda)
    configured = list(loaded.config.evaluation.prompts) if loaded.config is not None else []
    use_configured = configured and not prompts and prompt_file is None
    texts = configured if use_configured else read_prompts(prompts or [], prompt_file)
    tuned = _answers(loaded, loaded.model, texts, system, max_new_tokens)
    with loaded.as_before_tuning() as model:
        base = _answers(loaded, model, texts, system, max_new_tokens)
    for before, after in zip(base, tuned, strict=True):
        if as_json:
            print(json.dumps({"prompt": after.prompt, "base": before.text, "tuned": after.text}, ensure_ascii=False))
        else:
            print(f"prompt: {after.prompt}\n  base:  {_indented(before.text)}\n  tuned: {_indented(after.text)}\n")


def _answers(
    loaded: InferenceModel,
    model: PreTrainedModel | PeftModel,
    prompts: list[str],
    system: str | None,
    max_new_tokens: int,
) -> list[Answer]:
    from llmtune.evaluation.generate import TextPrompt, generate

    as_text = loaded.answers_text and system is None
    texts = [TextPrompt(prompt) if as_text else prompt for prompt in prompts]
    return generate(model, loaded.tokenizer, loaded.renderer, texts, max_new_tokens=max_new_tokens, system=system)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n         ")
