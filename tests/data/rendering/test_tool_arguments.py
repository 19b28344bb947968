"""Arguments of tool calls reach a template in the form it takes: an object, or JSON text."""

from dataclasses import replace

import pytest

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer
from llmtune.errors import DataError

CHATML = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.tool_calls is defined and m.tool_calls -%}
CALL
{%- else -%}
{{ m.content }}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
JOINED = "{{ 'call ' + m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}"
JSON = "{{ 'call ' + m.tool_calls[0].function.name + ' ' }}{{ m.tool_calls[0].function.arguments | tojson }}"
ITEMS = (
    "{{ m.tool_calls[0].function.name }} "
    "{%- for name, value in m.tool_calls[0].function.arguments | items -%}{{ name }}={{ value }};{%- endfor -%}"
)
TOWN = {"town": "Pisa"}


def conversation(arguments, answer="21 degrees."):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = (
        Message("user", "Weather in Pisa?"),
        Message("assistant", "", extra={"tool_calls": [call]}),
        Message("tool", "21"),
        Message("assistant", answer),
    )
    return Conversation("rows.jsonl:1", messages)


def trained(tokenizer, source, arguments, answer="21 degrees."):
    """The trained text of a conversation with one call."""
    rendered = Renderer(tokenizer, chat_template=CHATML.replace("CALL", source)).render(conversation(arguments, answer))
    assert not rendered.warnings
    ids = [token for token, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("arguments", [TOWN, '{"town": "Pisa"}'], ids=["object", "text"])
@pytest.mark.parametrize(
    "source",
    [
        JOINED,
        "{{ 'call ' + m.tool_calls[0].function.name + ' ' ~ m.tool_calls[0].function.arguments }}",
        "{{ 'call ' + m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments }}",
        "{{ 'call %s %s' | format(m.tool_calls[0].function.name, m.tool_calls[0].function.arguments) }}",
        "{{ 'call ' + m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments | string }}",
        "{%- if m.tool_calls[0].function.arguments is mapping -%}{{ raise_exception('text, please') }}{%- endif -%}"
        + JOINED,
        JSON,
    ],
    ids=["joined", "tilde", "printed", "format", "string filter", "refuses objects", "tojson"],
)
def test_arguments_are_rendered_as_json_whatever_form_the_row_and_the_template_have(source, arguments, tokenizer_for):
    expected = 'call get_weather {"town": "Pisa"}<|im_end|>21 degrees.<|im_end|>'
    assert trained(tokenizer_for("chatml"), source, arguments) == expected


def test_a_template_that_takes_objects_gets_objects(tokenizer_for):
    expected = "get_weathertown=Pisa;<|im_end|>21 degrees.<|im_end|>"
    assert trained(tokenizer_for("chatml"), ITEMS, '{"town": "Pisa"}') == expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (JSON, 'call get_weather {"town": "Pisa"}<|im_end|>21 degrees.<|im_end|>'),
        (JOINED, 'call get_weather {"town": "Pisa"}<|im_end|>21 degrees.<|im_end|>'),
        ("{{ m.tool_calls[0].name }}", "get_weather<|im_end|>21 degrees.<|im_end|>"),  # as it stands in the row
    ],
)
def test_a_call_without_the_key_function_is_rendered_in_the_form_that_the_template_takes(source, text, tokenizer_for):
    flat = {"name": "get_weather", "arguments": TOWN}
    messages = [
        replace(message, extra={"tool_calls": [flat]}) if message.extra else message
        for message in conversation(TOWN).messages
    ]
    renderer = Renderer(tokenizer_for("chatml"), chat_template=CHATML.replace("CALL", source))
    rendered = renderer.render(Conversation("rows.jsonl:1", tuple(messages)))
    pairs = zip(rendered.input_ids, rendered.weights, strict=True)
    assert tokenizer_for("chatml").decode([token for token, weight in pairs if weight]) == text


def test_a_call_without_arguments_is_rendered_by_a_template_that_wants_text(tokenizer_for):
    assert trained(tokenizer_for("chatml"), JOINED, {}) == "call get_weather {}<|im_end|>21 degrees.<|im_end|>"


def test_a_nested_object_that_is_printed_does_not_turn_its_call_into_text(tokenizer_for):
    expected = "get_weatherwhere={'town': 'Pisa'};<|im_end|>21 degrees.<|im_end|>"
    assert trained(tokenizer_for("chatml"), ITEMS, {"where": TOWN}) == expected


def test_an_answer_in_pythons_notation_does_not_turn_arguments_into_text(tokenizer_for):
    answer = "In Python: {'town': 'Pisa'}"
    expected = f'call get_weather {{"town": "Pisa"}}<|im_end|>{answer}<|im_end|>'
    assert trained(tokenizer_for("chatml"), JSON, TOWN, answer) == expected


def test_the_prompt_for_the_answer_after_a_call_in_text_is_a_prefix_of_the_training_text(tokenizer_for):
    renderer = Renderer(tokenizer_for("chatml"), chat_template=CHATML.replace("CALL", JOINED))
    row = conversation(TOWN)
    ids = renderer.render(row).input_ids
    prompt = renderer.prompt_ids(row.messages[:3])
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ m.tool_calls[0].function.arguments + 1 }}", "'dict' and 'int'"),
        ("{{ [] + m.tool_calls[0].function.name }}", 'can only concatenate list (not "str") to list'),
        ("{{ m.tool_calls[0].function.name.text + '' }}", "'str object' has no attribute 'text'"),
        ("{{ m.tool_calls[0].function.name + {} }}", "'str' and 'dict'"),
        ("{{ m.tool_calls[0].function.name.center('a') }}", "'str' object cannot be interpreted as an integer"),
    ],
)
def test_a_template_that_fails_on_both_forms_is_named_with_pythons_own_types(source, named, tokenizer_for):
    renderer = Renderer(tokenizer_for("chatml"), chat_template=CHATML.replace("CALL", source))
    with pytest.raises(DataError) as caught:
        renderer.render(conversation(TOWN))
    problem = str(caught.value)
    assert named in problem
    assert "Traced" not in problem
    assert "Loop" not in problem
