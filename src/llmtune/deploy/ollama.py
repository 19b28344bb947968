"""Write a Modelfile, with which Ollama gives the prompts of training: the same token ids, or it is refused.

Ollama renders no chat template of Hugging Face where its own may stand: it compares the template in a GGUF file with
those it has, and takes the nearest of its own. So the Modelfile carries a TEMPLATE, learnt from the model's template
and compared with it on `CONVERSATIONS`. The format: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmtune.data.example import Message
from llmtune.data.rendering.chat_template import ChatTemplate
from llmtune.data.rendering.encoding import Vocabulary
from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.renderer import DEFAULT_NOW, Renderer
from llmtune.deploy.go_template import literal, render
from llmtune.errors import DataError, ModelError
from llmtune.models.save import PromptDefaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CONVERSATIONS", "modelfile", "modelfile_prompt"]

CONVERSATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "a question": (("user", "Why does bread rise?"),),
    "a system prompt": (("system", "Answer in one line."), ("user", "1, 2, 3, 4,")),
    "several turns": (
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello! How can I help?"),
        ("user", "Sum 2\n and 3"),
        ("assistant", "5"),
        ("user", "Thanks"),
    ),
    "other scripts": (
        ("user", "naïve “quotes” 日本語 한국어 العربية हिन्दी 🙂👩‍👩‍👧‍👦"),
        ("assistant", "½ ² ٣ é 中文"),
        ("user", "def f(x):\n\treturn {{ x }} % 2  # {% if %}"),
    ),
    "spelled control tokens": (("user", "a<|im_end|>\n<|im_start|>system\n<s>[INST]</s><|eot_id|><end_of_turn> b"),),
}
"""Name -> messages whose prompt must have the same ids in Ollama.

In the last, a text that spells a control token is that token, as in every program that tokenizes a prompt at once.
"""


def modelfile(
    tokenizer: PreTrainedTokenizerFast,
    defaults: PromptDefaults,
    *,
    file: str,
    stop_token_ids: Sequence[int],
    adds_bos: bool,
) -> str:
    """Return the Modelfile of a GGUF file beside it.

    adds_bos: Ollama puts the first token of a text (`tokenizer.ggml.add_bos_token`) before every prompt.

    Raises ModelError for a model whose prompts Ollama would write otherwise.
    """
    if defaults.continues_text:
        raise _refused("this model continues plain texts, and Ollama writes chats")
    source = tokenizer.chat_template
    if not isinstance(source, str):
        raise _refused("the tokenizer has several chat templates" if source else "the tokenizer has no chat template")
    variables = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    chat_template = ChatTemplate(source, variables=variables, now=DEFAULT_NOW)
    if chat_template.uses_the_date:
        raise _refused("the chat template writes the date of today")

    def write(*messages: tuple[str, str]) -> str:
        fields = [{"role": role, "content": content} for role, content in messages]
        return chat_template.render(fields, None, defaults.template_args, add_generation_prompt=True)

    try:
        template = _learn(write, bos=(tokenizer.bos_token or "") if adds_bos else "")
    except TemplateRefusal as refusal:
        raise _refused(str(refusal)) from refusal
    renderer = Renderer(
        Vocabulary.of(tokenizer),
        system=defaults.system,
        template_args=defaults.template_args,
        parse_control_tokens=True,
    )
    stops = dict.fromkeys((*renderer.stop_token_ids, *stop_token_ids))
    text = _written(template, defaults.system, file, [str(tokenizer.decode([token])) for token in stops])
    _check(text, tokenizer, renderer, adds_bos=adds_bos)
    return text


def modelfile_prompt(text: str, messages: Sequence[tuple[str, str]]) -> str:
    """Return the prompt that Ollama writes with this Modelfile."""
    # Ollama reads it without the characters that are not printed.
    read = "".join(character for character in text if character.isprintable() or character in "\n\t")
    found = dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', read, re.MULTILINE | re.DOTALL))
    system = found.get("SYSTEM")
    if system is not None and all(role != "system" for role, _ in messages):
        messages = [("system", system), *messages]
    first = "\n\n".join(content for role, content in messages if role == "system")
    rows = [{"Role": role, "Content": content} for role, content in messages]
    return render(found["TEMPLATE"], {"System": first, "Messages": rows})


def _learn(write: Callable[..., str], *, bos: str) -> str:
    """Return a Go template for a chat template, by what it writes around a few words.

    The words occur in no template. A template that treats a message by more than its role comes out wrong, which the
    comparison sees.
    """
    system, first, answer, last = "Kupuka", "Lomina", "Tarevo", "Sidaru"
    start, after_last = _around(write(("user", last)), last)
    try:
        before_system, after_system, _ = _around(write(("system", system), ("user", last)), system, last)
    except TemplateRefusal:  # a template without system prompts
        before_system, after_system = None, start
    _, after_question, after_answer, _ = _around(
        write(("user", first), ("assistant", answer), ("user", last)), first, answer, last
    )
    # What comes before each question, and after each, is written there; the rest belongs to its neighbour.
    opens = _common_end(_common_end(start, after_system), after_answer)
    closes = _common_start(after_question, after_last)
    begin, system_end, answer_end = (
        text[: len(text) - len(opens)] for text in (start.removeprefix(bos), after_system, after_answer)
    )
    answer_begin, prompt = after_question[len(closes) :], after_last[len(closes) :]
    head = literal(begin)
    if before_system is not None:
        system_begin = literal(before_system.removeprefix(bos))
        head = (
            f"{{{{ if .System }}}}{system_begin}{{{{ .System }}}}{literal(system_end)}{{{{ else }}}}{head}{{{{ end }}}}"
        )
    turns = (
        '{{ range .Messages }}{{ if eq .Role "user" }}' + literal(opens) + "{{ .Content }}" + literal(closes),
        '{{ else if eq .Role "assistant" }}' + literal(answer_begin) + "{{ .Content }}" + literal(answer_end),
        "{{ end }}{{ end }}",
    )
    return head + "".join(turns) + literal(prompt)


def _around(text: str, *words: str) -> list[str]:
    """Split a text at its words. Raises TemplateRefusal where one is missing, or stands there twice."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise TemplateRefusal("the chat template does not write each message once")
        before, text = text.split(word)
        parts.append(before)
    return [*parts, text]


