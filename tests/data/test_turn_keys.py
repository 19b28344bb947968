"""Turns say who speaks, and what, under several keys; a question and its answer become two messages."""

import json

import pytest

from llmtune.cli.main import main
from llmtune.data.dataset.make_dataset import survey_data
from llmtune.data.example import Message, Row
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.formats import UnusableRowError, conversation_of, detect_format, looks_like

USER, ANSWER = Message("user", "q"), Message("assistant", "a")
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"town":"Pisa"}'}}


def conversation(**fields):
    return conversation_of(Row("f:1", fields), looks_like(fields))


# --- keys of turns


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}],
        [{"from": "human", "content": "q"}, {"from": "gpt", "content": "a"}],
        [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}],
        [{"from": "user", "text": "q"}, {"from": "assistant", "text": "a"}],
        [{"role": "human", "value": "q"}, {"role": "gpt", "value": "a"}],
        [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}],
        [{"from": "human", "value": "q", "role": None}, {"role": "assistant", "content": "a", "from": None}],
        [{"role": "user", "content": None, "value": "q"}, {"role": "assistant", "content": "a", "value": None}],
        [{"input": "q", "output": "a"}],
        [{"user": "q", "assistant": "a"}],
        [{"human": "q", "gpt": "a"}],
        [{"question": "q", "answer": "a"}],
        [{"instruction": "q", "response": "a", "role": None}],
    ],
)
def test_a_turn_is_read_whatever_its_keys(field, turns):
    given = conversation(**{field: turns})
    assert given.messages == (USER, ANSWER)
    assert not given.unused


