"""`llmtune generate` and `llmtune chat`: answers of a run or a model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import Checkpoint, NoCuda, TemplateArgs
from llmtune.cli.process import prepare_process
from llmtune.common.environment import is_offline
from llmtune.common.text import print_line
from llmtune.config.layers import load_config
from llmtune.errors import ConfigError, DataError, UsageError

if TYPE_CHECKING:
    from llmtune.evaluation.generate import Answer
    from llmtune.evaluation.inference_model import InferenceModel
    from llmtune.evaluation.sampling import Sampling

__all__ = ["chat", "generate", "open_inference_model", "read_prompts", "read_sampling"]

SUBJECT_HELP = "A run (folder or name), an adapter, a model's folder, a name of list-models, a hub id, a .gguf file."
Model = Annotated[str, typer.Argument(metavar="RUN|MODEL", help=SUBJECT_HELP)]
System = Annotated[str | None, typer.Option("--system", help="System message before each prompt.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="0 takes the most likely token; above 0 tokens are drawn.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", min=0, max=1, help="Draw from the smallest set of tokens that holds this probability."),
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many most likely tokens; 0 from all.")]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", min=1e-3, help="Above 1: tokens that stand before become less likely."),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends an answer; may be given again.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of drawn answers.")]


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; all of stdin is one when there is none.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="File with one prompt a line.")] = None,
    checkpoint: Checkpoint = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    text: Annotated[
        bool, typer.Option("--text", help="Continue the prompt as plain text, without a chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
    template_args: TemplateArgs = None,
    no_cuda: NoCuda = False,
) -> None:
    """Answer prompts, rendered exactly as in training."""
    texts = read_prompts(prompts or [], prompt_file)
    loaded = open_inference_model(model, checkpoint=checkpoint, no_cuda=no_cuda, template_args=template_args)
    from llmtune.evaluation.generate import TextPrompt
    from llmtune.evaluation.generate import generate as answer_all

    as_text = text or (loaded.answers_text and system is None)

    def answer(some: Sequence[str], show: Callable[[str], None] | None = None) -> list[Answer]:
        return answer_all(
            loaded.model,
            loaded.tokenizer,
            loaded.renderer,
            [TextPrompt(prompt) if as_text else prompt for prompt in some],
            max_new_tokens=max_new_tokens,
            system=system,
            sampling=read_sampling(repetition_penalty, temperature, top_k, top_p, seed, stop),
            show=show,
        )

    if len(texts) == 1 and not as_json:
        (only,) = answer(texts, _show_piece)
        print(flush=True)
        _say_cut(only)
        return
    # As they come, where an answer does not depend on those before it: drawn ones do.
    together = len(texts) if temperature > 0 else ANSWERS_AT_ONCE
    for first in range(0, len(texts), together):
        for each in answer(texts[first : first + together]):
            print(json.dumps(_as_dict(each), ensure_ascii=False) if as_json else each.text, flush=True)
            if not as_json:
                _say_cut(each)


ANSWERS_AT_ONCE = 8
"""Prompts that are answered side by side before their answers are shown."""


def _show_piece(text: str) -> None:
    print(text, end="", flush=True)


def _say_cut(answer: Answer) -> None:
    if answer.stopped_by in ("max_new_tokens", "context"):
        limit = "--max-new-tokens" if answer.stopped_by == "max_new_tokens" else "the end of the model context"
        print_line(f"(cut off by {limit})")


def chat(
    model: Model,
    checkpoint: Checkpoint = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    template_args: TemplateArgs = None,
    no_cuda: NoCuda = False,
) -> None:
    """Talk with a model; /reset, /system, /save and /exit are commands."""
    loaded = open_inference_model(model, checkpoint=checkpoint, no_cuda=no_cuda, template_args=template_args)
    from llmtune.cli.conversation import Conversation
    from llmtune.data.example import Message
    from llmtune.evaluation.generate import generate as answer_all

    sampling = read_sampling(repetition_penalty, temperature, top_k, top_p, seed, stop)
    conversation = Conversation(system)
    print_line(conversation.help)
    while (line := _read_line()) is not None and line != "/exit":
        if not line:
            continue
        if line.startswith("/"):
            print_line(conversation.obey(line))
            continue
        asked = [*conversation.messages, Message("user", line)]
        try:
            (answer,) = answer_all(
                loaded.model,
                loaded.tokenizer,
                loaded.renderer,
                [asked],
                max_new_tokens=max_new_tokens,
                # Another seed for each turn, or the same question would be answered by the same draws.
                sampling=replace(sampling, seed=seed + len(asked)),
                show=_show_piece,
            )
        except DataError as error:  # most often beyond the model's context
            if not sys.stdin.isatty():
                raise
            print_line(f"{error.problems[0].problem}; /reset forgets what was said so far")
            continue
        conversation.messages = [*asked, Message("assistant", answer.text)]
        print(flush=True)
        _say_cut(answer)


def open_inference_model(
    name: str,
    *,
    checkpoint: str | None = None,
    no_cuda: bool = False,
    template_args: str | None = None,
    may_score: bool = False,
) -> InferenceModel:
    """Load the run, adapter or model of that name, and print its description and what stands around its prompts.

    may_score: whether it may be a model that gives scores and no text.

    Raises UsageError for `template_args` that are no arguments of a chat template.
    """
    arguments = _read_template_args(template_args)
    prepare_process()
    from llmtune.evaluation.inference_model import load_inference_model

    loaded = load_inference_model(
        name,
        checkpoint=checkpoint,
        offline=is_offline(),
        no_cuda=no_cuda,
        template_args=arguments,
        may_score=may_score,
    )
    print_line(loaded.description)
    if around := loaded.defaults.described():
        print_line(f"prompts are written with: {around}")
    for line in loaded.renderer.unread_arguments():
        print_line(f"note: {line}")
    return loaded


def read_sampling(
    repetition_penalty: float, temperature: float, top_k: int, top_p: float, seed: int, stop: list[str] | None
) -> Sampling:
    """The sampling that the options ask for; options that change nothing at temperature 0 are named."""
    from llmtune.evaluation.sampling import Sampling

    given = [name for name, is_given in (("--top-k", top_k > 0), ("--top-p", top_p < 1)) if is_given]
    if given and temperature == 0:
        print_line(f"note: no token is drawn at temperature 0, so {' and '.join(given)} changes nothing")
    return Sampling(repetition_penalty, temperature, top_k, top_p, seed, tuple(stop or ()))


def _read_template_args(text: str | None) -> Mapping[str, object]:
    """The mapping of an option `--template-args`, read as the config key is."""
    if text is None:
        return {}
    try:
        return load_config(None, overrides=[f"data.template_args={text}"], environ={}).config.data.template_args
    except ConfigError as error:
        raise UsageError.all(problem._replace(where="--template-args") for problem in error.problems) from error


def read_prompts(prompts: list[str], prompt_file: Path | None) -> list[str]:
    """Return the prompts of the command line, of a file (one a line), or all of stdin as one.

    Raises UsageError where there is none.
    """
    texts = list(prompts)
    for text in filter(_looks_like_a_path, texts):
        print_line(f"note: `{text}` is taken as a prompt; a file of prompts is named with --prompt-file")
    if prompt_file is not None:
        try:
            texts += [line for line in prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the prompts cannot be read: {error}", "--prompt-file", "name a UTF-8 file with one prompt a line"
            ) from error
    # A terminal would be waited for without a word.
    if not texts and sys.stdin is not None and not sys.stdin.isatty():
        piped = sys.stdin.read().strip("\n")
        texts = [piped] if piped.strip() else []
    if not texts:
        raise UsageError(
            "there is no prompt", "command line", "write it behind the model, name a --prompt-file, or pipe it in"
        )
    return texts


def _looks_like_a_path(prompt: str) -> bool:
    """Whether a prompt of one word is the path of a file, or a path into a folder that exists."""
    if len(prompt) > 200 or not re.fullmatch(r"\S+", prompt):
        return False
    path = Path(prompt).expanduser()
    return path.is_file() or ("/" in prompt.strip("/") and path.parent.is_dir())


def _read_line() -> str | None:
    """Return the next line the user types, without its end; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _as_dict(answer: Answer) -> dict[str, object]:
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "stopped_by": answer.stopped_by,
    }
