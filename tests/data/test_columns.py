"""A source names the columns of its rows and the roles of its messages, and has its own format and mask rule."""

import csv
import json

import numpy as np
import pytest

from llmtune.config.layers import load_config
from llmtune.config.schema import SourceConfig
from llmtune.config.sources import COLUMN_FIELDS, TURN_COLUMNS
from llmtune.data.dataset.make_dataset import iter_texts, prepare_data, survey_data
from llmtune.data.dataset.report import data_report
from llmtune.data.example import Row
from llmtune.data.reading.columns import renamed
from llmtune.data.rows.formats import conversation_of, looks_like
from llmtune.data.rows.preferences import PREFERENCE_FORMATS, RECOGNIZED_BY
from llmtune.errors import ConfigError, DataError

CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}


def rename(fields, columns=None, roles=None):
    row = renamed(Row("a:1", fields), SourceConfig("a", columns=columns or {}, roles=roles or {}))
    return dict(row.fields)


def tokens(prepared):
    return [(example.input_ids.tolist(), example.weights.tolist()) for example in prepared.train]


def same_rows(write, config, renderer, given, plain, **keys):
    """Whether rows with `keys` in their source become what other rows become without any."""
    source = SourceConfig(str(write("given.jsonl", given)), **keys)
    return tokens(prepare_data(config(source), renderer)) == tokens(
        prepare_data(config(write("plain.jsonl", plain)), renderer)
    )


PAIRS = {
    "a name": ({"prompt": "ask", "completion": "say"}, {"ask": "Two?", "say": "2"}),
    "nested": ({"prompt": "q.text", "completion": "a.0.text"}, {"q": {"text": "Two?"}, "a": [{"text": "2"}]}),
    "a name with a dot": ({"prompt": "q.text", "completion": "a"}, {"q.text": "Two?", "a": "2"}),
    "joined": ({"prompt": "{x}{y}?", "completion": "{z}"}, {"x": "T", "y": "wo", "z": 2}),
    "swapped": ({"prompt": "completion", "completion": "prompt"}, {"completion": "Two?", "prompt": "2"}),
}


@pytest.mark.parametrize("form", PAIRS)
def test_columns_of_any_name_become_the_fields_of_a_format(write, config, renderer, form):
    columns, row = PAIRS[form]
    plain = {"prompt": "Two?", "completion": "2"}
    assert same_rows(write, config, renderer, [row], [plain], columns=columns)


def test_a_template_joins_fields_and_an_empty_one_leaves_no_line_break_behind():
    columns = {"prompt": "{context}\n{question}", "completion": "answer"}
    row = {"context": "Pisa leans.", "question": "Does it?", "answer": "Yes."}
    assert rename(row, columns) == {"prompt": "Pisa leans.\nDoes it?", "completion": "Yes."}
    for empty in ({"context": ""}, {"context": None}, {}):
        row = {"question": "Does it?", "answer": "Yes."} | empty
        assert rename(row, columns) == {"prompt": "Does it?", "completion": "Yes."}
    assert rename({"a": {"b": True}, "c": [1, "x"]}, {"text": "{{{a.b}}} {c}"})["text"] == '{true} [1, "x"]'


def test_a_column_that_is_read_is_gone_under_its_own_name_and_one_in_its_place_is_named(write, config, renderer):
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "id": 7}
    columns = {"prompt": "{instruction}\n{input}", "completion": "output"}
    assert rename(row, columns) == {"prompt": "Add.\n1 1", "completion": "2", "id": 7}
    row = {"question": "Two?", "prompt": "of the task", "answer": "2"}
    source = SourceConfig(str(write("a.jsonl", [row])), columns={"prompt": "question", "completion": "answer"})
    (line,) = prepare_data(config(source), renderer).ledger.unused_fields()
    assert "`prompt (its place is taken by `columns`)`" in line


def test_keys_and_roles_of_messages_are_renamed(write, config, renderer):
    turns = [{"who": "Customer", "say": "Hi?"}, {"who": "AGENT", "say": "Hello."}]
    keys = {
        "columns": {"messages": "log.turns", "role": "who", "content": "say"},
        "roles": {"customer": "user", "agent": "assistant"},
    }
    assert same_rows(write, config, renderer, [{"log": {"turns": turns}}], [CHAT], **keys)


@pytest.mark.parametrize(("user", "assistant"), [("human", "ai"), ("User", "Model"), ("customer", "bot-7")])
@pytest.mark.parametrize(("speaker", "text"), [("role", "content"), ("from", "value")])
def test_roles_of_any_name_and_case_in_messages_and_in_sharegpt_turns(
    write, config, renderer, user, assistant, speaker, text
):
    turns = [{speaker: user, text: "Hi?"}, {speaker: assistant.upper(), text: "Hello."}]
    field = "messages" if speaker == "role" else "conversations"
    roles = {user.lower(): "user", assistant: "assistant"}
    assert same_rows(write, config, renderer, [{field: turns}], [CHAT], roles=roles)


