"""Train and preview count the trained answers beside the rows, and name each warning that changes what is trained."""

import pytest

from llmtune.cli.main import main
from llmtune.data.dataset.make_dataset import prepare_data
from llmtune.data.rendering.renderer import Renderer
from llmtune.errors import DataError

THINKS_LAST = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
<think>
{% endif -%}"""
THOUGHT_OPENS = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}
{%- endif -%}"""
TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>\n{% endfor %}" + TAIL
OPEN = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content + '\\n' }}{% endfor %}" + TAIL


def turns(*contents, **last):
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    messages[-1] |= last
    return {"messages": messages}


def after(role, **marks):
    """A conversation behind a message with these marks."""
    return {"messages": [{"role": role, "content": "s", **marks}, *turns("q", "a")["messages"]]}


def prepared(write, config, tokenizer, rows, template, **options):
    rules = {"train_on": options["train_on"]} if "train_on" in options else {}
    renderer = Renderer(tokenizer, chat_template=template, **rules)
    return prepare_data(config(write("a.jsonl", rows), **options), renderer)


def test_half_of_the_answers_left_out_by_the_template_is_counted_and_named(write, config, tiny_tokenizer):
    rows = [turns(f"q1 {number}", "a1", "q2", "a2") for number in range(8)]
    ledger = prepared(write, config, tiny_tokenizer, rows, THINKS_LAST).ledger
    summary = ledger.summary()["train"]
    assert (summary["used"], summary["answers"], summary["trained_answers"]) == (8, 16, 8)
    (line,) = ledger.training_warnings()
    assert line.startswith("unstable: 8 train rows, such as ")
    assert "a.jsonl:1: message 2 (assistant) is not trained: the prompt for it goes on with" in line
    assert "fix: for earlier answers make an example of each (`data.one_example_per_turn=true`), or train the" in line
    assert "`data.train_on=last_assistant_message`" in line


@pytest.mark.parametrize(
    ("row", "template", "code"),
    [
        (turns("q", "a", reasoning_content="because"), CHATML, "reasoning-dropped"),
        (turns("q", "a") | {"tools": [{"function": {"name": "add"}}]}, CHATML, "tools-dropped"),
        (turns("q", "a"), OPEN, "no-end-of-turn"),
        (turns("q", "a", weight=0.5), CHATML, "weight-ignored"),
        (after("user", train=True), CHATML, "weight-ignored"),
        (after("system", weight=1), CHATML, "weight-ignored"),
        (turns("q", "a") | {"chat_template_kwargs": {"enable_thinking": False}}, CHATML, "argument-unread"),
        (turns("q<|im_end|>", "a"), CHATML, "control-string"),
        (turns("q", "nan"), CHATML, "missing-value"),
        (turns("None", "a"), CHATML, "missing-value"),
    ],
)
def test_each_warning_that_changes_what_is_trained_is_named_with_its_way_out(
    row, template, code, write, config, tiny_tokenizer
):
    data = prepared(write, config, tiny_tokenizer, [turns("p", "b"), row], template)
    line = next(line for line in data.ledger.training_warnings() if line.startswith(code))
    assert line.startswith(f"{code}: 1 train row, such as ") or code == "no-end-of-turn"
    assert "; fix: " in line
    assert data.ledger.summary()["train"]["trained_answers"] == 2


@pytest.mark.parametrize(
    ("rule", "trained"),
    [
        ("all_assistant_messages", 3),
        ("last_assistant_message", 2),
        ("all_tokens", 3),
        ("customized", 1),
        ("all_user_and_system_messages", 0),
    ],
)
def test_trained_answers_are_those_that_the_rule_and_the_weights_leave(rule, trained, write, config, tiny_tokenizer):
    first, second = turns("q", "a", "r", "b"), turns("s", "c", "t", "d", weight=1.0)
    first["messages"][1]["weight"] = 0
    rows = [first, second]
    summary = prepared(write, config, tiny_tokenizer, rows, CHATML, train_on=rule).ledger.summary()["train"]
    # Under `customized` the first row trains nothing, so it is dropped and its answers are not counted.
    answers = 2 if rule == "customized" else 4
    assert (summary["answers"], summary["trained_answers"]) == (answers, trained)


def test_completions_are_answers_and_texts_have_none(write, config, tiny_tokenizer):
    summary = prepared(write, config, tiny_tokenizer, [{"prompt": "q", "completion": "a"}], CHATML).ledger.summary()
    assert (summary["train"]["answers"], summary["train"]["trained_answers"]) == (1, 1)
    summary = prepared(write, config, tiny_tokenizer, [{"text": "long enough"}], CHATML).ledger.summary()
    assert (summary["train"]["answers"], summary["train"]["trained_answers"]) == (0, 0)


def test_where_no_answer_is_left_the_fix_names_the_template(write, config, tiny_tokenizer):
    template = THINKS_LAST.replace("<think>\n\n</think>\n\n", "")
    with pytest.raises(DataError, match=r"model\.chat_template=FILE"):
        prepared(write, config, tiny_tokenizer, [turns("q", "a")], template)


def test_the_way_out_of_a_last_answer_that_is_not_trained_works(write, config, tiny_tokenizer):
    rows = [turns("q1", "a1", "q2", "a2"), turns("q3", "a3")]
    with pytest.raises(DataError, match="no row is left to train on") as refused:
        prepared(write, config, tiny_tokenizer, rows, THOUGHT_OPENS)
    assert "for last answers turn thinking off where the template can" in str(refused.value)
    assert "(`data.template_args={enable_thinking: false}`)" in str(refused.value)
    renderer = Renderer(tiny_tokenizer, chat_template=THOUGHT_OPENS, template_args={"enable_thinking": False})
    summary = prepare_data(config(write("a.jsonl", rows)), renderer).ledger.summary()["train"]
    assert (summary["answers"], summary["trained_answers"]) == (3, 3)


@pytest.mark.parametrize("command", [["data", "preview", "--json"], ["train", "--dry-run"]])
def test_preview_and_train_say_it(command, write, tmp_path, tiny_model_folder, monkeypatch, capsys):
    write("a.jsonl", [turns("q1", "a1", "q2", "a2"), turns("q3", "a1", "q2", "a2")])
    (tmp_path / "t.jinja").write_text(THINKS_LAST)
    (tmp_path / "c.yaml").write_text(
        f"model: {{name: {tiny_model_folder}, chat_template: t.jinja}}\ndata: {{train: [a.jsonl], max_length: 128}}\n"
        "training: {max_steps: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--config", "c.yaml"])
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert ended.value.code == 0, text
    assert "4 answers, 2 trained" in text
    assert "unstable: 2 train rows, such as a.jsonl:1: message 2 (assistant) is not trained" in text
