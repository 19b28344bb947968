"""Law 2 of the masks: an answer ends at its own end of turn, whatever later turns of the template repeat of it."""

import pytest

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer

GIVEN = """{%- set ns = namespace(called='') -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<|im_start|>{{ ns.called }} result
{{ m.content }}<|im_end|>
{%- elif m.tool_calls is defined and m.tool_calls -%}
<|im_start|>assistant
call {{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}<|im_end|>
{%- set ns.called = m.tool_calls[0].function.name -%}
{%- else -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

HEAD = (
    "{%- set ns = namespace(call=none, calls=[], thought='', title='') -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and m.tool_calls is defined and m.tool_calls -%}"
    "{%- set ns.call = m.tool_calls[0] -%}{%- set ns.calls = ns.calls + [ns.call.function.name] -%}{%- endif -%}"
    "{%- if m.role == 'assistant' and m.reasoning_content is defined -%}"
    "{%- set ns.thought = m.reasoning_content -%}{%- endif -%}"
)
ANSWER = (
    "{{ '<|im_start|>assistant\\n' }}"
    "{%- if m.reasoning_content is defined and THOUGHT_SHOWN -%}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{%- endif -%}"
    "{%- if m.tool_calls is defined and m.tool_calls -%}{{ 'call ' + m.tool_calls[0].function.name + ' ' }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{%- endif -%}{{ m.content + END }}"
)
TAIL = "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
END_TEXT = "'<|im_end|>\\n'"


def template(others, *, end=END_TEXT, thought_shown="true", tail=TAIL):
    """A ChatML template whose turns of anyone but the assistant are `others`."""
    answer = ANSWER.replace("THOUGHT_SHOWN", thought_shown).replace("END", end)
    return f"{HEAD}{{%- if m.role == 'assistant' -%}}{answer}{{%- else -%}}{others}{{%- endif -%}}{tail}"


def call(name, arguments, **fields):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def trained_texts(tokenizer, messages, source, train_on="all_assistant_messages", allowed=()):
    """The trained stretches of a conversation, decoded; only `allowed` warnings may say that an answer is incomplete."""
    conversation = Conversation("rows.jsonl:1", tuple(messages))
    rendered = Renderer(tokenizer, train_on=train_on, chat_template=source).render(conversation)
    assert not {warning.code for warning in rendered.warnings} & ({"unstable", "no-end-of-turn"} - {*allowed})
    texts, run = [], []
    for token, weight in [*zip(rendered.input_ids, rendered.weights, strict=True), (None, 0)]:
        if weight:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


WEATHER = [
    Message("user", "Weather in Pisa?"),
    Message("assistant", "", extra={"tool_calls": [call("get_weather", {"town": "Pisa"}, id="call_77")]}),
    Message("tool", "21"),
    Message("assistant", "21 degrees."),
]
WEATHER_TRAINED = ['call get_weather {"town": "Pisa"}<|im_end|>', "21 degrees.<|im_end|>"]


def test_a_function_name_at_the_beginning_of_the_turn_of_its_result_is_not_trained(tokenizer_for):
    assert trained_texts(tokenizer_for("chatml"), WEATHER, GIVEN) == WEATHER_TRAINED


@pytest.mark.parametrize(
    "others",
    [
        "{{ '<|im_start|>' + m.role + '\\n' }}{{ ns.call.id if ns.call else '' }}{{ m.content + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{{ ns.call.id if ns.call else '' }}",
        "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{{ ns.call.function.name if ns.call else '' }}<|im_end|>",
        "{{ ns.call.function.name if ns.call else '' }}{{ '<|im_start|>' + m.content + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{{ ns.call.function.arguments if ns.call else '' }}<|im_end|>",
    ],
    ids=["id before", "id after", "name after", "name before the header", "arguments after"],
)
def test_an_id_a_name_or_arguments_in_a_later_turn_are_not_trained(others, tokenizer_for):
    assert trained_texts(tokenizer_for("chatml"), WEATHER, template(others)) == WEATHER_TRAINED


def test_a_function_name_in_two_later_turns_is_not_trained(tokenizer_for):
    others = "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{{ ns.calls | join(', ') }}{{ '<|im_end|>\\n' }}"
    messages = [
        *WEATHER[:3],
        Message("assistant", "", extra={"tool_calls": [call("get_wind", {"town": "Rome"})]}),
        Message("tool", "3"),
        Message("assistant", "A breeze."),
        Message("user", "Thanks"),
        Message("assistant", "Any time."),
    ]
    assert trained_texts(tokenizer_for("chatml"), messages, template(others)) == [
        WEATHER_TRAINED[0],
        'call get_wind {"town": "Rome"}<|im_end|>',
        "A breeze.<|im_end|>",
        "Any time.<|im_end|>",
    ]


REASONED = [
    Message("user", "a"),
    Message("assistant", "first", extra={"reasoning_content": "because one"}),
    Message("user", "b"),
    Message("assistant", "second"),
]


def test_reasoning_in_a_later_turn_is_not_trained(tokenizer_for):
    others = "{{ '<|im_start|>' + m.role + '\\n' }}{{ ns.thought }}{{ '|' + m.content + '<|im_end|>\\n' }}"
    assert trained_texts(tokenizer_for("qwen3"), REASONED, template(others)) == [
        "<think>because one</think>first<|im_end|>",
        "second<|im_end|>",
    ]


def test_an_answer_quoted_by_a_later_turn_is_not_trained_there(tokenizer_for):
    others = (
        "{{ '<|im_start|>' + m.role + '\\n' }}"
        "{%- if loop.index0 -%}{{ 'Title: ' + messages[loop.index0 - 1].content + ' ' }}{%- endif -%}"
        "{{ m.content + '<|im_end|>\\n' }}"
    )
    assert trained_texts(tokenizer_for("qwen3"), REASONED, template(others)) == [
        "<think>because one</think>first<|im_end|>",
        "second<|im_end|>",
    ]


def test_an_answer_that_loses_its_reasoning_in_earlier_turns_still_ends_at_its_own_end(tokenizer_for):
    """The prefix rendering has the reasoning, the complete one lacks it: the ends of both are compared."""
    others = (
        "{{ '<|im_start|>' + m.role + '\\n' }}{{ ns.call.function.name if ns.call else '' }}{{ m.content }}<|im_end|>"
    )
    messages = [
        Message("user", "Weather?"),
        Message(
            "assistant", "", extra={"reasoning_content": "I look.", "tool_calls": [call("get_weather", {"t": "Pisa"})]}
        ),
        Message("tool", "21"),
        Message("assistant", "21 degrees."),
    ]
    trained = trained_texts(tokenizer_for("qwen3"), messages, template(others, thought_shown="loop.last"))
    assert trained == ['call get_weather {"t": "Pisa"}<|im_end|>', "21 degrees.<|im_end|>"]


def test_an_answer_whose_last_turn_is_closed_by_another_token_ends_at_its_own(tokenizer_for):
    """As gpt-oss does it: the last answer ends with another token, and a tool's header follows the call at once."""
    end = "('<|call|>' if m.tool_calls is defined else '<|return|>' if loop.last else '<|end|>')"
    others = (
        "{%- if m.role == 'tool' -%}"
        "{{ '<|start|>functions.' + ns.call.function.name + ' to=assistant<|message|>' + m.content + '<|end|>' }}"
        "{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}"
    )
    source = template(others, end=end).replace("'<|im_start|>assistant\\n'", "'<|start|>assistant<|message|>'")
    assert trained_texts(tokenizer_for("harmony"), WEATHER, source) == [
        'call get_weather {"town": "Pisa"}<|call|>',
        "21 degrees.<|return|>",
    ]


