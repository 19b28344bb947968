"""One rendering for all prompts of a conversation, where the template's own text proves that it never looks ahead (Q5)."""

import time
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.chat_template import ChatTemplate
from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.renderer import Renderer

NOW = datetime(2025, 1, 1)
WALKING = {
    "chatml", "smol", "joiner", "headless", "doubled_end", "llama3", "llama31", "llama4", "mistral1", "gemma", "phi3", "phi4", "phi4mini",
    "deepseek_r1", "vicuna", "alpaca", "commandr", "granite", "glm4", "openchat", "nemotron",
}  # fmt: skip
"""Families whose templates walk; with the others every prompt is rendered."""


def compiled(source):
    return ChatTemplate(source, variables={"bos_token": "<s>", "eos_token": "</s>"}, now=NOW)


def template_of(name, families, tokenizer_for):
    variables = {key: value for key, value in tokenizer_for(name).special_tokens_map.items() if isinstance(value, str)}
    return ChatTemplate(families[name].template, variables=variables, now=NOW)


texts = st.lists(st.sampled_from(["a", "two words", " b\n", "<think>x</think>y", ""]), min_size=1, max_size=9)


def talk_of(contents, *, system):
    roles = (["system"] if system else []) + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=texts, system=st.booleans())
def test_what_one_rendering_tells_of_a_beginning_is_what_rendering_it_gives(
    name, families, tokenizer_for, contents, system
):
    """Q5: for every family, every beginning of a conversation that is told without rendering it."""
    template = template_of(name, families, tokenizer_for)
    talk = talk_of(contents, system=system)
    try:
        text, beginnings = template.render_with_prefixes(talk, None)
    except TemplateRefusal:
        return
    assert text == template.render(talk, None, add_generation_prompt=False)
    for (count, generate), known in beginnings.items():
        assert text[: known.length] + known.tail == template.render(talk[:count], None, add_generation_prompt=generate)
    assert beginnings or name not in WALKING or len(talk) < 3


def test_the_templates_of_many_families_are_seen_to_walk(families, tokenizer_for):
    talk = talk_of(["a", "b", "c", "d"], system=False)
    assert {
        name for name in families if template_of(name, families, tokenizer_for).render_with_prefixes(talk, None)[1]
    } >= WALKING


LOOP = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
TAIL = "{% if add_generation_prompt %}assistant:{% endif %}"
AHEAD = {
    "loop.last": "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}" + TAIL,
    "loop.length": "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}" + TAIL,
    "loop.revindex": "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}" + TAIL,
    "loop.nextitem": "{% for m in messages %}{{ m.content }}{{ loop.nextitem }}{% endfor %}" + TAIL,
    "loop itself": "{% macro f(l) %}{{ l.last }}{% endmacro %}{% for m in messages %}{{ f(loop) }}{{ m.content }}{% endfor %}" + TAIL,
    "the number of messages": "{{ messages | length }}" + LOOP + TAIL,
    "the last message": "{{ messages[-1].role }}" + LOOP + TAIL,
    "the next message": "{% for m in messages %}{{ messages[loop.index] }}{{ m.content }}{% endfor %}" + TAIL,
    "a slice from the end": "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}" + TAIL,
    "another name": "{% set all = messages %}{{ all | length }}" + LOOP + TAIL,
    "another name of another name": "{% set b = a %}{% set a = messages %}{% set b = a %}{{ b | length }}" + LOOP + TAIL,
    "a namespace": "{% set n = namespace(all=messages) %}{{ n.all | length }}" + LOOP + TAIL,
    "a macro": "{% macro f(x) %}{{ x | length }}{% endmacro %}{{ f(messages) }}" + LOOP + TAIL,
    "a macro that sees them": "{% macro f() %}{{ messages | length }}{% endmacro %}{% for m in messages %}{{ f() }}{% endfor %}" + TAIL,
    "messages in the tail": LOOP + "{% if add_generation_prompt and messages[0].role == 'user' %}assistant:{% endif %}",
    "state in the tail": "{% set n=namespace() %}{% for m in messages %}{% set n.k = m.content %}{{ m.role }}{% endfor %}{{ n.k }}" + TAIL,
    "the prompt in the loop": "{% for m in messages %}{{ m.content }}{{ add_generation_prompt }}{% endfor %}",
    "the prompt before the loop": "{{ add_generation_prompt }}" + LOOP,
    "two loops": LOOP + LOOP + TAIL,
    "a filtered loop": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}" + TAIL,
    "a loop with else": "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}" + TAIL,
    "a loop in a block": "{% if true %}" + LOOP + "{% endif %}" + TAIL,
    "a reversed loop": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}" + TAIL,
    "a broken loop": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}" + TAIL,
    "chance": "{{ [1, 2, 3] | random }}" + LOOP + TAIL,
}  # fmt: skip


@pytest.mark.parametrize("way", AHEAD)
def test_a_template_that_may_look_ahead_is_rendered_for_every_prompt(way):
    """The mutants of the law above: each of these, taken for a walk, would give wrong prompts."""
    talk = talk_of(["a", "b", "c", "d"], system=False)
    assert compiled(AHEAD[way]).render_with_prefixes(talk, None)[1] == {}
    assert compiled(LOOP + TAIL).render_with_prefixes(talk, None)[1] != {}


def test_messages_looked_at_by_number_bound_what_is_told():
    """A conversation of one message has no second one to look at."""
    template = compiled(
        "{{ messages[1].content }}{% set rest = messages[1:] %}{% for m in rest %}{{ m.content }};{% endfor %}" + TAIL
    )
    talk = talk_of(["a", "b", "c", "d"], system=False)
    text, beginnings = template.render_with_prefixes(talk, None)
    assert {count for count, _ in beginnings} == {3, 4}
    for (count, generate), known in beginnings.items():
        assert text[: known.length] + known.tail == template.render(talk[:count], None, add_generation_prompt=generate)


def test_time_grows_with_the_turns_of_a_row_and_not_with_their_square(tokenizer_for):
    """800 turns take about four times as long as 200; one rendering for each prompt would take sixteen times."""
    renderer = Renderer(tokenizer_for("smol"), now=NOW)

    def seconds(turns):
        messages = tuple(Message(("user", "assistant")[index % 2], f"turn {index}") for index in range(turns))
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            rendered = renderer.render(Conversation("r:1", messages))
            best = min(best, time.process_time() - begin)
        assert sum(rendered.weights) > turns / 2
        return best

    seconds(4)
    assert seconds(800) < 9 * seconds(200)
