"""Conversations as other programs export them: speakers under other names, content in blocks, lists as text."""

import json

import pytest
import yaml

from llmtune.config.schema import SourceConfig
from llmtune.data.dataset.make_dataset import prepare_data
from llmtune.data.example import Message, Row
from llmtune.data.reading.columns import renamed
from llmtune.data.rows.field_names import SPEAKER_ROLES
from llmtune.data.rows.formats import UnusableRowError, conversation_of, detect_format, looks_like
from llmtune.data.rows.preferences import PREFERENCE_FORMATS, RECOGNIZED_BY
from llmtune.data.rows.proposals import proposed_columns
from llmtune.errors import DataError
from read_rows import read_rows

USER, ANSWER = Message("user", "q"), Message("assistant", "a")
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def conversation(**fields):
    return conversation_of(Row("f:1", fields), looks_like(fields))


# --- speakers


@pytest.mark.parametrize("spelled", [str, str.upper, str.title, lambda name: f" {name} "])
@pytest.mark.parametrize(("who", "what"), [("role", "content"), ("from", "value"), ("role", "value")])
def test_well_known_speakers_are_roles_under_every_key_and_in_every_case(who, what, spelled):
    for speaker, role in SPEAKER_ROLES.items():
        if speaker not in ("function_call", "tool_call"):  # their text is a call
            given = conversation(messages=[{who: spelled("user"), what: "q"}, {who: spelled(speaker), what: "a"}])
            assert given.messages == (USER, Message(role, "a"))


def test_speakers_of_other_names_are_said_once_with_their_roles():
    rows = [
        Row("f:1", {"messages": [{"role": "Human", "content": "q"}, {"role": "ai", "content": "a"}]}),
        Row("f:2", {"messages": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}),
    ]
    _, decision = detect_format(rows)
    assert decision.reason.endswith("; `Human` is user, `ai` is assistant, `model` is assistant")
    plain = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    _, decision = detect_format([Row("f:1", {"conversations": plain})])
    assert decision.reason == "the only row has `conversations` with `from` and `value`"


def test_a_call_may_be_a_turn_of_its_own_in_messages_too():
    call = {"name": "get_weather", "arguments": {"town": "Pisa"}}
    turns = [*CHAT[:1], {"role": "tool_call", "content": json.dumps(call)}, {"role": "tool_response", "content": "21"}]
    given = conversation(messages=turns).messages
    assert given[1] == Message("assistant", "", None, {"tool_calls": [{"type": "function", "function": call}]})
    assert given[2] == Message("tool", "21")


# --- blocks, parts, system prompts


@pytest.mark.parametrize(
    "system",
    [
        "S",
        [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        [{"text": "S"}],
        {"role": "system", "content": "S"},
        {"parts": [{"text": "S"}]},
    ],
)
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "systemInstruction"])
def test_a_system_prompt_may_be_text_parts_or_a_message(name, system):
    turns = [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "a"}]}]
    given = conversation(**{name: system, "messages": turns})
    assert given.messages == (Message("system", "S"), USER, ANSWER)
    assert not given.unused


def test_calls_results_and_thoughts_in_blocks_become_messages_of_their_own():
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"town": "Pisa"}}
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "22"},
    ]
    turns = [
        *CHAT[:1],
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so", "signature": "x"},
                {"type": "text", "text": "I look."},
                use,
            ],
        },
        {"role": "user", "content": [*results, {"type": "text", "text": "and?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "train": False},
    ]
    call = {"type": "function", "id": "t1", "function": {"name": "get_weather", "arguments": {"town": "Pisa"}}}
    assert conversation(messages=turns).messages == (
        USER,
        Message("assistant", "I look.", None, {"tool_calls": [call], "thinking": "so"}),
        Message("tool", "21", None, {"tool_call_id": "t1"}),
        Message("tool", "22", None, {"tool_call_id": "t2"}),
        Message("user", "and?"),
        Message("assistant", "a", 0.0),
    )


def test_a_message_with_a_result_alone_is_the_tool_s_alone():
    turns = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "21"}]}]
    assert conversation(messages=[*CHAT, *turns]).messages[2:] == (Message("tool", "21", None, {"tool_call_id": "t"}),)


def test_a_prompt_in_text_parts_is_a_user_s_message():
    given = conversation(prompt=[{"type": "text", "text": "q"}], completion=[{"text": "a"}])
    assert (given.messages, given.prompt_is_text, given.unused) == ((USER, ANSWER), False, ())


# --- lists as text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_list_of_messages_may_stand_as_json_text_in_every_kind_of_file(name, field, tmp_path):
    path, row = tmp_path / name, {field: json.dumps(CHAT)}
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if name == "a.json" else row))
    (read,) = read_rows((SourceConfig(str(path)),))
    assert read.fields == {field: CHAT}