DIALOGUES = {
    "empty lines": ("\n\nHuman: Hi?\n\nAssistant: Hello.", {}),
    "headings": ("### Human: Hi?### Assistant: Hello.</s>", {}),
    "lines": ("user: Hi?\nAgent: Hello. <|im_end|>\n", {"agent": "assistant"}),
    "names of two words": ("Desk clerk: Hello.\n\nUSER: Bye?", {"Desk clerk": "assistant"}),
    "by turns": (["Hi?", "Hello."], {}),
}


@pytest.mark.parametrize("form", DIALOGUES)
def test_a_dialogue_in_one_text_is_a_list_of_messages(write, config, renderer, form):
    text, roles = DIALOGUES[form]
    plain = CHAT
    if form == "names of two words":
        plain = {"messages": [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye?"}]}
    keys = {"columns": {"messages": "log"}, "roles": roles}
    assert same_rows(write, config, renderer, [{"log": text}] * 2, [plain] * 2, **keys)


def test_dialogues_of_which_one_is_preferred_are_pairs_and_plain_answers_stay_text(write, config, renderer):
    chosen, rejected = ("\n\nHuman: Two?\n\nAssistant: " + answer for answer in ("2", "3"))
    source = SourceConfig(
        str(write("a.jsonl", [{"good": chosen, "bad": rejected}] * 2)), columns={"chosen": "good", "rejected": "bad"}
    )
    user = {"role": "user", "content": "Two?"}
    sides = {"chosen": "2", "rejected": "3"}
    plain = write(
        "b.jsonl", [{side: [user, {"role": "assistant", "content": text}] for side, text in sides.items()}] * 2
    )
    found, expected = (
        prepare_data(config(each), renderer, formats=RECOGNIZED_BY["dpo"]).train for each in (source, plain)
    )
    assert found.digest == expected.digest
    assert rename({"a": "A note: x"}, {"chosen": "a"})["chosen"] == "A note: x"


def test_a_speaker_inside_of_a_turn_begins_no_turn_and_text_before_the_first_is_the_system_message():
    messages = rename({"log": "Be kind.\n\nHuman: Say\nAssistant: x\n\nAssistant: x"}, {"messages": "log"})["messages"]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Be kind."),
        ("user", "Say\nAssistant: x"),
        ("assistant", "x"),
    ]


def test_a_text_that_is_no_dialogue_is_a_bad_row(write, config, renderer):
    path = write("a.jsonl", [{"log": "Human: Hi?\n\nAssistant: Hello."}, {"log": "A plain text: no turns."}])
    with pytest.raises(DataError, match="no two of its turns begin with a speaker") as caught:
        prepare_data(config(SourceConfig(str(path), columns={"messages": "log"})), renderer)
    assert caught.value.problems[0].where == f"{path}:2"


def test_a_list_in_a_cell_of_a_table_is_read_under_its_new_name(tmp_path, config, renderer, write):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["chat"], [json.dumps(CHAT["messages"])], ['[{"role": "user"']])
    source = SourceConfig(str(path), columns={"messages": "chat"})
    survey = survey_data(config(source, on_bad_row="skip"), renderer)
    assert tokens(survey) == tokens(prepare_data(config(write("plain.jsonl", [CHAT])), renderer))
    (entry,) = survey.ledger.entries
    assert (entry["fate"], entry["field"]) == ("bad", "chat")


def test_a_column_that_no_row_has_is_refused_with_the_nearest_one(write, config, renderer):
    path = write("a.jsonl", [{"question": "Two?", "reply": {"text": "2"}}])
    source = SourceConfig(str(path), columns={"prompt": "quesiton", "completion": "reply.txt"})
    with pytest.raises(DataError) as caught:
        prepare_data(config(source), renderer)
    first, second = (str(problem) for problem in caught.value.problems)
    assert "no row has the column `quesiton`" in first
    assert "did you mean `question`?" in first
    assert "no row has the column `reply.txt`" in second
    assert "did you mean `reply.text`?" in second


def test_columns_inside_objects_are_named_and_proposed_with_dots(write, config, renderer):
    path = write("a.jsonl", [{"mail": {"subject": "Order", "note": "Where?"}, "reply": {"text": "On its way."}}])
    with pytest.raises(DataError, match=r"these fields: `mail.subject`, `mail.note`, `reply.text`"):
        prepare_data(config(path), renderer)
    path = write("b.jsonl", [{"mail": {"question": "Where?"}, "reply": {"text": "On its way.", "stars": 5}}])
    with pytest.raises(DataError) as caught:
        prepare_data(config(path), renderer)
    assert "`columns: {question: mail.question, answer: reply.text}`" in str(caught.value)
    named = SourceConfig(str(path), columns={"question": "mail.question", "answer": "reply.text"})
    assert prepare_data(config(named), renderer).ledger.summary()["train"]["used"] == 1


