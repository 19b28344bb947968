"""The laws of the masks over 37 kinds of templates and 40 conversations each: tools, reasoning, several turns.

Every trained stretch holds one answer and ends at its own end of turn; the prompt of inference is a prefix; an answer
that is not trained is named, and with an example per turn none is lost. Answers are told apart by a word of their own.
"""

import functools
import random
import re

import pytest

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer

CHATML_TAIL = "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\nPROMPT' }}{%- endif -%}"
HEAD = (
    "{%- set ns = namespace(name='', id='', names=[], last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- for c in m.tool_calls or [] -%}{%- set ns.name = c.function.name -%}{%- set ns.id = c.id -%}"
    "{%- set ns.names = ns.names + [c.function.name] -%}{%- endfor -%}"
)
CALLS = "{%- for c in m.tool_calls or [] -%}{{ '<call>' + c.function.name + ' ' }}{{ ARGUMENTS }}{%- endfor -%}"
OTHER = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"


def kind(*, other=OTHER, thought="", arguments="c.function.arguments | tojson", prompt="", answer="{{ m.content }}"):
    """A ChatML-like template: how it writes other turns, a thought, arguments, its prompt, an answer."""
    turn = "{{ '<|im_start|>assistant\\n' }}" + thought + answer + CALLS.replace("ARGUMENTS", arguments)
    turn += "{{ '<|im_end|>\\n' }}"
    body = f"{{%- if m.role == 'assistant' -%}}{turn}{{%- else -%}}{other}{{%- endif -%}}"
    return HEAD + body + CHATML_TAIL.replace("PROMPT", prompt)