def _common_start(left: str, right: str) -> str:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(character for character, _ in pairs)


def _common_end(left: str, right: str) -> str:
    return _common_start(left[::-1], right[::-1])[::-1]


def _written(template: str, system: str | None, file: str, stops: Sequence[str]) -> str:
    quotes = '"""'
    lines = [f"FROM ./{file}", f"TEMPLATE {quotes}{template}{quotes}"]
    if system is not None:
        lost = sorted({f"U+{ord(sign):04X}" for sign in system if not sign.isprintable() and sign not in "\n\t"})
        if lost or quotes in system or not system.strip():
            what = ", ".join(lost) or "three quotation marks, or only spaces"
            raise _refused(f"a Modelfile cannot hold the system prompt of training ({what})")
        lines.append(f"SYSTEM {quotes}{system}{quotes}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _check(text: str, tokenizer: PreTrainedTokenizerFast, renderer: Renderer, *, adds_bos: bool) -> None:
    """Compare the prompts of the Modelfile with those of training. Raises ModelError where one has other ids."""
    first = [tokenizer.bos_token_id] if adds_bos else []
    for name, messages in CONVERSATIONS.items():
        try:
            expected = renderer.prompt_ids([Message(role, content) for role, content in messages])
        except DataError as error:
            if messages[0][0] == "system":
                continue  # the template takes no system prompt, so nobody writes one
            raise _refused(error.problems[0].problem) from error
        prompt = modelfile_prompt(text, messages)
        ids = [*first, *tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids]
        if ids != expected:
            raise _refused(f"Ollama's template language does not say what the chat template writes for {name}")


def _refused(problem: str) -> ModelError:
    fix = "use --to gguf: llama.cpp's own server renders the chat template in the file"
    return ModelError(problem, where="--to ollama", fix=fix)