def test_rows_that_hold_their_examples_in_a_list_are_not_called_texts_alone(write, config, renderer):
    path = write("a.jsonl", [{"title": "T", "paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}])
    with pytest.raises(DataError, match="write a row for each object in `paragraphs`, or say which texts are trained"):
        prepare_data(config(path), renderer)


def test_an_answer_that_is_an_object_is_made_text_as_the_fix_says(write, config, renderer):
    path = write("a.jsonl", [{"prompt": "Who?", "completion": {"name": "Kim", "age": 3}}])
    with pytest.raises(DataError, match=r'columns: \{completion: "\{completion\}"\}'):
        prepare_data(config(path), renderer)
    named = SourceConfig(str(path), columns={"completion": "{completion}"})
    assert prepare_data(config(named), renderer).ledger.summary()["train"]["used"] == 1


def test_keys_that_no_message_has_and_keys_that_a_format_does_not_use_are_refused(write, config, renderer):
    chats = write("chats.jsonl", [{"log": [{"who": "user", "say": "Hi?"}, {"who": "assistant", "say": "Hello."}]}])
    texts, tasks = write("t.jsonl", [{"text": "a"}] * 2), write("i.jsonl", [{"instruction": "a", "output": "b"}] * 2)
    sources = (
        SourceConfig(str(chats), columns={"messages": "log", "role": "whom", "content": "text"}),
        SourceConfig(str(texts), roles={"a": "user"}, train_on="last_assistant_message"),
        SourceConfig(str(tasks), roles={"a": "user"}),
    )
    with pytest.raises(DataError) as caught:
        prepare_data(config(*sources), renderer)
    expected = [
        ("no message has the key `whom`", "did you mean `who`?"),
        ("no message has the key `text`", "the keys of messages are `who`, `say`"),
        ("`roles` is not used: rows of the format `text`", "take it out"),
        ("`train_on` is not used", "all of a text is trained"),
        ("`roles` is not used: rows of the format `alpaca`", "take it out"),
    ]
    for problem, (said, fix) in zip(caught.value.problems, expected, strict=True):
        assert said in problem.problem
        assert fix in problem.fix


def test_a_row_without_the_column_is_bad_and_the_column_is_named(write, config, renderer):
    path = write("a.jsonl", [{"q": "Two?", "a": "2"}, {"q": "Three?"}])
    source = SourceConfig(str(path), columns={"prompt": "q", "completion": "a"}, format="prompt-completion")
    with pytest.raises(DataError, match=r"completion: .*\(`columns` reads it from 'a'\)"):
        prepare_data(config(source), renderer)


def test_a_number_is_made_text_by_a_template_over_its_column(write, config, renderer):
    path = str(write("a.jsonl", [{"q": "Two?", "n": 2}]))
    with pytest.raises(DataError) as refused:
        prepare_data(config(SourceConfig(path, columns={"question": "q", "answer": "n"})), renderer)
    assert refused.value.problems[0].fix.endswith('`columns: {answer: "{n}"}`')
    source = SourceConfig(path, columns={"question": "q", "answer": "{n}"})
    assert prepare_data(config(source), renderer).ledger.summary()["train"]["used"] == 1


BAD = {
    "{path: a, columns: {promt: q}}": "did you mean `prompt`?",
    "{path: a, columns: {prompt: '{q'}}": "columns: {prompt: '{q'}",
    "{path: a, columns: {prompt: '{q!r}'}}": "by its name alone",
    "{path: a, columns: {role: '{a}{b}'}}": "a key of a message is one name",
    "{path: a, roles: {human: person}}": "must be one of `system`",
    "{path: a, roles: {human: users}}": "did you mean `user`?",
    "{path: a, columns: [x]}": "a mapping of names to text",
    "{path: a, format: alpaca, text_column: body}": "only text rows have one",
    "{path: a, name: x}, {path: b, name: x}": "two sources named 'x'",
    "{path: a, train_on: answers}": "`last_assistant_message`",
}


@pytest.mark.parametrize("sources", BAD)
def test_keys_of_a_source_that_cannot_be_meant_are_refused_with_the_way_out(sources):
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ={}, overrides=[f"data.train=[{sources}]"])
    assert BAD[sources] in str(caught.value)


def test_every_field_that_columns_may_fill_is_read_by_a_format():
    beside = {"system": "s", "weight": 1, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}
    thought = [{"reasoning_content": "t"}, {"thinking": "t"}, {"reasoning": "t"}]
    rows = [{field: CHAT["messages"]} | beside for field in ("messages", "conversations", "conversation")]
    rows += [{"messages": CHAT["messages"], "system_prompt": "s"}, {"text": "t"}]
    rows += [{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]} | each for each in thought]
    rows += [{"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}, {"query": "a", "response": "b"}]
    read = set()
    for fields in rows:
        conversation = conversation_of(Row("a:1", fields), looks_like(fields))
        assert conversation.unused == ()
        read |= set(fields)
    answers = [{"chosen": "b", "rejected": "c"}, {"chosen_response": "b", "rejected_response": "c"}]
    answers += [{"completion": "b", "label": True}, {"completion": "b", "kto_tag": False}]
    for fields in answers:
        # The first that recognizes a row counts: a prompt alone is a format too, for rewards.
        format_name = next(name for name, row in PREFERENCE_FORMATS.items() if row.recognize({"prompt": "a"} | fields))
        conversations = PREFERENCE_FORMATS[format_name].parse(Row("a:1", {"prompt": "a"} | fields))
        assert [conversation.unused for conversation in conversations] == [()] * len(conversations)
        read |= set(fields)
    assert read == set(COLUMN_FIELDS) - set(TURN_COLUMNS)


def test_format_mask_rule_and_text_column_are_those_of_a_source(write, config, renderer):
    turns = [*CHAT["messages"], {"role": "user", "content": "Bye?"}, {"role": "assistant", "content": "Bye."}]
    chats = write("chats.jsonl", [{"messages": turns, "body": "x"}])
    texts = write("texts.jsonl", [{"body": "A plain text.", "prompt": "p", "completion": "c"}])
    sources = (
        SourceConfig(str(chats)),
        SourceConfig(str(chats), train_on="last_assistant_message"),
        SourceConfig(str(texts), text_column="body"),
        SourceConfig(str(texts), format="prompt-completion"),
    )
    together = tokens(prepare_data(config(*sources), renderer))
    alone = [tokens(prepare_data(config(source), renderer))[0] for source in sources]
    assert together == alone
    everything, last = np.array(alone[0][1]), np.array(alone[1][1])
    assert alone[0][0] == alone[1][0]
    assert 0 < last.sum() < everything.sum()
    assert (last <= everything).all()
    text = tokens(prepare_data(config(texts, text_column="body"), renderer))[0]
    assert alone[2] == text


def test_keys_that_change_rows_change_their_cached_set_and_names_do_not(write, config, renderer):
    path = str(write("a.jsonl", [{"q": "Two?", "a": "2", "b": "3", **CHAT}]))

    def is_cached(**keys):
        decisions = prepare_data(config(SourceConfig(path, **keys)), renderer).decisions
        return any("tokenized before" in decision.reason for decision in decisions)

    first = {"columns": {"prompt": "q", "completion": "a"}, "format": "prompt-completion"}
    assert not is_cached(**first)
    assert is_cached(**first)
    assert is_cached(**first, name="sums", repeat=2.0)
    assert not is_cached(columns={"prompt": "q", "completion": "b"}, format="prompt-completion")
    assert not is_cached(format="messages")
    assert not is_cached(format="messages", train_on="all_tokens")
    assert not is_cached(format="messages", roles={"user": "system"})


def test_a_tokenizer_is_trained_on_the_texts_that_columns_name(write, config):
    source = SourceConfig(str(write("a.jsonl", [{"q": "Two?", "a": "2"}])), columns={"prompt": "q", "completion": "a"})
    assert list(iter_texts(config(source))) == ["Two?", "2"]
    source = SourceConfig(str(write("b.jsonl", [{"body": "x"}])), text_column="body")
    assert list(iter_texts(config(source))) == ["x"]


def test_the_report_names_sources_by_name_and_those_of_one_path_apart(write, config, renderer):
    path = str(write("a.jsonl", [CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]}]))
    settings = config(SourceConfig(path, split="train[:1]", name="first"), SourceConfig(path, split="train[1:]"))
    report = data_report(prepare_data(settings, renderer), settings, batch_size=2)
    assert [(row["name"], row["source"], row["input"]) for row in report["sources"]] == [
        ("first", path, 1),
        ("a", path, 1),
    ]


def test_a_source_with_every_key_is_written_and_read_back(tmp_path):
    from llmtune.config.dump import config_to_yaml
    from llmtune.config.layers import parse_config

    keys = "path: a, format: auto, repeat: 1.5, "
    keys += 'columns: {prompt: "{a}\\n{b.c}", role: who}, roles: {Ai: assistant, "no": user}, name: "x: y"'
    config = load_config(None, environ={}, overrides=["data.train=[{" + keys + "}]"]).config
    (source,) = config.data.train
    assert source.columns == {"prompt": "{a}\n{b.c}", "role": "who"}
    assert parse_config(config_to_yaml(config)).config == config