THOUGHT = "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}"
LAST_THOUGHT = "{%- if loop.index0 > ns.last -%}" + THOUGHT + "{%- endif -%}"
KINDS = {
    "the tool's turn begins with the name of the call": kind(
        other="{{ '<|im_start|>' + (ns.name if m.role == 'tool' else m.role) + '\\n' + m.content + '<|im_end|>\\n' }}"
    ),
    "the tool's turn begins with the id of the call": kind(
        other="{{ '<|im_start|>' + m.role + ' ' + (ns.id if m.role == 'tool' else '') + '\\n' + m.content }}<|im_end|>",
        arguments="c.id + ' ' + c.function.arguments | tojson",
    ),
    "the tool's turn ends with the names of all calls": kind(
        other="{{ '<|im_start|>' + m.role + '\\n' + m.content + ns.names | join(', ') + '<|im_end|>\\n' }}"
    ),
    "arguments are joined to text": kind(arguments="'args ' + c.function.arguments"),
    "arguments are printed": kind(arguments="c.function.arguments"),
    "arguments are written one by one": kind(
        arguments="'' }}{%- for k, v in c.function.arguments | items -%}{{ '<' + k + '>' + v + '</' + k + '>' }}"
        "{%- endfor -%}{{ ''"
    ),
    "thoughts of the last turn alone, empty ones too": kind(thought=LAST_THOUGHT),
    "the prompt opens a thought that earlier turns lack": kind(thought=LAST_THOUGHT, prompt="<think>\\n"),
    "the prompt opens a thought, and earlier turns have an empty one": kind(
        thought=LAST_THOUGHT.replace("{%- endif -%}", "{%- else -%}{{ '<think></think>' }}{%- endif -%}"),
        prompt="<think>\\n",
    ),
    "every turn has a thought, empty ones too": kind(thought=THOUGHT),
    "the next question repeats the answer": kind(
        other="{{ '<|im_start|>' + m.role + '\\n' }}{%- if loop.index0 and messages[loop.index0 - 1].content -%}"
        "{{ 're: ' + messages[loop.index0 - 1].content + '\\n' }}{%- endif -%}{{ m.content + '<|im_end|>\\n' }}"
    ),
    "answers are trimmed and escaped": kind(answer="{{ m.content | trim | replace('&', '&amp;') }}"),
}
"""Templates of our own, each with a trait of a family of models, for the tokenizer `qwen3`."""
ODD = {
    "content is indented": kind(answer="{{ m.content | indent(4) }}"),
    "content is stripped of every line's end": kind(answer="{{ m.content.split('\\n') | map('trim') | join('\\n') }}"),
    "what stands before a closed thought is cut": kind(answer="{{ m.content.split('</think>')[-1].lstrip('\\n') }}"),
    "the user's turn ends with the generation prompt": HEAD
    + "{%- if m.role == 'assistant' -%}"
    + "{{ m.content }}"
    + CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
    + "{{ '<|im_end|>\\n' }}"
    + "{%- else -%}"
    + OTHER
    + "{%- if m.role != 'system' and not (loop.nextitem and loop.nextitem.role != 'assistant') -%}"
    + "{{ '<|im_start|>assistant\\n' }}{%- endif -%}{%- endif -%}{%- endfor -%}",
    "the prompt stands in the last turn alone": HEAD
    + "{%- if m.role == 'assistant' -%}{{ '<|im_start|>assistant\\n' + m.content }}"
    + CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
    + "{{ '<|im_end|>\\n' }}"
    + "{%- else -%}"
    + OTHER
    + "{%- if loop.last and add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}{%- endif -%}{%- endfor -%}",
    "tools are sorted and stand before the last question": HEAD.replace(
        "{%- for m in messages -%}{%- for c in",
        "{%- for m in messages -%}"
        "{%- if tools and loop.index0 == ns.last -%}{{ '<|im_start|>system\\n' }}"
        "{%- for t in tools | sort(attribute='function.name', reverse=true) -%}{{ t.function.name + '\\n' }}{%- endfor -%}"
        "{{ '<|im_end|>\\n' }}{%- endif -%}{%- for c in",
        1,
    )
    + kind()[len(HEAD) :],
    "a summary of all answers follows": HEAD
    + kind()[len(HEAD) :].replace(
        "{%- endfor -%}{%- if add_gen",
        "{%- endfor -%}"
        "{%- if not add_generation_prompt -%}{{ '<|im_start|>system\\nsummary: ' }}"
        "{%- for m in messages if m.role == 'assistant' -%}{{ m.content + '; ' }}{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endif -%}"
        "{%- if add_gen",
    ),
    "the thought is written twice": kind(
        thought="{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}" * 2
    ),
    "the thought is repeated in the tool's turn": kind(
        other="{{ '<|im_start|>' + m.role + '\\n' + (messages[loop.index0 - 1].reasoning_content or '' if m.role == 'tool' and loop.index0 else '') + m.content + '<|im_end|>\\n' }}",
        thought=THOUGHT,
    ),
    "ids of all calls stand in a list": kind(
        other="{{ '<|im_start|>' + m.role + '\\n' + m.content + (ns.names | join(',')) + ns.id + '<|im_end|>\\n' }}",
        arguments="c.id + ' ' + c.function.arguments | tojson + ' ' + c.id",
    ),
    "the answer is written twice": kind(answer="{{ m.content + '\\n' + m.content }}"),
    "a title of the first question heads every answer": kind(answer="{{ messages[0].content[:3] + ': ' + m.content }}"),
    "turns are numbered from the end": kind(
        other="{{ '<|im_start|>' + m.role + ' ' + (loop.revindex | string) + '\\n' + m.content + '<|im_end|>\\n' }}"
    ),
}
"""Odd ones: they change content, give the prompt in other places, sort tools, repeat texts."""
KINDS |= ODD
OTHERS_INSIDE = frozenset(
    {
        "a summary of all answers follows",
        "a title of the first question heads every answer",
        "turns are numbered from the end",
        "tools are sorted and stand before the last question",
    }
)
"""Kinds whose answers hold other text of the row, or whose earlier turns change: not trained there, and named."""
SHIPPED = (
    "chatml", "llama31", "qwen25", "qwen3", "thinker", "harmony", "mistral3", "gemma", "granite", "kimi", "phi4mini",
    "zephyr",
)  # fmt: skip
"""Families of the other tests."""
FAMILIES = [*KINDS, *SHIPPED]
PLAIN = frozenset({"system"})
ALL = frozenset({"system", "tools", "reasoning"})
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("look", "add_two")
)


def conversations(takes, count=40):
    """Conversations with what a template takes; every message has a word of its own, such as `m3w`."""
    for seed in range(count):
        draw = random.Random(f"{seed} of {count}")
        messages = [Message("system", "m0w Be kind.")] if "system" in takes and draw.random() < 0.4 else []

        def add(role, text="", *, messages=messages, draw=draw, **extra):
            word = f"m{len(messages)}w"
            content = (
                "" if text is None else draw.choice([word, f"{word} {text}", f"{text}\n\n{word}", f"{word}? look"])
            )
            messages.append(Message(role, content, None, extra))
            return word

        for _ in range(draw.randint(1, 3)):
            add("user", draw.choice(["hi", "look", "add_two look", "so & so", "the assistant"]))
            while "tools" in takes and draw.random() < 0.4:
                word = f"m{len(messages)}w"
                name = draw.choice(["look", "add_two"])
                arguments = draw.choice([{"town": word}, f'{{"town": "{word}"}}', {"a": word, "look": "add_two"}])
                function = {"name": name, "arguments": arguments}
                calls = [{"type": "function", "id": f"call{len(messages):05}", "function": function}]
                thought = {"reasoning_content": "I look"} if "reasoning" in takes and draw.random() < 0.3 else {}
                add("assistant", None, tool_calls=calls, **thought)
                add("tool", draw.choice(["look", "21", '{"look": 1}']), name=name)
            reasoned = "reasoning" in takes and draw.random() < 0.5
            thought = {"reasoning_content": draw.choice(["I look", "hm"])} if reasoned else {}
            add("assistant", draw.choice(["yes", "look", "add_two", "so & so"]), **thought)
        yield tuple(messages)


