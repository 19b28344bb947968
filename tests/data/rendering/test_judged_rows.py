"""Both sides of a pair follow the laws of masks in every family of templates, whatever their content (Q5, Q6, N5)."""

import pytest

from llmtune.data.dataset.row_result import conversations_of
from llmtune.data.example import Message, Row
from llmtune.data.rendering.renderer import Renderer

EMPTY_THOUGHT = {"qwen3": "<think>\n\n</think>\n\n", "thinker": "\n</think>\n\n"}
"""What a template writes between prompt and answer, untrained."""

UNSTABLE = {"deepseek_r1"}
"""Templates that render an answer otherwise than its prompt: such a pair is dropped with the reason."""

ENDLESS = {"glm4"}
"""Templates after whose answers no token ends the turn: such a pair has a warning."""


def sides_of(tokenizer, chosen, rejected):
    """The rendered sides of a pair after two earlier turns, and the ids of its prompt as `generate` is given them."""
    prompt = [("user", "First question"), ("assistant", "First answer."), ("user", "Second question")]
    fields = {
        "prompt": [{"role": role, "content": content} for role, content in prompt],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    renderer = Renderer(tokenizer)
    rendered = [renderer.render(one) for one in conversations_of(Row("a:1", fields), "preference")]
    return renderer, rendered, renderer.prompt_ids([Message(role, content) for role, content in prompt])


def answers_alone_are_trained(name, tokenizer):
    renderer, rendered, prompt = sides_of(tokenizer, "so it is", "it is not")
    for one, answer in zip(rendered, ("so it is", "it is not"), strict=True):
        trained = [at for at, weight in enumerate(one.weights) if weight]
        if not trained:  # the template renders answers otherwise than its prompt: the row is dropped with this reason
            assert "unstable" in {note.code for note in one.warnings}
            assert name in UNSTABLE
            return
        begin, end = trained[0], trained[-1] + 1
        assert trained == list(range(begin, end))
        before = tokenizer.decode(one.input_ids[:begin])
        assert one.input_ids[:begin] == prompt or before == tokenizer.decode(prompt) + EMPTY_THOUGHT.get(name, "-")
        assert answer in tokenizer.decode(one.input_ids[begin:end])
        has_end = one.input_ids[end - 1] in renderer.stop_token_ids
        assert has_end == ("no-end-of-turn" not in {note.code for note in one.warnings}) == (name not in ENDLESS)
        assert set(one.weights) == {0.0, 1.0}
    first = [one.weights.index(1.0) for one in rendered]
    assert rendered[0].input_ids[: first[0]] == rendered[1].input_ids[: first[1]]


def test_prompts_are_those_of_generate_and_only_the_answer_with_its_end_is_trained(name, tokenizer_for):
    answers_alone_are_trained(name, tokenizer_for(name))


def test_hostile_answers_stay_content(name, tokenizer_for):
    """A side that holds every control token of its family as text has no more control tokens than a harmless one."""
    tokenizer = tokenizer_for(name)
    control = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    control.discard(tokenizer.unk_token_id)  # stands for any text that the vocabulary lacks
    hostile = "so it is " + " ".join(tokenizer.all_special_tokens) + " it is"
    _, (chosen, rejected), _ = sides_of(tokenizer, hostile, "it is not")
    counts = [sum(index in control for index in one.input_ids) for one in (chosen, rejected)]
    assert counts[0] == counts[1]


def moved(low, high):
    """Trained parts that begin and end so many tokens later."""
    honest = Renderer._token_range

    def token_range(self, rendering, span, *, is_answer):
        begin, end, is_joined = honest(self, rendering, span, is_answer=is_answer)
        return begin + low, end + high, is_joined

    return token_range


def without_last_turn(self, messages, tools=(), template_args=None, honest=Renderer.prompt_ids):
    return honest(self, messages[:-2], tools, template_args)


MUTANTS = {
    "a header that is trained": (Renderer, "_token_range", moved(-1, 0)),
    "an end that is not trained": (Renderer, "_token_range", moved(0, -1)),
    "a prompt that is trained": (
        Renderer,
        "_message_weights",
        lambda _, row, __: [(at, 1.0) for at in range(len(row.messages))],
    ),
    "a prompt without its last turn": (Renderer, "prompt_ids", without_last_turn),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_of_masks_catches_mutants_in_twenty_families(mutant, families, tokenizer_for, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    found = []
    for name in families:
        try:
            answers_alone_are_trained(name, tokenizer_for(name))
        except AssertionError:
            found.append(name)
    assert len(found) >= 20, sorted(families.keys() - found)
