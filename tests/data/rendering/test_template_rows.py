"""Rows without a chat template: plain text, prompt and completion, tokenizers that have no template; and rows that
cannot be.
"""

import pickle

import pytest
from transformers import PreTrainedTokenizerFast

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import DEFAULT_NOW, Renderer, message_fields
from llmtune.errors import DataError, TokenizerError


def text_row(text, **options):
    return Conversation("rows.txt:1", text=text, **options)


def completion_row(prompt, completion):
    return Conversation(
        "rows.jsonl:1", (Message("user", prompt), Message("assistant", completion)), prompt_is_text=True
    )


def with_bos(tokenizer):
    """A copy of a tokenizer that puts <s> before every text."""
    from tokenizers import processors

    copy = pickle.loads(pickle.dumps(tokenizer))
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", copy.bos_token_id)]
    )
    return copy


def test_a_text_row_trains_every_token_and_an_end_of_document(tokenizer_for):
    tokenizer = tokenizer_for("alpaca")
    rendered = Renderer(tokenizer).render(text_row("def add(a, b):"))
    assert tokenizer.decode(rendered.input_ids) == "def add(a, b):<|endoftext|>"
    assert rendered.weights == [0.0] + [1.0] * (len(rendered.input_ids) - 1)


def test_a_text_row_begins_with_the_tokenizer_s_own_first_token_once(tokenizer_for):
    """Q4: no doubled BOS, not even when the text spells one."""
    tokenizer = with_bos(tokenizer_for("mistral3"))
    rendered = Renderer(tokenizer).render(text_row("<s>hello"))
    assert rendered.input_ids.count(tokenizer.bos_token_id) == 1
    assert rendered.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(rendered.input_ids[1:-1]) == "<s>hello"
    assert rendered.input_ids[-1] == tokenizer.eos_token_id


def test_a_completion_is_trained_and_its_prompt_is_its_prefix(tokenizer_for):
    tokenizer = tokenizer_for("alpaca")
    renderer = Renderer(tokenizer)
    for prompt, completion in [("2+2=", "4"), ("The quick ", "brown fox"), ("a\n", "\nb"), ("the quick bro", "wn fox")]:
        rendered = renderer.render(completion_row(prompt, completion))
        prompt_ids = renderer.text_prompt_ids(prompt)
        assert rendered.input_ids[: len(prompt_ids)] == prompt_ids
        assert rendered.weights == [0.0] * len(prompt_ids) + [1.0] * (len(rendered.input_ids) - len(prompt_ids))
        assert tokenizer.decode(rendered.input_ids) == prompt + completion + "<|endoftext|>"


@pytest.mark.parametrize(
    ("rule", "trained"),
    [
        ("all_assistant_messages", "4<|endoftext|>"),
        ("last_assistant_turn", "4<|endoftext|>"),
        ("all_messages", "2+2=4<|endoftext|>"),
        ("all_user_and_system_messages", "2+2="),
        ("customized", ""),
    ],
)
def test_a_rule_trains_of_a_completion_row_what_it_says(rule, trained, tokenizer_for):
    tokenizer = with_bos(tokenizer_for("mistral3"))
    rendered = Renderer(tokenizer, train_on=rule).render(completion_row("2+2=", "4"))
    ids = [token_id for token_id, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight]
    assert tokenizer.decode(ids) == trained.replace("<|endoftext|>", "</s>")


def without_template(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    copy.chat_template = None
    return copy


def test_a_tokenizer_without_a_template_gets_a_plain_form_of_tokens_it_has(tokenizer_for):
    tokenizer = without_template(tokenizer_for("alpaca"))
    renderer = Renderer(tokenizer)
    rendered = renderer.render(
        Conversation(
            "r:1",
            (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "a"), Message("assistant", "b")),
        )
    )
    assert (
        tokenizer.decode(rendered.input_ids)
        == "User: Hi\nAssistant: Hello<|endoftext|>\nUser: a\nAssistant: b<|endoftext|>\n"
    )
    trained = [
        tokenizer.decode([token_id])
        for token_id, weight in zip(rendered.input_ids, rendered.weights, strict=True)
        if weight
    ]
    assert "".join(trained) == " Hello<|endoftext|> b<|endoftext|>"
    assert not rendered.warnings
    assert [decision.key for decision in renderer.decisions] == ["model.chat_template"]
    assert renderer.stop_token_ids == (tokenizer.eos_token_id,)
    prompt = renderer.prompt_ids([Message("user", "Hi")])
    assert rendered.input_ids[: len(prompt)] == prompt


def test_a_tokenizer_with_neither_template_nor_end_token_is_refused_for_conversations(tokenizer_for):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_for("alpaca").backend_tokenizer)
    with pytest.raises(TokenizerError, match="neither a chat template nor an end token"):
        Renderer(tokenizer).render(Conversation("r:1", (Message("user", "Hi"), Message("assistant", "Hello"))))


