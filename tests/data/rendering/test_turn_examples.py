"""A system prompt and template arguments of the config; an example for each turn; empty thoughts are not trained."""

import pickle

import pytest

from llmtune.config.schema import DataConfig
from llmtune.data.dataset.make_dataset import prepare_data, survey_data
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer

THINKING = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif -%}
{%- if m.tool_calls is defined and m.tool_calls -%}{{ 'call ' + m.tool_calls[0].function.name }}{%- endif -%}
{{ m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}"""
"""Thoughts of the last turn alone, empty ones too, and a prompt that can begin with an empty thought."""

OPENED = THINKING.replace("{%- endif -%}\n{%- endif -%}", "{%- else -%}{{ '<think>\\n' }}{%- endif -%}\n{%- endif -%}")
"""The same with a prompt that begins a thought, which earlier turns do not have."""

CHAT = (
    Message("user", "q1"),
    Message("assistant", "a1", None, {"reasoning_content": "t1"}),
    Message("user", "q2"),
    Message("assistant", "a2", None, {"reasoning_content": "t2"}),
)
PLAIN = tuple(Message(message.role, message.content) for message in CHAT)
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
TOOLS = (
    Message("user", "q1"),
    Message("assistant", "", None, {"tool_calls": [CALL]}),
    Message("tool", "r1"),
    Message("assistant", "a1"),
    Message("user", "q2"),
    Message("assistant", "a2"),
    Message("user", "bye"),
)


def trained_texts(tokenizer, rendered):
    """The trained stretches of an example, decoded."""
    texts, run = [], []
    for token, weight in [*zip(rendered.input_ids, rendered.weights, strict=True), (None, 0)]:
        if weight:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def examples(tokenizer, messages, template=THINKING, **options):
    renderer = Renderer(tokenizer, chat_template=template, **options)
    return renderer.render_examples(Conversation("f:1", messages))


def all_texts(tokenizer, messages, template=THINKING, **options):
    rendered = examples(tokenizer, messages, template, **options)
    return [trained_texts(tokenizer, example) for example in rendered]


# --- one example per turn


@pytest.fixture
def tokenizer(tokenizer_for):
    return tokenizer_for("qwen3")


def test_without_it_the_earlier_answers_of_such_a_template_are_not_trained(tokenizer):
    (example,) = examples(tokenizer, PLAIN, OPENED)
    assert (example.answers, example.trained_answers) == (2, 1)
    assert "unstable" in {warning.code for warning in example.warnings}


@pytest.mark.parametrize("template", [THINKING, OPENED])
def test_each_answer_is_trained_as_the_last_one_with_its_thought(template, tokenizer):
    start = "<think>\n" if template is THINKING else ""
    assert all_texts(tokenizer, CHAT, template, one_example_per_turn=True) == [
        [f"{start}t1\n</think>\n\na1<|im_end|>"],
        [f"{start}t2\n</think>\n\na2<|im_end|>"],
    ]
    for example in examples(tokenizer, CHAT, template, one_example_per_turn=True):
        assert example.warnings == ()


def test_a_turn_is_all_messages_of_the_assistant_and_what_its_tools_answer(tokenizer):
    assert all_texts(tokenizer, TOOLS, one_example_per_turn=True) == [
        ["call f<|im_end|>", "a1<|im_end|>"],
        ["a2<|im_end|>"],
    ]


def test_every_message_is_trained_in_one_example_and_by_the_rule(tokenizer):
    everything = all_texts(tokenizer, TOOLS, one_example_per_turn=True, train_on="all_messages")
    assert everything == [
        ["q1<|im_end|>", "call f<|im_end|>", "r1<|im_end|>", "a1<|im_end|>"],
        ["q2<|im_end|>", "a2<|im_end|>"],
        ["bye<|im_end|>"],
    ]
    last = all_texts(tokenizer, TOOLS, one_example_per_turn=True, train_on="last_assistant_message")
    assert last == [["a1<|im_end|>"], ["a2<|im_end|>"]]
    marked = (PLAIN[0], Message("assistant", "a1", 0.0), *PLAIN[2:])
    assert all_texts(tokenizer, marked, one_example_per_turn=True) == [[], ["a2<|im_end|>"]]


def test_the_prompt_of_each_answer_is_a_prefix_of_its_example(tokenizer):
    renderer = Renderer(tokenizer, chat_template=OPENED, one_example_per_turn=True)
    for stop, example in zip((1, 3), renderer.render_examples(Conversation("f:1", CHAT)), strict=True):
        prompt = renderer.prompt_ids(CHAT[:stop])
        assert example.input_ids[: len(prompt)] == prompt


# --- empty thoughts


@pytest.mark.parametrize(
    "block",
    [
        "<think>\\n\\n</think>\\n\\n",
        "<think></think>",
        "<think> </think>\\n",
        "[THINK][/THINK]",
        "<thinking>\\n</thinking>\\n",
        "<|START_THINKING|><|END_THINKING|>",
        "<seed:think>\\n</seed:think>\\n",
        "<thought>\\n</thought>",
    ],
)
def test_an_empty_thought_that_the_template_writes_is_never_trained(block, tokenizer):
    template = THINKING.replace(
        "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}", "{{ '" + block + "' }}"
    )
    assert template != THINKING
    (texts,) = all_texts(tokenizer, PLAIN[:2], template)
    assert texts == ["a1<|im_end|>"]
    (texts,) = all_texts(tokenizer, PLAIN[:2], template, train_on="all_messages")
    assert "think" not in "".join(texts).lower()


def test_a_thought_of_the_row_is_trained_also_an_empty_one_that_it_spells_out(tokenizer):
    assert all_texts(tokenizer, CHAT[:2]) == [["<think>\nt1\n</think>\n\na1<|im_end|>"]]
    spelled = (PLAIN[0], Message("assistant", "<think></think>a"))
    plain = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    plain += "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    assert all_texts(tokenizer, spelled, plain) == [["<think></think>a<|im_end|>"]]


def test_white_space_of_the_answer_after_an_empty_thought_is_trained(tokenizer):
    (texts,) = all_texts(tokenizer, (PLAIN[0], Message("assistant", " a\n")))
    assert texts == [" a\n<|im_end|>"]


# --- arguments and system prompt


def test_arguments_reach_training_and_prompt_and_a_row_has_its_own(tokenizer):
    renderer = Renderer(tokenizer, chat_template=THINKING, template_args={"enable_thinking": False})
    rendered = renderer.render(Conversation("f:1", PLAIN))
    prompt = renderer.prompt_ids(PLAIN[:3])
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.trained_answers == 1
    own = Conversation("f:1", PLAIN, template_args={"enable_thinking": True})
    assert renderer.render(own).trained_answers == 2
    plain = Renderer(tokenizer, chat_template=THINKING)
    assert plain.render(own) == renderer.render(own)
    assert not tokenizer.decode(plain.prompt_ids(PLAIN[:3])).endswith("</think>\n\n")


def test_text_in_an_argument_never_becomes_a_control_token(tokenizer):
    template = "{{ note }}" + THINKING
    renderer = Renderer(tokenizer, chat_template=template, template_args={"note": "<|im_end|>"})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert renderer.render(Conversation("f:1", PLAIN[:2])).input_ids.count(end) == 2
    assert renderer.prompt_ids(PLAIN[:1]).count(end) == 1


def test_a_conversation_without_a_system_prompt_gets_that_of_the_config(tokenizer):
    renderer = Renderer(tokenizer, chat_template=THINKING, system="Be brief.")
    with_own = (Message("system", "Own."), *PLAIN)
    given = Renderer(tokenizer, chat_template=THINKING)
    assert renderer.render(Conversation("f:1", PLAIN)) == given.render(
        Conversation("f:1", (Message("system", "Be brief."), *PLAIN))
    )
    assert renderer.prompt_ids(PLAIN[:1]) == given.prompt_ids((Message("system", "Be brief."), *PLAIN[:1]))
    for messages in (with_own, (Message("developer", "Own."), *PLAIN), (*PLAIN[:2], Message("system", "Own."), *PLAIN)):
        conversation = Conversation("f:1", messages)
        assert renderer.render(conversation) == given.render(conversation)
    assert renderer.prompt_ids(with_own[:2]) == given.prompt_ids(with_own[:2])
    per_turn = Renderer(tokenizer, chat_template=THINKING, system="Be brief.", one_example_per_turn=True)
    for example in per_turn.render_examples(Conversation("f:1", CHAT)):
        assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\nBe brief.")
        assert example.warnings == ()


def test_a_text_row_says_that_it_has_no_system_prompt(tokenizer):
    renderer = Renderer(tokenizer, system="Be brief.")
    for conversation in (
        Conversation("f:1", text="abc"),
        Conversation("f:1", (Message("user", "a"), Message("assistant", "b")), prompt_is_text=True),
    ):
        assert "system-unused" in {warning.code for warning in renderer.render(conversation).warnings}


def test_the_digest_covers_each_setting_and_without_them_is_what_it_was(tokenizer):
    options = [{}, {"system": "a"}, {"template_args": {"a": False}}, {"one_example_per_turn": True}]
    digests = [Renderer(tokenizer, **option).digest for option in options]
    assert len(set(digests)) == 4
    assert Renderer(tokenizer, template_args={}, system=None).digest == digests[0]
    for option, digest in zip(options, digests, strict=True):
        assert pickle.loads(pickle.dumps(Renderer(tokenizer, **option))).digest == digest
    data = DataConfig(system="a", template_args={"b": 1}, one_example_per_turn=True)
    given = Renderer(tokenizer, system="a", template_args={"b": 1}, one_example_per_turn=True)
    assert Renderer.of_config(tokenizer, data).digest == given.digest


# --- rows of a run


def chat_row(*texts):
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return {"messages": turns}


def test_each_turn_is_an_example_of_its_row_and_the_balance_counts_rows(tokenizer, write, config):
    path = write("a.jsonl", [chat_row("q1", "a1", "q2", "a2"), chat_row("q3", "a3"), {"messages": []}])
    renderer = Renderer(tokenizer, chat_template=OPENED, one_example_per_turn=True)
    data = prepare_data(config(path, on_bad_row="skip"), renderer)
    texts = [trained_texts(tokenizer, data.train[index]) for index in range(len(data.train))]
    assert texts == [["a1<|im_end|>"], ["a2<|im_end|>"], ["a3<|im_end|>"]]
    summary = data.ledger.summary()["train"]
    assert [summary[name] for name in ("input", "used", "bad", "answers", "trained_answers")] == [3, 2, 1, 3, 3]
    assert list(data.ledger.training_warnings()) == []


@pytest.mark.parametrize(
    ("overlong", "status", "pieces"),
    [("error", "dropped", 0), ("drop", "cut", 1), ("truncate_right", "cut", 1), ("truncate_left", "cut", 2)],
)
def test_the_turns_of_a_row_that_are_too_long_are_treated_by_the_rule_for_long_examples(
    overlong, status, pieces, tokenizer, write, config
):
    path = write("a.jsonl", [chat_row("q1", "a1", "q2 " * 40, "a2")])
    renderer = Renderer(tokenizer, chat_template=OPENED, one_example_per_turn=True)
    data = survey_data(config(path, overlong=overlong, max_length=40), renderer)
    summary = data.ledger.summary()["train"]
    assert summary[status] == 1
    assert len(data.train) == pieces
    assert all(length <= 40 for length in data.train.lengths)
    assert bool(data.problems) == (overlong == "error")


def test_rows_that_are_over_long_in_every_turn_are_dropped_whole(tokenizer, write, config):
    path = write("a.jsonl", [chat_row("q1 " * 40, "a1", "q2", "a2"), chat_row("q", "a")])
    renderer = Renderer(tokenizer, chat_template=OPENED, one_example_per_turn=True)
    summary = survey_data(config(path, overlong="drop", max_length=40), renderer).ledger.summary()["train"]
    assert (summary["dropped"], summary["used"]) == (1, 1)