def test_rows_of_one_file_may_have_turns_with_different_keys():
    rows = [
        Row("f:1", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        Row("f:2", {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        Row("f:3", {"conversations": [{"input": "q", "output": "a"}]}),
        Row("f:4", {"messages": [{"role": "user", "value": "q"}, {"from": "gpt", "text": "a"}]}),
    ]
    for order in (rows, rows[::-1], [rows[1], rows[1], *rows]):
        name, _ = detect_format(order)
        assert [conversation_of(row, name).messages for row in order] == [(USER, ANSWER)] * len(order)


def test_a_turn_with_a_question_and_an_answer_has_its_marks_and_its_reasoning_on_the_answer():
    turns = [
        {"input": "q", "output": "a", "weight": 0.5, "reasoning": "so", "model": "m"},
        {"input": "q2", "output": "a2", "train": False},
    ]
    given = conversation(conversation=turns)
    assert given.messages == (
        USER,
        Message("assistant", "a", 0.5, {"reasoning": "so"}),
        Message("user", "q2", 0.0),
        Message("assistant", "a2", 0.0),
    )
    assert given.unused == ("`model` of a message",)


def test_the_format_is_shown_by_the_keys_that_are_there():
    shown = {
        (("role", "value"),): "`conversations` with `role` and `value`",
        (("from", "content"),): "`conversations` with `from` and `content`",
        (("input", "output"),): "`conversations` with `input` and `output`",
        (("author", "message"),): "`conversations` with neither `role` nor `content`, but `author`, `message`",
    }
    for ((speaker, text),), reason in shown.items():
        _, decision = detect_format([Row("f:1", {"conversations": [{speaker: "user", text: "q"}]})])
        assert decision.reason == f"the only row has {reason}"


@pytest.mark.parametrize(
    ("turn", "field", "problem", "fix"),
    [
        (
            {"role": "user", "msg": "hello", "id": "x"},
            "content",
            "has `msg`, `id`, which are not read",
            "rename `msg` to",
        ),
        ({"role": "user", "content": None, "body": "hi"}, "content", "is null; the message has `body`", "`body` to"),
        ({"from": "human", "utterance": "hi"}, "value", "is missing; the message has `utterance`", "`utterance` to"),
        ({"author": "user", "content": "hi"}, "role", "has no role; it has `author`, `content`", "say under `role`"),
        ({"speaker": "user", "value": "hi"}, "from", "says not whom it is from; it has `speaker`", "say under `from`"),
        ({"input": "q"}, "role", "has no role; it has `input`", "under `content` what"),
        ({"role": "usr", "value": "hi"}, "role", 'unknown role "usr"', "did you mean `user`?"),
    ],
)
def test_a_turn_that_cannot_be_read_is_named_with_the_fields_it_has(turn, field, problem, fix):
    with pytest.raises(UnusableRowError) as caught:
        conversation(messages=[turn])
    assert caught.value.field == f"messages[0].{field}"
    assert problem in caught.value.problem
    assert fix in caught.value.fix


# --- OpenAI's first form of calls


@pytest.mark.parametrize(
    "call",
    [
        {"function_call": CALL["function"]},
        {"function_call": json.dumps(CALL["function"])},
        {"function_call": CALL["function"], "tool_calls": None},
        {"function_call": CALL["function"], "tool_calls": []},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": None, "arguments": None}, "tool_calls": [CALL]},
    ],
)
def test_a_call_is_read_in_each_of_its_forms(call):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, **call},
        {"role": "function", "name": "get_weather", "content": "21"},
        {"role": "assistant", "content": "a", "function_call": {"name": None, "arguments": None}},
    ]
    given = conversation(messages=turns)
    assert given.messages == (
        USER,
        Message("assistant", "", None, {"tool_calls": [CALL]}),
        Message("tool", "21", None, {"name": "get_weather"}),
        ANSWER,
    )
    assert not given.unused


@pytest.mark.parametrize("name", ["parameters", "args", "input"])
def test_the_arguments_of_a_call_may_have_another_name(name):
    calls = [{"function": {"name": "f", name: {"x": 1}}}, {"name": "f", name: '{"x": 1}', "arguments": None}]
    (given,) = conversation(messages=[{"role": "assistant", "content": None, "tool_calls": calls}]).messages
    assert given.extra["tool_calls"] == [
        {"function": {"name": "f", "arguments": {"x": 1}}},
        {"name": "f", "arguments": '{"x": 1}'},
    ]


def test_functions_are_descriptions_of_tools():
    function = {"name": "get_weather", "parameters": {"type": "object"}}
    turns = [{"role": "user", "content": "q"}]
    for fields in ({"functions": [function]}, {"functions": json.dumps([function]), "tools": None}):
        given = conversation(messages=turns, **fields)
        assert given.tools == ({"type": "function", "function": function},)
        assert not given.unused
    with pytest.raises(UnusableRowError) as caught:
        conversation(messages=turns, functions=3)
    assert caught.value.field == "functions"


def test_a_call_that_is_no_call_is_named_with_its_field():
    with pytest.raises(UnusableRowError) as caught:
        conversation(messages=[{"role": "assistant", "content": None, "function_call": {"arguments": "{}"}}])
    assert caught.value.field == "messages[0].function_call[0]"


# --- questions and answers

NAMES = [
    ("question", "answer"),
    ("input", "output"),
    ("problem", "solution"),
    ("query", "response"),
    ("question", "response"),
    ("instruction", "answer"),
    ("user", "assistant"),
    ("problem", "answer"),
]


@pytest.mark.parametrize("names", NAMES)
def test_a_question_and_its_answer_are_a_users_and_an_assistants_message(names, tiny_tokenizer):
    fields = dict(zip(names, "qa", strict=True))
    given = conversation(**fields)
    assert given.messages == (USER, ANSWER)
    assert not given.prompt_is_text
    chat = conversation(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    renderer = Renderer(tiny_tokenizer)
    assert renderer.render(given) == renderer.render(chat)
    name, decision = detect_format([Row("f:1", fields)])
    assert name == "prompt-completion"
    assert decision.reason == f"the only row has `{names[0]}` and `{names[1]}` (a user's and an assistant's message)"


@pytest.mark.parametrize("names", [*NAMES, ("prompt", "completion"), ("instruction", "output")])
@pytest.mark.parametrize(
    "history", [[["b", "c"]], [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]]
)
def test_the_turns_before_a_question_come_first_under_every_pair_of_names(names, history):
    given = conversation(**dict(zip(names, "qa", strict=True)), history=history)
    assert given.messages == (Message("user", "b"), Message("assistant", "c"), USER, ANSWER)
    assert not given.unused
    assert not given.prompt_is_text


def test_a_prompt_and_its_completion_stay_text_and_that_is_said(tiny_tokenizer):
    given = conversation(prompt="1+1=", completion="2")
    assert given.prompt_is_text
    assert tiny_tokenizer.decode(Renderer(tiny_tokenizer).render(given).input_ids).startswith("1+1=2")
    _, decision = detect_format([Row("f:1", {"prompt": "1+1=", "completion": "2"})])
    assert decision.reason.endswith("`prompt` and `completion` (joined as one text, without a chat template)")


def test_a_question_without_its_answer_is_named_by_its_own_field():
    with pytest.raises(UnusableRowError) as caught:
        conversation(question="q", answer=None)
    assert caught.value.field == "answer"


def test_the_command_shows_questions_and_answers_as_turns(tiny_model_folder, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\n2+3?,5\n")
    arguments = [f"model.name={tiny_model_folder}", f"data.train={rows}", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["data", "preview", *arguments, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert "<|im_start|>user\n2+3?<|im_end|>" in json.loads(line)["text"]


@pytest.mark.parametrize("fields", [{"question": "q", "answer": " "}, {"instruction": "q", "response": ""}])
def test_an_empty_answer_is_named_by_its_own_field(fields, write, config, renderer):
    ledger = survey_data(config(write("a.jsonl", [fields])), renderer).ledger
    (entry,) = ledger.entries
    assert entry["reason"] == "the answer is empty"
    assert entry["field"] == list(fields)[1]