def test_of_two_templates_the_one_for_tools_is_used_with_tools(tokenizer_for, families, tool_talk):
    turns, tools = tool_talk
    tokenizer = without_template(tokenizer_for("qwen25"))
    tokenizer.chat_template = {"default": families["chatml"].template, "tool_use": families["qwen25"].template}
    messages = tuple(Message(role, content, extra=extra) for role, content, extra in turns)
    renderer = Renderer(tokenizer)
    fields = [message_fields(message) for message in messages]
    assert (
        renderer.render(Conversation("r:1", messages, tools=tools)).input_ids
        == tokenizer.apply_chat_template(fields, tools=list(tools))["input_ids"]
    )
    plain = messages[4:]
    assert (
        renderer.render(Conversation("r:1", plain)).input_ids == tokenizer.apply_chat_template(fields[4:])["input_ids"]
    )


def test_several_templates_without_a_default_are_named(tokenizer_for):
    tokenizer = without_template(tokenizer_for("chatml"))
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(TokenizerError, match=r"several chat templates \(rag, tool_use\)"):
        Renderer(tokenizer)


def test_what_a_template_refuses_is_said_with_the_row(tokenizer_for):
    with pytest.raises(
        DataError, match=r"rows.jsonl:7: the chat template refuses this conversation: only user and assistant roles"
    ):
        Renderer(tokenizer_for("mistral1")).render(
            Conversation("rows.jsonl:7", (Message("user", "x"), Message("system", "s"), Message("assistant", "y")))
        )


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_named(weight, tokenizer_for):
    with pytest.raises(DataError, match=r"messages\[1\].weight"):
        Renderer(tokenizer_for("chatml")).render(
            Conversation("r:1", (Message("user", "x"), Message("assistant", "y", weight=weight)))
        )


def test_a_template_that_writes_the_date_sees_one_day_for_the_whole_run(tokenizer_for):
    tokenizer = tokenizer_for("llama31")
    renderer = Renderer(tokenizer)
    rendered = renderer.render(Conversation("r:1", (Message("user", "x"), Message("assistant", "y"))))
    assert f"{DEFAULT_NOW:%d %b %Y}" in tokenizer.decode(rendered.input_ids)
    assert "date fixed at 2025-01-01" in str(renderer.decisions[0])
    assert Renderer(tokenizer, now=DEFAULT_NOW.replace(year=2026)).digest != renderer.digest
    chatml = tokenizer_for("chatml")
    assert Renderer(chatml, now=DEFAULT_NOW.replace(year=2026)).digest == Renderer(chatml).digest


def test_a_renderer_travels_to_another_process_and_renders_the_same(tokenizer_for):
    renderer = Renderer(tokenizer_for("qwen3"), train_on="last_assistant_turn")
    twin = pickle.loads(pickle.dumps(renderer))
    talk = Conversation("r:1", (Message("user", "x"), Message("assistant", "y")))
    assert twin.render(talk) == renderer.render(talk)
    assert twin.digest == renderer.digest


def test_the_digest_changes_with_all_that_decides_the_tokens(tokenizer_for, families):
    tokenizer = tokenizer_for("chatml")
    digests = {
        Renderer(tokenizer).digest,
        Renderer(tokenizer, train_on="all_messages").digest,
        Renderer(tokenizer, parse_control_tokens=True).digest,
        Renderer(tokenizer, chat_template=families["smol"].template).digest,
        Renderer(tokenizer_for("smol"), chat_template=families["chatml"].template).digest,
    }
    assert len(digests) == 5


def test_rows_with_tools_end_their_answers_as_the_template_for_tools_does(tokenizer_for, families, tool_talk):
    """Each of two templates has its own turns: the masks of rows with tools, and the stop tokens, know both."""
    turns, tools = tool_talk
    tokenizer = without_template(tokenizer_for("qwen25"))
    ending = families["qwen25"].template.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.chat_template = {"default": families["chatml"].template, "tool_use": ending}
    renderer = Renderer(tokenizer)
    rendered = renderer.render(
        Conversation("r:1", tuple(Message(role, content, extra=extra) for role, content, extra in turns), tools=tools)
    )
    trained = tokenizer.decode(
        [token_id for token_id, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight]
    )
    assert trained.endswith("You are welcome.<|endoftext|>")
    assert trained.count("<|endoftext|>") == 3
    assert not {note.code for note in rendered.warnings} & {"unstable", "no-end-of-turn"}
    assert set(tokenizer.convert_ids_to_tokens(list(renderer.stop_token_ids))) == {"<|im_end|>", "<|endoftext|>"}
