"""The model answers as it was trained, stops where it should, and nothing is changed by asking it."""

import random

import numpy as np
import pytest
import torch

from llmtune.data.example import Message
from llmtune.errors import DataError
from llmtune.evaluation.generate import TextPrompt, continue_ids, generate
from llmtune.evaluation.sampling import Sampling

PROMPTS = ["the user asks", "a", "the assistant answers: a small system of words and numbers 0123456789"]


def by_hand(model, prompt, stops, count):
    """Take the most likely token one at a time, without a cache and without padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


def answer(model, prompts, **options):
    settings = {"stop_token_ids": (2,), "pad_id": 0, "max_new_tokens": 12} | options
    return continue_ids(model, prompts, **settings)


def test_greedy_answers_are_the_most_likely_tokens_one_by_one(tiny_model, renderer, tiny_tokenizer):
    prompts = [renderer.prompt_ids([Message("user", text)]) for text in PROMPTS]
    expected = [by_hand(tiny_model, prompt, {2}, 12) for prompt in prompts]
    assert answer(tiny_model, prompts) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_answer_does_not_depend_on_its_neighbours(tiny_model, renderer, tiny_tokenizer, batch_size):
    together = generate(tiny_model, tiny_tokenizer, renderer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    alone = [generate(tiny_model, tiny_tokenizer, renderer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone


def test_an_answer_ends_at_every_stop_token_and_keeps_it_out_of_the_text(tiny_model, renderer, tiny_tokenizer):
    prompt = renderer.prompt_ids([Message("user", "the user asks")])
    free = answer(tiny_model, [prompt], stop_token_ids=())[0]
    later = [token for token in free if token != free[0]]
    for stop in {free[0], later[0] if later else free[0]}:
        stopped = answer(tiny_model, [prompt], stop_token_ids=(399, stop))[0]
        assert stopped == free[: free.index(stop) + 1]


def test_what_stopped_an_answer_is_said(tiny_model, renderer, tiny_tokenizer):
    (cut,) = generate(tiny_model, tiny_tokenizer, renderer, ["a"], max_new_tokens=3)
    assert (cut.stopped_by, cut.num_tokens) == ("max_new_tokens", 3)
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
        tiny_model.lm_head.weight[2] = 1.0
        tiny_model.model.norm.weight.fill_(1.0)
    tiny_model.lm_head.weight.data[2] = (
        tiny_model.model(input_ids=torch.tensor([[1]])).last_hidden_state[0, -1].detach()
    )
    found = {
        generate(tiny_model, tiny_tokenizer, renderer, [text], max_new_tokens=200)[0].stopped_by for text in PROMPTS
    }
    assert found <= {"stop_token", "max_new_tokens", "context"}


def test_a_prompt_is_rendered_exactly_as_in_training(tiny_model, renderer, tiny_tokenizer):
    seen = []

    class Listening:
        stop_token_ids = renderer.stop_token_ids

        def prompt_ids(self, messages):
            seen.append(list(messages))
            return renderer.prompt_ids(messages)

        def text_prompt_ids(self, text):
            seen.append(text)
            return renderer.text_prompt_ids(text)

    conversation = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    prompts = ["a", conversation, TextPrompt("once")]
    answers = generate(tiny_model, tiny_tokenizer, Listening(), prompts, max_new_tokens=1, system="be short")
    short = Message("system", "be short")
    assert seen == [[short, Message("user", "a")], [short, *conversation], "once"]
    assert [one.prompt for one in answers] == ["a", "c", "once"]


def test_asking_changes_nothing(tiny_model, renderer, tiny_tokenizer, states):
    """N12: also with drawn answers, which use random numbers of their own."""
    tiny_model.generation_config.top_k = 7
    tiny_model.train()
    before, python_state, numpy_state = states(tiny_model), random.getstate(), np.random.get_state()[1].copy()
    generate(tiny_model, tiny_tokenizer, renderer, PROMPTS, max_new_tokens=4, sampling=Sampling(temperature=1.0))
    after = states(tiny_model)
    assert before[0] == after[0]
    assert all(torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert torch.equal(before[3], after[3])
    assert before[4] == after[4]
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_the_models_own_generation_settings_have_no_say(tiny_model, renderer):
    prompt = renderer.prompt_ids([Message("user", "a")])
    expected = answer(tiny_model, [prompt])
    tiny_model.generation_config.repetition_penalty = 50.0
    tiny_model.generation_config.min_new_tokens = 5
    tiny_model.generation_config.suppress_tokens = expected[0][:1]
    assert answer(tiny_model, [prompt]) == expected


def test_drawn_answers_repeat_with_their_seed_and_differ_without(tiny_model, renderer, tiny_tokenizer):
    def drawn(seed):
        return generate(
            tiny_model,
            tiny_tokenizer,
            renderer,
            ["a"],
            max_new_tokens=20,
            sampling=Sampling(temperature=1.5, seed=seed),
        )[0].ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_an_answer_ends_where_the_context_does_and_a_short_neighbour_goes_on(tiny_model):
    long, short = [5] * 250, [6, 7]
    answers = answer(tiny_model, [long, short], stop_token_ids=(), max_new_tokens=20)
    assert [len(ids) for ids in answers] == [6, 20]


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [([], "the prompt is empty"), ([5] * 256, "the prompt has 256 tokens and the model sees 256")],
)
def test_a_prompt_without_room_is_refused(tiny_model, prompt, problem):
    with pytest.raises(DataError, match=problem):
        answer(tiny_model, [prompt])


def test_the_head_gets_rows_side_by_side(tiny_model, monkeypatch):
    """Q7: torch copies the head's weight once for each row of a view, which was the largest block of a whole run."""
    head, seen = tiny_model.get_output_embeddings(), []
    forward = head.forward
    monkeypatch.setattr(
        head, "forward", lambda rows: seen.append((tuple(rows.shape[:2]), rows.is_contiguous())) or forward(rows)
    )
    answer(tiny_model, [[5, 6, 7], [8, 9, 10, 11]])
    assert len(seen) > 1
    assert {*seen} == {((2, 1), True)}
    assert not head._forward_pre_hooks


def test_a_model_switched_to_segment_attention_answers_the_same(tiny_model, renderer):
    from llmtune.kernels.attention import use_segment_attention

    prompts = [renderer.prompt_ids([Message("user", text)]) for text in PROMPTS]
    expected = answer(tiny_model, prompts)
    use_segment_attention(tiny_model, "sdpa")
    assert answer(tiny_model, prompts) == expected
