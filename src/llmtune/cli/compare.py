"""`llmtune compare`: base and tuned side by side on the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.compare_rows import compare_rows
from llmtune.cli.generate import (
    MaxNewTokens,
    Model,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    open_inference_model,
    read_prompts,
    read_sampling,
)
from llmtune.cli.options import Checkpoint, NoCuda, TemplateArgs
from llmtune.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmtune.evaluation.generate import Answer
    from llmtune.evaluation.inference_model import InferenceModel
    from llmtune.evaluation.sampling import Sampling

__all__ = ["compare"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt, or for all rows.")]

ABOUT_ANSWERS = (
    "prompt_file", "system", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed",
)  # fmt: skip
"""Parameters that change answers alone."""


def compare(
    context: typer.Context,
    run: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Prompts; those of the run's config when none. A second run or model may stand before them.",
        ),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="File with one prompt a line.")] = None,
    other: Annotated[
        str | None, typer.Option("--with", metavar="RUN|MODEL", help="The second model, whatever the prompts are.")
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Compare the loss of each held-out row of the run, instead of answers.")
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows for --held-out instead of the run's; may be given again.")
    ] = None,
    checkpoint: Checkpoint = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    template_args: TemplateArgs = None,
    no_cuda: NoCuda = False,
) -> None:
    """Show what the base says and what the tuned model says, or what any two models say."""
    texts = list(prompts or [])
    if held_out or data:
        other = other or (texts.pop(0) if texts and _names_a_model(texts[0]) else None)
        _refuse_about_answers(context, texts)
        compare_rows(
            run, other, data, checkpoint=checkpoint, template_args=template_args, as_json=as_json, no_cuda=no_cuda
        )
        return
    if other is None and texts and _names_a_model(texts[0]):
        other = texts.pop(0)
    sampling = read_sampling(repetition_penalty, temperature, top_k, top_p, seed, stop)
    loaded = open_inference_model(run, checkpoint=checkpoint, no_cuda=no_cuda, template_args=template_args)
    configured = list(loaded.config.evaluation.prompts) if loaded.config is not None else []
    use_configured = configured and not texts and prompt_file is None
    texts = configured if use_configured else read_prompts(texts, prompt_file)
    first = _answers(loaded, loaded.model, texts, system, max_new_tokens, sampling)
    if other is not None:
        del loaded  # the two need not fit into memory together
        second_model = open_inference_model(other, no_cuda=no_cuda, template_args=template_args)
        second = _answers(second_model, second_model.model, texts, system, max_new_tokens, sampling)
        _show({run: first, other: second} if run != other else {"first": first, "second": second}, as_json=as_json)
        return
    with loaded.as_before_tuning() as model:
        base = _answers(loaded, model, texts, system, max_new_tokens, sampling)
    _show({"base": base, "tuned": first}, as_json=as_json)


def _refuse_about_answers(context: typer.Context, prompts: list[str]) -> None:
    """Raise UsageError for prompts and for options that only answers depend on."""
    options = [option for option in context.command.params if option.name in ABOUT_ANSWERS]
    sources = {option.opts[0]: context.get_parameter_source(str(option.name)) for option in options}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if prompts or given:
        problem, where = "held-out rows are compared by their loss, and nothing is answered", [*given, "PROMPTS"][0]
        raise UsageError(problem, where, "leave it out")


def _names_a_model(text: str) -> bool:
    """Whether a text is a run, a folder, a .gguf file or a name of `llmtune list-models`, and so no prompt."""
    from llmtune.adapters.find import named_folder
    from llmtune.models.catalog import catalog

    is_file = text.endswith(".gguf") and Path(text).is_file()
    return is_file or text in catalog() or (bool(text.strip()) and named_folder(text, "runs") is not None)


def _show(answers: dict[str, list[Answer]], *, as_json: bool) -> None:
    """Print the answers of the models side by side, prompt by prompt."""
    width = max(map(len, answers))
    for row in zip(*answers.values(), strict=True):
        texts = dict(zip(answers, (answer.text for answer in row), strict=True))
        if as_json:
            print(json.dumps({"prompt": row[0].prompt, **texts}, ensure_ascii=False))
            continue
        print(f"prompt: {row[0].prompt}")
        for name, text in texts.items():
            indent = "\n" + " " * (width + 4)
            print(f"  {name + ':':<{width + 1}} {text.strip()}".replace("\n", indent))
        print()


def _answers(
    loaded: InferenceModel,
    model: PreTrainedModel | PeftModel,
    prompts: list[str],
    system: str | None,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answer]:
    from llmtune.evaluation.generate import TextPrompt, generate

    as_text = loaded.answers_text and system is None
    texts = [TextPrompt(prompt) if as_text else prompt for prompt in prompts]
    return generate(
        model,
        loaded.tokenizer,
        loaded.renderer,
        texts,
        max_new_tokens=max_new_tokens,
        system=system,
        sampling=sampling,
    )
