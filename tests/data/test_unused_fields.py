"""Marks and fields of other tools are read in every format; a field that nothing reads is named once per file."""

import json

import pytest

from llmtune.cli.main import main
from llmtune.config.schema import SourceConfig
from llmtune.data.dataset.make_dataset import prepare_data
from llmtune.data.example import Message, Row
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.formats import UnusableRowError, conversation_of, looks_like
from llmtune.errors import DataError


def conversation(**fields):
    return conversation_of(Row("f:1", fields), looks_like(fields))


def messages_with(mark, value):
    return [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", mark: value},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2", mark: True},
    ]


def sharegpt_with(mark, value):
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"from": names[turn["role"]], "value": turn["content"], mark: turn.get(mark)}
        for turn in messages_with(mark, value)
    ]


def trained(tokenizer, given, **options):
    rendered = Renderer(tokenizer, **options).render(given)
    pairs = zip(rendered.input_ids, rendered.weights, strict=True)
    return tokenizer.decode([token for token, weight in pairs if weight]), sorted(set(rendered.weights) - {0.0})


# --- marks on messages


@pytest.mark.parametrize("mark", ["train", "loss", "trainable", "training", "loss_mask"])
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_a_mark_of_false_takes_the_message_out_of_the_loss_in_every_format(mark, value, tiny_tokenizer):
    for given in (
        conversation(messages=messages_with(mark, value)),
        conversation(conversations=sharegpt_with(mark, value)),
        conversation(prompt=messages_with(mark, value)[:1], completion=messages_with(mark, value)[1:]),
    ):
        assert [message.weight for message in given.messages if message.role == "assistant"] == [0.0, 1.0]
        assert not given.unused
        assert trained(tiny_tokenizer, given) == ("a2<|im_end|>", [1.0])


def test_a_mark_of_true_keeps_the_weight_of_the_message_and_a_mark_of_false_beats_it():
    turns = [
        {"role": "assistant", "content": "a", "train": True, "weight": 0.5},
        {"role": "assistant", "content": "b", "train": False, "weight": 0.5},
        {"role": "assistant", "content": "c", "loss": True, "train": False},
        {"role": "assistant", "content": "d", "train": None},
    ]
    assert [message.weight for message in conversation(messages=turns).messages] == [0.5, 0.0, 0.0, None]


def test_marks_count_under_the_rule_that_trains_messages_by_their_weight(tiny_tokenizer):
    given = conversation(messages=messages_with("train", False))
    assert trained(tiny_tokenizer, given, train_on="customized") == ("a2<|im_end|>", [1.0])


@pytest.mark.parametrize("value", ["false", 0.5, [], 2])
def test_a_mark_that_is_neither_true_nor_false_is_named(value):
    with pytest.raises(UnusableRowError) as caught:
        conversation(messages=messages_with("train", value))
    assert caught.value.field == "messages[1].train"
    assert "must be true or false" in caught.value.problem


def test_other_keys_of_messages_are_named_with_the_switches_first():
    turns = [
        {"role": "user", "content": "q", "image": "a.png", "date": None, "tags": []},
        {"role": "assistant", "content": "a", "prefix": True, "thought": "x", "tool_call": {"name": "f"}},
    ]
    assert conversation(messages=turns).unused == (
        "switch `prefix` of a message",
        "`image` of a message",
        "`thought` of a message",
        "`tool_call` of a message",
    )
    turns = [{"from": "human", "value": "q", "masked": False}, {"from": "gpt", "value": "a", "model": "m"}]
    assert conversation(conversations=turns).unused == ("switch `masked` of a message", "`model` of a message")
    assert len(conversation(messages=[{"role": "user", "content": "q"} | {f"k{i}": i for i in range(99)}]).unused) == 12


# --- fields beside the messages

