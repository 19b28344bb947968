"""Q4 and Q5: what a chat template leaves out of a row is named; a row that would be trained without its own words is
not trained on.
"""

import pytest

from llmtune.data.dataset.make_dataset import prepare_data
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer
from llmtune.errors import DataError

HEAD = "<|im_start|>{{ m.role }}\n"
TURN = HEAD + "{{ m.content }}<|im_end|>\n"
TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ROW = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
}
LOSING = {
    "only the last message": ("{% for m in messages[-1:] %}" + TURN + "{% endfor %}", "message 1 (system)"),
    "no role it does not know": (
        "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}",
        "message 1 (system)",
    ),
    "no question": ("{% for m in messages if m.role != 'user' %}" + TURN + "{% endfor %}", "message 2 (user)"),
}


@pytest.mark.parametrize("way", LOSING)
def test_a_template_that_leaves_out_a_message_makes_the_row_bad(way, write, config, tiny_tokenizer):
    """Counted as bad with its reason, and an error unless such rows are skipped."""
    source, lost = LOSING[way]
    renderer = Renderer(tiny_tokenizer, chat_template=source + TAIL)
    path = write("a.jsonl", [ROW, {"messages": [{"role": "assistant", "content": "fine"}]}])
    with pytest.raises(DataError) as error:
        prepare_data(config(path), renderer)
    assert any(f"the template leaves out {lost}" in problem.problem for problem in error.value.problems)
    prepared = prepare_data(config(path, on_bad_row="skip"), renderer)
    (entry,) = [entry for entry in prepared.ledger.entries if entry["source"].endswith(":1")]
    assert (entry["fate"], entry["field"]) == ("bad", "messages")
    assert lost in entry["reason"]
    assert "model.chat_template" in entry["fix"]


def notes(tokenizer, template, *messages, tools=()):
    return [
        note.code
        for note in Renderer(tokenizer, chat_template=template)
        .render(Conversation("r:1", messages, tools=tools))
        .warnings
    ]


CHAT = "{% for m in messages %}" + TURN + "{% endfor %}" + TAIL
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def test_tool_calls_that_a_template_does_not_know_are_not_empty_answers(tiny_tokenizer, write, config):
    """The answer would be trained as nothing but its end token."""
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    path = write("a.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=r"leaves out the tool calls of message 2 \(assistant\)"):
        prepare_data(config(path), Renderer(tiny_tokenizer))


def test_tool_descriptions_that_a_template_does_not_show_are_noted(tiny_tokenizer):
    talk = (Message("user", "Rain?"), Message("assistant", "No."))
    assert notes(tiny_tokenizer, CHAT, *talk, tools=(CALL,)) == ["tools-dropped"]
    assert notes(tiny_tokenizer, "{{ tools | tojson if tools }}" + CHAT, *talk, tools=(CALL,)) == []


@pytest.mark.parametrize(
    "change", ["m.content[:3]", "m.content | upper", "m.content.split('\n')[0]", "m.content | replace('a', 'b')"]
)
def test_content_that_a_template_cuts_or_changes_is_noted(change, tiny_tokenizer):
    template = "{% for m in messages %}" + HEAD + "{{ " + change + " }}<|im_end|>\n{% endfor %}" + TAIL
    assert "content-changed" in notes(
        tiny_tokenizer, template, Message("user", "a long\nquestion"), Message("assistant", "an answer\nof two")
    )


@pytest.mark.parametrize("change", ["m.content", "m.content | trim", "m.content | tojson", "m.content.strip() + '!'"])
def test_content_that_is_all_there_is_not_noted(change, tiny_tokenizer):
    template = "{% for m in messages %}" + HEAD + "{{ " + change + " }}<|im_end|>\n{% endfor %}" + TAIL
    warnings = notes(
        tiny_tokenizer, template, Message("user", ' a "long"\nquestion\n'), Message("assistant", "an answer\nof two")
    )
    assert "content-changed" not in warnings


def test_a_thought_that_a_template_takes_out_of_an_answer_is_named_as_such(tiny_tokenizer):
    template = (
        "{% for m in messages %}" + HEAD + "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}" + TAIL
    )
    assert notes(
        tiny_tokenizer, template, Message("user", "a"), Message("assistant", "<think>well</think>\n\nyes")
    ) == ["reasoning-dropped"]