def test_a_call_whose_result_follows_in_the_same_turn_ends_before_it(tokenizer_for):
    """As Gemma-4-like templates do it: alone, the call is closed by an end of turn; with its result, by the result."""
    others = "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    follows = "messages[loop.index0 + 1].role == 'tool'"
    response = f"('<|call|><|channel|>response:' + ns.call.function.name if not loop.last and {follows} else '<|end|>')"
    end = f"({response} if m.tool_calls is defined else '<|end|>')".replace(
        "else '<|end|>'", "else '<|call|><|end|>'", 1
    )
    source = template(others, end=end).replace("'<|im_start|>assistant\\n'", "'<|start|>assistant<|message|>'")
    trained = trained_texts(tokenizer_for("harmony"), WEATHER, source)
    assert trained == ['call get_weather {"town": "Pisa"}<|call|>', "21 degrees.<|end|>"]


def test_a_call_that_only_a_later_turn_writes_is_not_trained_there(tokenizer_for):
    source = GIVEN.replace("call {{ m.tool_calls[0].function.name }} {{", "call {{ '' if true else")
    trained = trained_texts(tokenizer_for("chatml"), WEATHER, source)
    assert trained == ["call <|im_end|>", "21 degrees.<|im_end|>"]


def test_a_template_without_control_tokens_ends_answers_before_repeated_text(tokenizer_for):
    source = (
        "{%- set ns = namespace(called='') -%}{%- for m in messages -%}"
        "{%- if m.role == 'assistant' and m.tool_calls is defined -%}"
        "{%- set ns.called = m.tool_calls[0].function.name -%}{{ 'A: ' + ns.called + '()\\n' }}"
        "{%- elif m.role == 'assistant' -%}{{ 'A: ' + m.content + '\\n' }}"
        "{%- else -%}{{ ns.called + 'Q: ' + m.content + '\\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'A: ' }}{%- endif -%}"
    )
    trained = trained_texts(tokenizer_for("alpaca"), WEATHER, source, allowed={"no-end-of-turn"})
    assert [text.strip() for text in trained] == ["get_weather", "21 degrees."]


