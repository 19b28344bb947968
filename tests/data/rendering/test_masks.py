"""Q5: what is trained is each answer from where its prompt ends through its end-of-turn tokens, with any template."""

import functools
from datetime import datetime

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer, message_fields

NOW = datetime.now()
few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
word = st.sampled_from(
    ["Hello", "12 words", "naïve", "東京", "two\n\nlines", "a  b", "🙂", "end.", "(x)", "\tTab", "| pipe |", "<b>"]
)
content = st.lists(word, min_size=1, max_size=5).map(" ".join)
ragged = st.builds(
    lambda before, text, after: before + text + after,
    *(st.sampled_from(["", " ", "\n", "  \n\n"]),),
    content,
    st.sampled_from(["", " ", "\n"]),
)


@st.composite
def talks(draw, takes, contents=content):
    """Messages that a template of a family with these abilities accepts."""
    talk = [Message("system", draw(contents))] if "system" in takes and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        questions = draw(st.integers(1, 2)) if "free" in takes else 1
        talk += [Message("user", draw(contents)) for _ in range(questions)]
        talk.append(Message("assistant", draw(contents)))
    if draw(st.booleans()):
        talk.append(Message("user", draw(contents)))
    return talk


@functools.cache
def renderer(tokenizer, train_on="all_assistant_messages"):
    return Renderer(tokenizer, train_on=train_on, now=NOW)


def row(messages, tools=()):
    return Conversation("rows.jsonl:1", tuple(messages), tools=tuple(tools))


def by_library(tokenizer, messages, template=None, tools=(), **options):
    fields = [message_fields(message) for message in messages]
    return tokenizer.apply_chat_template(fields, chat_template=template, tools=list(tools) or None, **options)


def mask_by_markers(tokenizer, family, messages, tools=()):
    """The oracle: the library reads the markers that llmtune never sees."""
    answer = by_library(tokenizer, messages, family.marked, tools, return_dict=True, return_assistant_tokens_mask=True)
    return answer["input_ids"], [float(is_trained) for is_trained in answer["assistant_masks"]]


@few
@given(data=st.data())
def test_the_tokens_of_a_row_are_those_of_the_library(name, families, tokenizer_for, data):
    tokenizer = tokenizer_for(name)
    messages = data.draw(talks(families[name].takes, ragged))
    assert renderer(tokenizer).render(row(messages)).input_ids == by_library(tokenizer, messages)["input_ids"]


@few
@given(data=st.data())
def test_what_is_trained_is_what_explicit_markers_enclose(name, families, tokenizer_for, data):
    family, tokenizer = families[name], tokenizer_for(name)
    # The library's own mask loses bytes of a last character and whitespace that a token swallows; llmtune's does not.
    messages = data.draw(talks(family.takes, content.map(lambda text: text.strip() + ".")))
    rendered = renderer(tokenizer).render(row(messages))
    assume("joined-token" not in {note.code for note in rendered.warnings})
    assert (rendered.input_ids, rendered.weights) == mask_by_markers(tokenizer, family, messages)


@few
@given(data=st.data())
def test_every_trained_turn_begins_where_its_prompt_ends(name, families, tokenizer_for, data):
    family, tokenizer = families[name], tokenizer_for(name)
    messages = data.draw(talks(family.takes, ragged))
    rendered = renderer(tokenizer).render(row(messages))
    assume("joined-token" not in {note.code for note in rendered.warnings})
    begins = [at for at, weight in enumerate(rendered.weights) if weight and not rendered.weights[at - 1]]
    prompts = [
        renderer(tokenizer).prompt_ids(messages[:at])
        for at, message in enumerate(messages)
        if message.role == "assistant"
    ]
    # An empty thought that the template writes after the prompt is not trained.
    empty_thought = {"qwen3": "<think>\n\n</think>\n\n", "thinker": "\n</think>\n\n"}.get(name)
    thoughtless = [tokenizer.decode(prompt) + empty_thought for prompt in prompts] if empty_thought else []
    unstable = sum(note.code == "unstable" for note in rendered.warnings)
    assert len(begins) == sum(message.role == "assistant" for message in messages) - unstable
    for begin in begins:
        before = rendered.input_ids[:begin]
        assert before in prompts or tokenizer.decode(before) in thoughtless
    for at, message in enumerate(messages):
        if message.role == "assistant" and name != "headless":
            assert (
                renderer(tokenizer).prompt_ids(messages[:at])
                == by_library(tokenizer, messages[:at], add_generation_prompt=True)["input_ids"]
            )