USER, ANSWER, SYSTEM = Message("user", "q"), Message("assistant", "a"), Message("system", "You add.")
CHATS = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "dolly": {"instruction": "q", "context": "", "response": "a"},
    "texts": {"prompt": "q", "response": "a"},
    "openorca": {"question": "q", "response": "a"},
    "lists": {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_messages_comes_first_in_every_format(chat, name, tiny_tokenizer):
    given = conversation(**CHATS[chat], **{name: "You add."})
    assert given.messages[0] == SYSTEM
    assert [message.role for message in given.messages] == ["system", "user", "assistant"]
    assert (given.prompt_is_text, given.unused) == (False, ())
    rendered = Renderer(tiny_tokenizer).render(given)
    assert tiny_tokenizer.decode(rendered.input_ids).startswith("<|im_start|>system\nYou add.<|im_end|>")


def test_a_system_prompt_beside_a_conversation_that_has_one_is_named():
    turns = [{"role": "system", "content": "own"}, *CHATS["messages"]["messages"]]
    given = conversation(messages=turns, system="You add.")
    assert given.messages == (Message("system", "own"), USER, ANSWER)
    assert given.unused == ("`system`",)


def test_rows_of_one_table_are_all_conversations_where_some_have_no_system_prompt():
    assert not conversation(prompt="q", response="a", system_prompt="").prompt_is_text
    assert conversation(prompt="q", response="a").prompt_is_text


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("rule", ["all_assistant_messages", "customized"])
def test_the_weight_of_a_row_counts_in_every_format_under_every_rule(chat, rule, tiny_tokenizer):
    text, weights = trained(tiny_tokenizer, conversation(**CHATS[chat], weight=0.25), train_on=rule)
    assert weights == [0.25]
    assert text.startswith("a")


def test_the_weight_of_a_row_multiplies_those_of_its_messages_and_of_its_source(tiny_tokenizer):
    turns = [{"role": "assistant", "content": "a", "weight": 2.0}, {"role": "assistant", "content": "b", "weight": 1.0}]
    given = conversation_of(Row("f:1", {"messages": turns, "weight": "0.5"}, 3.0), "messages")
    assert trained(tiny_tokenizer, given, train_on="customized")[1] == [1.5, 3.0]
    assert conversation(text="t", weight=0.5).loss_weight == 0.5
    with pytest.raises(UnusableRowError, match="must be a number"):
        conversation(text="t", weight="heavy")


def test_template_arguments_of_a_row_are_given_to_its_template(tiny_tokenizer):
    source = (
        "{%- set is_off = enable_thinking is defined and not enable_thinking -%}{{ style if style is defined }}"
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' and is_off -%}<think></think>{%- endif -%}"
        "{{ m.content + '<|im_end|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
        "{%- if is_off -%}<think></think>{%- endif -%}{%- endif -%}"
    )
    turns = CHATS["messages"]["messages"]
    renderer = Renderer(tiny_tokenizer, chat_template=source)
    for arguments, text in (
        ({}, "<|im_start|>assistant\na<|im_end|>"),
        ({"enable_thinking": False}, "<|im_start|>assistant\n<think></think>a<|im_end|>"),
        ('{"enable_thinking": true, "style": null}', "<|im_start|>assistant\na<|im_end|>"),
    ):
        given = conversation(messages=turns, chat_template_kwargs=arguments)
        assert given.unused == ()
        rendered = renderer.render(given)
        assert text in tiny_tokenizer.decode(rendered.input_ids)
        assert trained(tiny_tokenizer, given, chat_template=source) == ("a<|im_end|>", [1.0])
    # The text of an argument is text of the row: it never becomes a control token.
    given = conversation(messages=turns, chat_template_kwargs={"style": "<|im_end|>"})
    assert [warning.code for warning in renderer.render(given).warnings] == ["control-string"]


@pytest.mark.parametrize("arguments", [["a"], "{", {"messages": []}, {"add_generation_prompt": True}])
def test_template_arguments_that_cannot_be_given_are_named(arguments):
    with pytest.raises(UnusableRowError) as caught:
        conversation(**CHATS["messages"], chat_template_kwargs=arguments)
    assert caught.value.field.startswith("chat_template_kwargs")


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_a_column_of_reasoning_is_that_of_the_answer(name):
    for chat in ("alpaca", "dolly", "texts", "openorca"):
        given = conversation(**CHATS[chat], **{name: "because"})
        assert given.messages[-1] == Message("assistant", "a", None, {"reasoning_content": "because"})
        assert (given.prompt_is_text, given.unused) == (False, ())
    for chat in ("messages", "sharegpt", "lists"):
        assert conversation(**CHATS[chat], **{name: "because"}).unused == (f"`{name}`",)


def test_tools_count_in_every_format_but_plain_text():
    tools = [{"type": "function", "function": {"name": "add"}}]
    for chat in CHATS.keys() - {"texts", "openorca"}:
        assert conversation(**CHATS[chat], tools=tools).tools == tuple(tools)
    assert conversation(**CHATS["texts"], tools=tools).unused == ("`tools`",)


def test_a_row_of_dolly_is_a_question_with_its_context():
    given = conversation(instruction="Who?", context="Hamlet is by S.", response="S", category="closed_qa")
    assert given.messages == (Message("user", "Who?\n\nHamlet is by S."), Message("assistant", "S"))
    assert given.unused == ("`category`",)


# --- said once per file


def test_unused_fields_are_counted_once_per_file_and_not_row_by_row(write, config, renderer):
    turns = [{"role": "user", "content": "q", "image": "a.png"}, {"role": "assistant", "content": "a"}]
    first = write("a.jsonl", [{"messages": turns, "id": n + 1, "enable_thinking": n > 0} for n in range(3)])
    other = write("b.jsonl", [CHATS["alpaca"], CHATS["alpaca"] | {"source": "s"}])
    ledger = prepare_data(config(first, other, on_duplicate="keep"), renderer).ledger
    assert ledger.unused_fields() == [
        f"{first}: fields not used: switch `enable_thinking` (3 rows, first a.jsonl:1), "
        "`image` of a message (3 rows, first a.jsonl:1), `id` (3 rows, first a.jsonl:1)",
        f"{other}: fields not used: `source` (1 row, first b.jsonl:2)",
    ]
    assert ledger.summary()["train"]["notes"]["unused-field"] == 4


UNREADABLE = {
    "NaN": "NaN is not a JSON number",
    "-Infinity": "-Infinity is not a JSON number",
    '"a\\ud800"': "half a surrogate pair",
    '{"x": 1, "x": 2}': "the key stands twice",
}
"""Values in JSON that their author cannot have meant."""


@pytest.mark.parametrize("value", UNREADABLE)
def test_a_value_that_cannot_be_read_refuses_the_row_only_where_it_is_used(value, write, config, renderer):
    """Rows of pandas hold NaN in columns of scores; of a message and below one it is no other."""
    chat = '{"messages": [{"role": "user", "content": "q"%s}, {"role": "assistant", "content": "%d"%s}]%s}'
    unused = [
        chat % ("", 1, "", f', "score": {value}'),
        chat % (f', "logprob": {value}', 2, "", ""),
        chat % ("", 3, f', "meta": {{"a": [{value}]}}', f', "id": {value}'),
    ]
    used = [
        chat % ("", 4, "", f', "system": {value}'),
        chat % ("", 5, f', "tool_calls": [{{"function": {{"name": "f", "arguments": {{"a": {value}}}}}}}]', ""),
        chat % ("", 6, f', "reasoning_content": {value}', ""),
        chat % ("", 7, "", f', "tools": [{{"name": "f", "of": [{value}]}}]'),
        chat % ("", 8, "", f', "chat_template_kwargs": {{"a": {value}}}'),
        chat % ("", 9, f', "weight": {value}', ""),
    ]
    ledger = prepare_data(
        config(write("a.jsonl", [row.encode() for row in (*unused, *used)]), on_bad_row="skip"), renderer
    ).ledger
    counts = ledger.summary()["train"]
    assert (counts["used"], counts["bad"]) == (len(unused), len(used))
    (named,) = ledger.unused_fields()
    assert all(f"`{field}" in named for field in ("score", "logprob", "meta", "id"))
    reasons = [ledger.parts[0].reason(row).problem for row in range(len(unused), counts["input"])]
    # In a row of its own an object is of the wrong type already.
    assert all(UNREADABLE[value] in reason for reason in reasons) or value.startswith("{"), reasons


def test_a_byte_that_is_no_utf_8_in_a_column_that_nothing_reads_costs_no_row(tmp_path, config, renderer):
    (tmp_path / "a.csv").write_bytes(b"prompt,completion,note\na,b,\xff\nc,\xff,d\n")
    ledger = prepare_data(config(tmp_path / "a.csv", on_bad_row="skip"), renderer).ledger
    assert {key: ledger.summary()["train"][key] for key in ("used", "bad")} == {"used": 1, "bad": 1}


def test_a_column_that_cannot_be_read_is_named_where_a_template_joins_it(write, config, renderer):
    path = str(write("a.jsonl", [b'{"q": "a", "n": NaN, "answer": "b"}']))
    with pytest.raises(DataError, match="NaN is not a JSON number"):
        prepare_data(config(SourceConfig(path, columns={"question": "{q} {n}"})), renderer)


@pytest.mark.parametrize("value", ["thinking", True, 3, {"steps": 2}])
def test_a_field_called_like_reasoning_that_is_no_text_is_named(value):
    given = conversation(question="q", answer="a", thinking=value)
    is_text = isinstance(value, str)
    assert given.messages[1].extra == ({"reasoning_content": value} if is_text else {})
    assert [name.removeprefix("switch ") for name in given.unused] == ([] if is_text else ["`thinking`"])


def test_preview_names_them_and_the_ledger_does_not_list_their_rows(
    write, tmp_path, tiny_model_folder, monkeypatch, capsys
):
    write("a.jsonl", [{"id": 1, **CHATS["messages"]}, {"id": 2, **CHATS["alpaca"]}][:1])
    (tmp_path / "c.yaml").write_text(f"model:\n  name: {tiny_model_folder}\ndata:\n  train: [a.jsonl]\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["data", "preview", "--config", "c.yaml", "--json"])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert json.loads(printed.out)["source"] == "a.jsonl:1"
    assert "note: a.jsonl: fields not used: `id` (1 row, first a.jsonl:1)" in printed.err
