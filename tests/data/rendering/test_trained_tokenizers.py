"""Q5 on tokenizers trained here: with every chat template that `tokenizer train` offers, what is trained is each answer
and its end.
"""

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer, message_fields
from llmtune.models.chat_templates import shipped_chat_templates
from llmtune.models.tokenizer_training import train_tokenizer

TEXTS = [
    "The user asks and the assistant answers: 12 words, naïve, 東京.\n",
    "### user\n### assistant\n  a  b\tTab <b> (x) end.",
] * 8
ANSWER = "{%- if m.role == 'assistant' -%}{% generation %}{{- m.content + eos_token -}}{% endgeneration %}{%- else -%}{{- m.content + eos_token -}}{%- endif -%}"
MARKED = {
    "chatml": "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
    + ANSWER.replace("eos_token", "'<|im_end|>'")
    + "{{- '\\n' -}}{%- endfor -%}",
    "turns": "{%- if bos_token -%}{{- bos_token -}}{%- endif -%}{%- for m in messages -%}{{- '### ' + m.role + '\\n' -}}"
    + ANSWER
    + "{{- '\\n' -}}{%- endfor -%}",
    "dialogpt": "{%- for m in messages -%}" + ANSWER + "{%- endfor -%}",
}
"""The same texts as the shipped templates, with markers around what is to be trained: only the library's own mask reads
these.
"""

ENDS = {"chatml": "<|im_end|>"}
"""What ends a turn, where it is not the end token."""

words = st.sampled_from(
    ["Hello", "12 words", "naïve", "東京", "two\n\nlines", "a  b", "🙂", "end.", "(x)", "| pipe |", "<b>", "### user"]
)
contents = st.lists(words, min_size=1, max_size=5).map(" ".join)


@functools.cache
def tokenizer_with(name):
    return train_tokenizer(TEXTS, 320, chat_template=name)


@functools.cache
def renderer_with(name):
    return Renderer(tokenizer_with(name))


@st.composite
def talks(draw):
    talk = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        talk += [Message("user", draw(contents)), Message("assistant", draw(contents))]
    return talk


def by_library(name, messages, template=None, **options):
    return tokenizer_with(name).apply_chat_template(
        [message_fields(message) for message in messages], chat_template=template, return_dict=True, **options
    )


def test_every_template_on_offer_is_tried():
    assert set(MARKED) == set(shipped_chat_templates())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("template", MARKED)
@given(messages=talks())
def test_q5_masks_and_prompts_hold_on_a_tokenizer_trained_here(template, messages):
    renderer = renderer_with(template)
    rendered = renderer.render(Conversation("rows.jsonl:1", tuple(messages)))
    assert not rendered.warnings
    marked = by_library(template, messages, MARKED[template], return_assistant_tokens_mask=True)
    assert rendered.input_ids == by_library(template, messages)["input_ids"] == marked["input_ids"]
    assert rendered.weights == [float(is_trained) for is_trained in marked["assistant_masks"]]
    begins = [at for at, weight in enumerate(rendered.weights) if weight and not rendered.weights[at - 1]]
    questions = [messages[:at] for at, message in enumerate(messages) if message.role == "assistant"]
    prompts = [by_library(template, question, add_generation_prompt=True)["input_ids"] for question in questions]
    assert [renderer.prompt_ids(question) for question in questions] == prompts
    assert [rendered.input_ids[:begin] for begin in begins] == prompts
    ends = [at for at, weight in enumerate(rendered.weights) if weight and not (rendered.weights[at + 1 :] or [0.0])[0]]
    tokenizer = tokenizer_with(template)
    assert {tokenizer.decode([rendered.input_ids[end]]) for end in ends} == {ENDS.get(template, tokenizer.eos_token)}
    assert {rendered.input_ids[end] for end in ends} <= set(renderer.stop_token_ids)