@pytest.mark.parametrize("mutant", ["header", "newline", "no end", "by token id"])
def test_the_mask_law_catches_mutants(mutant, families, tokenizer_for):
    """Masks that begin a token early, end a token late or early, or drop every end token are all told apart."""
    tokenizer = tokenizer_for("chatml")
    messages = [
        Message("user", "Hello"),
        Message("assistant", "12 words"),
        Message("user", "more"),
        Message("assistant", "end."),
    ]
    ids, expected = mask_by_markers(tokenizer, families["chatml"], messages)
    rendered = renderer(tokenizer).render(row(messages))
    assert (rendered.input_ids, rendered.weights) == (ids, expected)
    begins = [at for at, weight in enumerate(rendered.weights) if weight and not rendered.weights[at - 1]]
    ends = [at for at, weight in enumerate(rendered.weights) if weight and not (rendered.weights[at + 1 :] or [0.0])[0]]
    broken = list(rendered.weights)
    for at in {"header": [index - 1 for index in begins], "newline": [index + 1 for index in ends]}.get(mutant, []):
        broken[at] = 1.0
    for at in ends if mutant in ("no end", "by token id") else []:
        broken[at] = 0.0
    assert broken != expected


@pytest.mark.parametrize("name", ["qwen25", "qwen3", "harmony", "mistral3", "llama31"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_trained_and_tool_results_are_not(name, as_text, families, tokenizer_for, tool_talk):
    """Arguments given as an object or as JSON text make the same tokens."""
    turns, tools = tool_talk
    if as_text:
        text = '{"city": "Paris", "days": 2}'
        turns = [
            (
                role,
                content,
                {**extra, "tool_calls": [{"function": {"name": "weather", "arguments": text}, "type": "function"}]}
                if "tool_calls" in extra
                else extra,
            )
            for role, content, extra in turns
        ]
    messages = [Message(role, content, extra=extra) for role, content, extra in turns]
    tokenizer, family = tokenizer_for(name), families[name]
    for count in (2, 4, 6):
        rendered = renderer(tokenizer).render(row(messages[:count], tools))
        ids, mask = mask_by_markers(tokenizer, family, messages[:count], tools)
        assert rendered.input_ids == ids
        assert not {note.code for note in rendered.warnings} & {"joined-token", "no-end-of-turn"}
        if "unstable" not in {note.code for note in rendered.warnings}:
            assert rendered.weights == mask
        trained = tokenizer.decode(
            [token_id for token_id, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight]
        )
        assert "Paris" in trained or count > 2
        assert "sunny, 20" not in trained


def trained_texts(tokenizer, rendered):
    """The trained stretches, decoded."""
    texts, run = [], []
    for token, weight in [*zip(rendered.input_ids, rendered.weights, strict=True), (None, 0)]:
        if weight:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def test_reasoning_of_the_last_turn_is_trained_and_that_of_earlier_turns_is_named_when_the_template_drops_it(
    tokenizer_for,
):
    tokenizer = tokenizer_for("qwen3")
    messages = [
        Message("user", "a"), Message("assistant", "first", extra={"reasoning_content": "because one"}),
        Message("user", "b"), Message("assistant", "second", extra={"reasoning_content": "because two"}),
    ]  # fmt: skip
    rendered = renderer(tokenizer).render(row(messages))
    assert trained_texts(tokenizer, rendered) == [
        "first<|im_end|>",
        "<think>\nbecause two\n</think>\n\nsecond<|im_end|>",
    ]
    assert [note.code for note in rendered.warnings] == ["reasoning-dropped"]


def test_reasoning_written_inside_the_content_moves_as_the_template_moves_it(tokenizer_for):
    tokenizer = tokenizer_for("qwen3")
    messages = [Message("user", "a"), Message("assistant", "<think>\nbecause\n</think>\n\nyes")]
    rendered = renderer(tokenizer).render(row(messages))
    assert rendered.input_ids == by_library(tokenizer, messages)["input_ids"]
    assert trained_texts(tokenizer, rendered) == ["<think>\nbecause\n</think>\n\nyes<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<think>") in rendered.input_ids


def test_a_turn_whose_prompt_is_no_prefix_of_the_whole_is_named_and_not_trained(tokenizer_for):
    """The prompt of `thinker` opens a thought that earlier turns do not have; only the last turn is trained, and the
    row says so.
    """
    tokenizer = tokenizer_for("thinker")
    messages = [
        Message("user", "a"), Message("assistant", "first"), Message("user", "b"),
        Message("assistant", "second", extra={"reasoning_content": "why"}),
    ]  # fmt: skip
    rendered = renderer(tokenizer).render(row(messages))
    assert trained_texts(tokenizer, rendered) == ["why\n</think>\n\nsecond<|im_end|>"]
    assert any(
        note.code == "unstable" and "message 2 (assistant)" in note.text and "<think>" in note.text
        for note in rendered.warnings
    )


def test_a_template_that_drops_what_its_prompt_opens_trains_nothing_and_says_why(tokenizer_for):
    rendered = renderer(tokenizer_for("deepseek_r1")).render(
        row([Message("user", "a"), Message("assistant", "<think>x</think>yes")])
    )
    assert [note.code for note in rendered.warnings] == ["unstable", "reasoning-dropped", "no-trained-token"]


def test_a_token_shared_with_the_header_is_named_and_not_trained_when_it_is_only_whitespace(tokenizer_for):
    tokenizer = tokenizer_for("qwen25")
    rendered = renderer(tokenizer).render(row([Message("user", "a"), Message("assistant", "\nyes")]))
    assert trained_texts(tokenizer, rendered) == ["yes<|im_end|>"]
    assert [note.code for note in rendered.warnings] == ["joined-token"]


def test_a_template_that_moves_the_system_prompt_and_the_tools_trains_only_what_stays_put(tokenizer_for, tool_talk):
    """The system prompt stands in the last question, as long as that is the last message: a prompt has it, the whole
    conversation does not.
    """
    tokenizer = tokenizer_for("mistral3")
    rendered = renderer(tokenizer).render(
        row([Message("system", "Be kind."), Message("user", "a"), Message("assistant", "b")])
    )
    assert [note.code for note in rendered.warnings] == ["unstable", "not-rendered", "no-trained-token"]
    turns, tools = tool_talk
    messages = [Message(role, content, extra=extra) for role, content, extra in turns]
    rendered = renderer(tokenizer).render(row(messages, tools))
    assert trained_texts(tokenizer, rendered) == [" You are welcome.</s>"]
    assert [note.code for note in rendered.warnings] == ["unstable", "unstable"]


def test_answers_without_an_end_token_are_named(tokenizer_for):
    rendered = renderer(tokenizer_for("glm4")).render(row([Message("user", "a"), Message("assistant", "yes")]))
    assert [note.code for note in rendered.warnings] == ["no-end-of-turn"]
    assert "no end-of-turn token" in str(renderer(tokenizer_for("glm4")).decisions[0])


def test_the_stop_tokens_are_those_that_end_turns_and_the_end_token(tokenizer_for):
    def stops(name):
        tokenizer = tokenizer_for(name)
        return set(tokenizer.convert_ids_to_tokens(list(renderer(tokenizer).stop_token_ids)))

    assert stops("gemma") == {"<end_of_turn>", "<eos>"}
    assert stops("harmony") == {"<|end|>", "<|return|>", "<|call|>"}
    assert stops("qwen3") == {"<|im_end|>"}
    assert stops("mistral3") == {"</s>"}
    assert stops("phi4mini") == {"<|end|>", "<|endoftext|>"}
    assert stops("doubled_end") == {"<|im_end|>", "<|endoftext|>"}
    assert stops("llama3") == {"<|eot_id|>"}


TALK = [
    Message("system", "S"), Message("user", "A"), Message("assistant", "one"), Message("user", "B"),
    Message("assistant", "two"), Message("assistant", "three"), Message("user", "C"),
]  # fmt: skip
RULES = {
    "last_assistant_message": ["three<|im_end|>"],
    "last_assistant_turn": [],
    "all_assistant_messages": ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"],
    "all_messages": [
        "S<|im_end|>",
        "A<|im_end|>",
        "one<|im_end|>",
        "B<|im_end|>",
        "two<|im_end|>",
        "three<|im_end|>",
        "C<|im_end|>",
    ],
    "all_user_and_system_messages": ["S<|im_end|>", "A<|im_end|>", "B<|im_end|>", "C<|im_end|>"],
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_trains_the_messages_it_names(rule, tokenizer_for):
    tokenizer = tokenizer_for("chatml")
    assert trained_texts(tokenizer, renderer(tokenizer, rule).render(row(TALK))) == RULES[rule]


def test_the_last_turn_is_every_answer_after_the_last_question(tokenizer_for):
    tokenizer = tokenizer_for("chatml")
    assert trained_texts(tokenizer, renderer(tokenizer, "last_assistant_turn").render(row(TALK[:-1]))) == [
        "two<|im_end|>",
        "three<|im_end|>",
    ]


def test_all_tokens_trains_every_token_but_the_first(tokenizer_for):
    rendered = renderer(tokenizer_for("chatml"), "all_tokens").render(row(TALK))
    assert rendered.weights == [0.0] + [1.0] * (len(rendered.input_ids) - 1)


@pytest.mark.parametrize("rule", [*RULES, "all_tokens", "customized"])
def test_a_message_of_weight_0_is_never_trained(rule, tokenizer_for):
    tokenizer = tokenizer_for("chatml")
    talk = [Message(message.role, message.content, weight=0.0) for message in TALK]
    assert not any("three" in text for text in trained_texts(tokenizer, renderer(tokenizer, rule).render(row(talk))))


def test_customized_gives_each_message_its_own_weight_times_that_of_the_source(tokenizer_for):
    tokenizer = tokenizer_for("chatml")
    talk = [
        Message("user", "A", weight=0.5),
        Message("assistant", "one", weight=2.0),
        Message("user", "B"),
        Message("assistant", "two"),
    ]
    rendered = renderer(tokenizer, "customized").render(Conversation("rows.jsonl:1", tuple(talk), loss_weight=3.0))
    assert sorted(set(rendered.weights)) == [0.0, 1.5, 6.0]
    assert trained_texts(tokenizer, rendered) == ["A<|im_end|>", "one<|im_end|>"]


def test_weights_that_a_rule_does_not_use_are_named(tokenizer_for):
    rendered = renderer(tokenizer_for("chatml")).render(
        row([Message("user", "A"), Message("assistant", "one", weight=0.5)])
    )
    assert [note.code for note in rendered.warnings] == ["weight-ignored"]