def test_a_list_in_python_s_notation_is_named_as_that(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": str(CHAT)}) + "\n")
    (bad,) = read_rows((SourceConfig(str(path)),))
    assert (bad.field, bad.fix) == (
        "messages",
        "JSON wants double quotes: write rows with a JSON library, not with str()",
    )


@pytest.mark.parametrize("row", ["{'prompt': 'q'}", "[{'role': 'user'}]", "  { 'prompt': 'q'}"])
def test_a_row_in_python_s_notation_is_named_as_that_on_a_last_line_without_its_end_too(row, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(row)
    (bad,) = read_rows((SourceConfig(str(path)),))
    assert bad.fix.startswith("JSON wants double quotes")
    path.write_text('{"prompt": "it\'s cut')
    (bad,) = read_rows((SourceConfig(str(path)),))
    assert "if it was cut off" in bad.fix


# --- what else a file may be


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "sep=;\nprompt;completion\nq;a\n"),
        ("a.csv", '"sep=|"\r\nprompt|completion\r\nq|a\r\n'),
        ("a.tsv", "sep=,\nprompt,completion\nq,a\n"),
        ("a.txt", '{"prompt": "q", "completion": "a"}\n'),
        ("a.json", '{"x1": {"prompt": "q", "completion": "a"}, "x2": {"prompt": "q", "completion": "a"}}'),
        ("a.jsonl", '{"prompt": ["q", "q"], "completion": ["a", "a"]}'),
    ],
)
def test_a_file_is_read_as_what_it_holds(name, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode())
    rows = list(read_rows((SourceConfig(str(path)),)))
    assert {json.dumps(row.fields) for row in rows} == {'{"prompt": "q", "completion": "a"}'}


@pytest.mark.parametrize(
    "row", [{"turns": ["q", "a"]}, {"messages": ["q", "a"], "tags": ["x", "y"]}, {"text": ["one", "two"]}]
)
def test_a_line_with_a_list_is_a_row_and_no_table_of_one_column(row, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (read,) = read_rows((SourceConfig(str(path)),))
    assert read.fields == row


@pytest.mark.parametrize("row", [{"chosen": CHAT[1], "rejected": CHAT[1]}, {"text": "{}"}])
def test_a_row_with_messages_in_objects_is_no_table(row, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(row))
    (read,) = read_rows((SourceConfig(str(path)),))
    assert read.fields == row


def test_lines_of_prose_are_texts_though_the_first_is_json(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text('{"a": 1}\nis an object\n')
    assert [row.fields["text"] for row in read_rows((SourceConfig(str(path)),))] == ['{"a": 1}', "is an object"]


# --- proposals


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"id": 1, "dialogue": CHAT}, "{messages: dialogue}"),
        ({"body": {"messages": CHAT}}, "{messages: body.messages}"),
        ({"Question": "q", "Answer": "a", "id": "7"}, "{question: Question, answer: Answer}"),
        ({"src_text": "q", "tgt_text": "a", "lang": "x"}, "{question: src_text, answer: tgt_text}"),
        ({"userQuery": "q", "modelReply": "a"}, "{question: userQuery, answer: modelReply}"),
        ({"article": "q", "title": "t", "summary": "a"}, "{question: article, answer: summary}"),
        (
            {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
            "{messages: contents, content: parts}",
        ),
        (
            {"log": [{"speaker": "user", "utterance": "q"}, {"speaker": "ai", "utterance": "a"}]},
            "{messages: log, role: speaker, content: utterance}",
        ),
        (
            {"turns": [{"author": {"role": role}, "content": {"parts": [role]}} for role in ("user", "assistant")]},
            "{messages: turns, role: author.role, content: content.parts}",
        ),
        ({"Instruction": "q", "Input": "x", "Output": "a"}, "{instruction: Instruction, input: Input, output: Output}"),
        (
            {"Messages": [{"Role": "user", "Content": "q"}, {"Role": "assistant", "Content": "a"}]},
            "{messages: Messages, role: Role, content: Content}",
        ),
        ({"dialog": ["q", "a"]}, "{messages: dialog}"),
        ({"question": "q", "answers": ["a", "b"]}, "{question: question, answer: answers.0}"),
        (
            {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [3]}},
            '{question: "{context} {question}", answer: answers.text.0}',
        ),
        ({"translation": {"en": "q", "fr": "a"}}, "{question: translation.en, answer: translation.fr}"),
        ({"inputs": "q", "targets": "a", "language": "x"}, "{question: inputs, answer: targets}"),
        ({"human": "q", "bot": "a"}, "{question: human, answer: bot}"),
    ],
)
def test_a_fix_names_the_columns_under_which_the_messages_are_read(fields, columns, write, config, renderer):
    with pytest.raises(DataError) as refused:
        detect_format([Row("f:1", fields)])
    assert f"`columns: {columns}`" in refused.value.problems[0].fix
    # ... and they are: the proposal is taken as it stands.
    source = SourceConfig(str(write("a.jsonl", [fields])), columns=yaml.safe_load(columns))
    assert prepare_data(config(source), renderer).ledger.summary()["train"]["used"] == 1


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": ["q", "a"]}, "{messages: messages}"),
        ({"messages": [{"role": "user", "message": "q"}, {"role": "bot", "message": "a"}]}, "{content: message}"),
        (
            {"messages": [{"Role": "user", "Content": "q"}, {"Role": "bot", "Content": "a"}]},
            "{role: Role, content: Content}",
        ),
    ],
)
def test_a_fix_names_the_keys_under_which_messages_are_read(row, columns, write, config, renderer):
    path = str(write("a.jsonl", [row]))
    with pytest.raises(DataError) as refused:
        prepare_data(config(path), renderer)
    assert f"`columns: {columns}`" in refused.value.problems[0].fix
    source = SourceConfig(path, columns=yaml.safe_load(columns))
    assert prepare_data(config(source), renderer).ledger.summary()["train"]["used"] == 1


