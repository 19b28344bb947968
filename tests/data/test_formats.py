"""Rows of five formats become conversations; what does not fit is named with its field (Q4)."""

from typing import get_args

import pytest

from llmtune.config.schema import RowFormat
from llmtune.data.example import Conversation, Message, Row
from llmtune.data.rows.formats import FORMATS, UnusableRowError, conversation_of, detect_format, looks_like
from llmtune.data.rows.preferences import PREFERENCE_FORMATS
from llmtune.errors import DataError

USER, ANSWER = Message("user", "2+3?"), Message("assistant", "5")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def row(**fields):
    return Row("f:1", fields)


MEANS = [
    (
        "messages",
        row(messages=[{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]),
        (USER, ANSWER),
    ),
    (
        "messages",
        row(conversations=[{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]),
        (USER, ANSWER),
    ),
    (
        "messages",
        row(
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "2+"}, "3?"]},
                {"role": "assistant", "content": "5", "weight": 0},
            ]
        ),
        (USER, Message("assistant", "5", 0.0)),
    ),
    (
        "messages",
        row(
            messages=[
                {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": None}], "name": None},
                {"role": "tool", "content": "5", "tool_call_id": "c1"},
                {"role": "assistant", "content": "5", "reasoning_content": "so", "weight": None},
            ]
        ),
        (
            Message("assistant", "", None, {"tool_calls": [CALL]}),
            Message("tool", "5", None, {"tool_call_id": "c1"}),
            Message("assistant", "5", None, {"reasoning_content": "so"}),
        ),
    ),
    (
        "sharegpt",
        row(system="Be short.", conversations=[{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]),
        (Message("system", "Be short."), USER, ANSWER),
    ),
    (
        "sharegpt",
        row(
            conversations=[
                {"from": "user", "value": "2+3?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "5"},
            ]
        ),
        (USER, Message("assistant", "", None, {"tool_calls": [CALL]}), Message("tool", "5")),
    ),
    ("alpaca", row(instruction="2+3?", input="", output="5"), (USER, ANSWER)),
    (
        "alpaca",
        row(instruction="Add.", input="2, 3", output="5", system="s", history=[["a", "b"]]),
        (
            Message("system", "s"),
            Message("user", "a"),
            Message("assistant", "b"),
            Message("user", "Add.\n\n2, 3"),
            ANSWER,
        ),
    ),
    ("prompt-completion", row(prompt="2+3?", completion="5"), (USER, ANSWER)),
    ("prompt-completion", row(prompt="2+3?", response="5"), (USER, ANSWER)),
    (
        "prompt-completion",
        row(prompt=[{"role": "user", "content": "2+3?"}], completion=[{"role": "assistant", "content": "5"}]),
        (Message("user", "2+3?", 0.0), ANSWER),
    ),
]


@pytest.mark.parametrize(("name", "given", "messages"), MEANS)
def test_a_row_means_these_messages_and_its_format_is_told_from_its_fields(name, given, messages):
    conversation = conversation_of(given, name)
    assert conversation.messages == messages
    assert conversation.source == "f:1"
    assert looks_like(given.fields) == name
    assert conversation.prompt_is_text == (name == "prompt-completion" and isinstance(given.fields["prompt"], str))


def test_a_text_row_is_its_text_and_the_column_can_be_named():
    assert conversation_of(row(text="abc"), "text") == Conversation("f:1", text="abc")
    assert conversation_of(row(body="abc", text=None), "text", "body") == Conversation("f:1", text="abc")


def test_tools_come_as_a_list_or_as_its_json_text():
    tools = [{"type": "function", "function": {"name": "add", "strict": None}}]
    for given in (tools, '[{"type": "function", "function": {"name": "add"}}]'):
        conversation = conversation_of(row(messages=[{"role": "user", "content": "a"}], tools=given), "messages")
        assert conversation.tools == ({"type": "function", "function": {"name": "add"}},)


def test_every_format_can_be_configured_and_recognizes_its_rows():
    assert set(get_args(RowFormat)) == {"auto", *FORMATS, *PREFERENCE_FORMATS} - {"unlabelled"}  # rows to classify
    for name, given, _ in MEANS:
        assert looks_like(given.fields) == name
        assert FORMATS[name].recognize(given.fields)


def test_the_weight_of_a_source_reaches_the_conversation():
    for name, given, _ in MEANS:
        assert FORMATS[name].parse(Row("f:1", given.fields, 0.5)).loss_weight == 0.5


def test_the_format_most_rows_have_is_taken_and_the_reason_says_how_sure_it_is():
    alpaca, text = row(instruction="a", output="b"), row(text="a")
    name, decision = detect_format([alpaca, text, alpaca, alpaca])
    assert name == "alpaca"
    assert (
        str(decision) == "data.format = alpaca: 3 of the first 4 rows have `instruction` and `output`; 1 look like text"
    )


def test_rows_of_no_format_are_refused_with_their_fields():
    with pytest.raises(DataError, match="`chosen`, `rejected`"):
        detect_format([row(chosen="a", rejected="b")])


def test_a_row_of_another_format_is_named_as_such():
    with pytest.raises(UnusableRowError, match="looks like alpaca, the others are messages"):
        conversation_of(row(instruction="a", output="b"), "messages")


@pytest.mark.parametrize(
    ("name", "fields", "field", "problem"),
    [
        ("messages", {"messages": {"role": "user"}}, "messages", "must be a list"),
        ("messages", {"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role", 'unknown role "usr"'),
        (
            "messages",
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "messages[0].content",
            "an object with `a`",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
            "messages[0].content[0]",
            "not text",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a", "weight": -1}]},
            "messages[0].weight",
            "-1 is not a weight",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a", "weight": -(10**400)}]},
            "messages[0].weight",
            "is not a weight",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a", "weight": float("nan")}]},
            "messages[0].weight",
            "nan is not a weight",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a", "weight": True}]},
            "messages[0].weight",
            "the truth value true",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0]",
            "names no function",
        ),
        ("messages", {"messages": [{"role": "user", "content": "a"}], "tools": "nope"}, "tools", "is not JSON"),
        (
            "sharegpt",
            {"conversations": [{"from": "humam", "value": "a"}]},
            "conversations[0].from",
            'unknown speaker "humam"',
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "conversations[0].value", "is null"),
        ("alpaca", {"instruction": "a", "output": 5}, "output", "the number 5"),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["a"]}, "history[0]", "must be a pair"),
        ("prompt-completion", {"prompt": "a", "completion": ["b"]}, "completion", "of two kinds"),
        ("prompt-completion", {"prompt": "a", "completion": 3}, "completion", "the number 3"),
        ("text", {"text": ""}, "text", "the text is empty"),
        ("text", {"txt": "a"}, "text", "is missing"),
    ],
)
def test_what_does_not_fit_is_named_with_its_field(name, fields, field, problem):
    with pytest.raises(UnusableRowError) as caught:
        conversation_of(row(**fields), name)
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert caught.value.fix
