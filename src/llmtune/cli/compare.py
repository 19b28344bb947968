"""`llmtune compare`: base and tuned side by side on the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.generate import MaxNewTokens, Model, NoCuda, System, open_inference_model, read_prompts

if TYPE_CHECKING:
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
    subject = open_inference_model(run, no_cuda=no_cuda)
    configured = list(subject.config.evaluation.prompts) if subject.config is not None else []
    asked = (
        configured if configured and not prompts and prompt_file is None else read_prompts(prompts or [], prompt_file)
    )
    tuned = _answers(subject, subject.model, asked, system, max_new_tokens)
    with subject.as_before_tuning() as model:
        base = _answers(subject, model, asked, system, max_new_tokens)
    for before, after in zip(base, tuned, strict=True):
        if as_json:
            print(json.dumps({"prompt": after.prompt, "base": before.text, "tuned": after.text}, ensure_ascii=False))
        else:
            print(f"prompt: {after.prompt}\n  base:  {_indented(before.text)}\n  tuned: {_indented(after.text)}\n")


def _answers(
    subject: InferenceModel, model: object, prompts: list[str], system: str | None, max_new_tokens: int
) -> list[Answer]:
    from llmtune.evaluation.generate import TextPrompt, generate

    as_text = subject.answers_text and system is None
    asked = [TextPrompt(prompt) if as_text else prompt for prompt in prompts]
    return generate(model, subject.tokenizer, subject.renderer, asked, max_new_tokens=max_new_tokens, system=system)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n         ")