def nothing(fields):
    return False


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        (
            {"question": "q", "response_j": "a", "response_k": "b"},
            "{prompt: question, chosen: response_j, rejected: response_k}",
        ),
        (
            {"prompt": "q", "preferred": "a", "dispreferred": "b"},
            "{prompt: prompt, chosen: preferred, rejected: dispreferred}",
        ),
        ({"x": "q", "y_w": "a", "y_l": "b"}, "{prompt: x, chosen: y_w, rejected: y_l}"),
        (
            {
                "input": {"messages": CHAT[:1]},
                "preferred_output": CHAT[1:],
                "non_preferred_output": [CHAT[1] | {"content": "b"}],
            },
            "{prompt: input.messages, chosen: preferred_output, rejected: non_preferred_output}",
        ),
        ({"Prompt": "q", "Chosen": "a", "Rejected": "b"}, "{prompt: Prompt, chosen: Chosen, rejected: Rejected}"),
    ],
)
def test_the_better_and_the_worse_answer_are_found_by_their_names(fields, columns):
    """OpenAI's, Anthropic's and the papers' names of the two sides."""
    known = RECOGNIZED_BY["dpo"]
    with pytest.raises(DataError) as refused:
        detect_format([Row("f:1", fields)], None, known)
    assert f"`columns: {columns}`" in refused.value.problems[0].fix
    source = SourceConfig("f", columns=yaml.safe_load(columns))
    chosen, rejected = PREFERENCE_FORMATS["preference"].parse(renamed(Row("f:1", fields), source))
    assert [message.content for side in (chosen, rejected) for message in side.messages] == ["q", "a", "q", "b"]


def test_rows_that_compare_answers_are_named_as_that():
    fix = proposed_columns({"prompt": "q", "chosen": "a", "rejected": "b"}, "a.jsonl:1", nothing)
    assert "`objective.method=dpo`" in fix
    assert "`columns: {prompt: prompt, completion: chosen}`" in fix
    asked = proposed_columns({"instruction": "q", "chosen": "a", "rejected": "b"}, "a.jsonl:1", nothing)
    assert "`columns: {prompt: instruction, completion: chosen}`" in asked
    assert "`columns: {messages: chosen}`" in proposed_columns({"chosen": CHAT, "rejected": CHAT}, "a.jsonl:1", nothing)
    both = proposed_columns({"prompt": "q", "completion": "a", "rating": 5}, "a.jsonl:1", nothing, compares=True)
    assert "`chosen` and `rejected`" in both
    assert "columns" not in both


def test_a_dialogue_that_two_texts_repeat_is_parted_by_the_source(write, config, renderer):
    """As hh-rlhf writes it."""
    row = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    with pytest.raises(UnusableRowError) as refused:
        PREFERENCE_FORMATS["preference"].parse(Row("f:1", row))
    assert refused.value.fix == "let the source part these dialogues: `columns: {chosen: chosen, rejected: rejected}`"


def test_a_table_without_a_header_is_asked_for_one():
    assert "first line of the file names its columns" in proposed_columns({"What?": "a"}, "a.csv:2", nothing)
    assert "first line" not in proposed_columns({"What?": "a"}, "a.jsonl:2", nothing)


def test_choices_are_no_turns():
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    assert "messages" not in proposed_columns(row, "a.jsonl:1", nothing)


def test_parts_of_a_text_with_a_switch_each_are_named():
    row = {"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]}
    assert "`prompt`" in proposed_columns(row, "a.jsonl:1", nothing)