def test_questions_trained_by_another_rule_end_at_their_own_end_too(tokenizer_for):
    others = (
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- if m.role == 'tool' -%}{{ messages[0].content + '\\n' }}{%- endif -%}"
    )
    trained = trained_texts(tokenizer_for("chatml"), WEATHER, template(others), "all_user_and_system_messages")
    assert trained == ["Weather in Pisa?<|im_end|>"]


SUMMARIES = {
    "turn": "{{ '<|im_start|>summary\\n' + messages[-1].content + '<|im_end|>\\n' }}",
    "all": "{{ '<|im_start|>summary\\n' }}{% for m in messages %}{{ m.content }} {% endfor %}{{ '<|im_end|>\\n' }}",
    "title": "{{ 'Title: ' + messages[-1].content[:4] + '\\n' }}",
    "thought": "{{ '<|im_start|>thoughts\\n' + ns.thought + '<|im_end|>\\n' }}",
}


@pytest.mark.parametrize("what", SUMMARIES)
def test_the_last_answer_ends_at_its_own_end_where_a_summary_follows_it(what, tokenizer_for):
    tail = TAIL.replace("{%- endif -%}", "{%- else -%}" + SUMMARIES[what] + "{%- endif -%}")
    source = template("{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}", tail=tail)
    messages = REASONED[:2]
    assert trained_texts(tokenizer_for("qwen3"), messages, source) == ["<think>because one</think>first<|im_end|>"]


def test_a_call_that_a_list_of_calls_names_again_ends_at_its_own_end(tokenizer_for):
    tail = TAIL.replace("{%- endif -%}", "{%- else -%}{{ 'called: ' + ns.calls | join(', ') }}{%- endif -%}")
    source = template("{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}", tail=tail)
    assert trained_texts(tokenizer_for("chatml"), WEATHER[:2], source) == [
        'call get_weather {"town": "Pisa"}<|im_end|>'
    ]


@pytest.mark.parametrize("thought", ["4", "It is 4.", "other"])
def test_an_answer_that_stands_in_its_thought_too_is_trained_in_both_turns(thought, tokenizer_for):
    """As gpt-oss writes them: the thought is a turn of its own, which earlier answers lack."""
    source = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{%- if m.reasoning_content is defined and (loop.last or KEPT) -%}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{%- endif -%}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
        "{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
    )
    messages = [Message("user", "2 + 2?"), Message("assistant", "4", extra={"reasoning_content": thought})]
    for kept in ("false", "true"):
        (trained,) = trained_texts(tokenizer_for("harmony"), messages, source.replace("KEPT", kept))
        assert trained == (
            f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
        )