def stretches(rendered):
    """The trained stretches [start, stop) of an example."""
    edges = [
        at for at in range(1, len(rendered.weights)) if (rendered.weights[at] > 0) != (rendered.weights[at - 1] > 0)
    ]
    if rendered.weights[-1] > 0:
        edges.append(len(rendered.weights))
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_laws(renderer, tokenizer, messages, prompt_of, rendered):
    """Every law but that of lost answers, for one example; returns the number of its trained stretches."""
    spans = stretches(rendered)
    joined = {warning.text.split(" ")[1] for warning in rendered.warnings if warning.code == "joined-token"}
    assert len(spans) == rendered.trained_answers
    for start, stop in spans:
        text = tokenizer.decode(rendered.input_ids[start:stop])
        words = set(re.findall(r"m\d+w", text))
        assert len(words) == 1, text
        index = int(words.pop()[1:-1])
        assert messages[index].role == "assistant"
        assert rendered.input_ids[stop - 1] in renderer.stop_token_ids, text
        prompt = prompt_of(index)
        before = rendered.input_ids[:start]
        assert before[: len(prompt)] == prompt or str(index + 1) in joined
        between = tokenizer.decode(before).removeprefix(tokenizer.decode(prompt))
        assert not between.replace("<think>", "").replace("</think>", "").strip(), between
    return len(spans)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_laws_of_masks_hold_for_every_kind_of_template(name, families, tokenizer_for):
    tokenizer = tokenizer_for(name if name in families else "qwen3")
    takes = families[name].takes if name in families else ALL
    options = {"chat_template": KINDS.get(name), "train_on": "all_assistant_messages"}
    whole = Renderer(tokenizer, **options)
    by_turn = Renderer(tokenizer, one_example_per_turn=True, **options)
    answers = lost = lost_by_turn = 0
    for messages in conversations(takes):
        has_tools = any(message.role == "tool" for message in messages)
        tools = TOOLS if has_tools else ()
        conversation = Conversation("rows.jsonl:1", messages, tools=tools)
        rendered = whole.render(conversation)
        prompt_of = functools.cache(lambda index, talk=messages, tools=tools: whole.prompt_ids(talk[:index], tools))
        trained = check_laws(whole, tokenizer, messages, prompt_of, rendered)
        named = sum(warning.code == "unstable" for warning in rendered.warnings)
        assert rendered.answers - trained == named
        examples = by_turn.render_examples(conversation)
        trained_by_turn = sum(check_laws(by_turn, tokenizer, messages, prompt_of, example) for example in examples)
        named_by_turn = sum(w.code == "unstable" for example in examples for w in example.warnings)
        assert rendered.answers - trained_by_turn == named_by_turn
        answers, lost, lost_by_turn = answers + rendered.answers, lost + named, lost_by_turn + named_by_turn
    assert answers > 60
    if (
        name not in OTHERS_INSIDE and name != "mistral3"
    ):  # it moves the system prompt and the tools into the last question, and out of it again
        assert lost_by_turn == 0
    treats_last_turn = (
        name in ("thinker", "mistral3", "qwen3", "harmony", *OTHERS_INSIDE)
        or "prompt opens" in name
        or "last turn" in name
    )
    assert (lost > 0) <= treats_last_turn


def test_there_are_37_kinds_and_their_conversations_differ():
    assert len(FAMILIES) == len(set(FAMILIES)) == 37
    talks = list(conversations(ALL))
    assert len(talks) == 40
    assert len({str(talk) for talk in talks}) > 35
    assert sum(any(message.role == "tool" for message in talk) for talk in talks) > 20
    assert sum(any("reasoning_content" in message.extra for message in talk) for talk in talks) > 20
    assert sum(sum(message.role == "user" for message in talk) > 1 for talk in talks) > 20
