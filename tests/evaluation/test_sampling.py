"""How tokens are chosen: as transformers does it, and without regard to the neighbours of a batch."""

import pytest
import torch

from llmtune.errors import UsageError
from llmtune.evaluation.generate import continue_ids, generate
from llmtune.evaluation.sampling import RepetitionPenalty, Sampling

PROMPTS = [[5, 17, 200, 33], [9, 120], [61, 7, 7, 7, 300, 12, 44]]


def ours(model, prompts, sampling, **options):
    return continue_ids(model, prompts, stop_token_ids=[2], pad_id=0, max_new_tokens=12, sampling=sampling, **options)


def theirs(model, prompt, seed=0, **options):
    torch.manual_seed(seed)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=2, pad_token_id=0, **options
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        (Sampling(), {"do_sample": False}),
        (Sampling(repetition_penalty=1.7), {"do_sample": False, "repetition_penalty": 1.7}),
        (Sampling(temperature=1.3, top_k=5), {"do_sample": True, "temperature": 1.3, "top_k": 5}),
        (
            Sampling(temperature=0.8, top_k=20, top_p=0.7, repetition_penalty=1.3),
            {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.7, "repetition_penalty": 1.3},
        ),
    ],
    ids=["greedy", "penalty", "top-k", "all"],
)
def test_tokens_are_those_of_transformers(tiny_model, sampling, options):
    for prompt in PROMPTS:
        assert ours(tiny_model, [prompt], sampling) == [theirs(tiny_model, prompt, **options)]


def test_a_penalty_does_not_depend_on_the_neighbours_of_a_prompt(tiny_model):
    """Padding is no text: with transformers' own penalty the shorter prompts of a batch are answered otherwise."""
    sampling = Sampling(repetition_penalty=1.7)
    alone = [ours(tiny_model, [prompt], sampling)[0] for prompt in PROMPTS]
    assert ours(tiny_model, PROMPTS, sampling) == alone


def test_padding_is_not_penalized_and_everything_before_is():
    logits = torch.tensor([[2.0, -2.0, 4.0, 1.0]] * 2)
    penalized = RepetitionPenalty(2.0, [1, 0])(torch.tensor([[0, 1, 2], [0, 1, 2]]), logits)
    assert penalized.tolist() == [[2.0, -4.0, 2.0, 1.0], [1.0, -4.0, 2.0, 1.0]]


def test_an_answer_ends_before_the_first_stop_text(tiny_model, tiny_tokenizer, renderer):
    prompts = ["hello", "the user asks", "a"]
    whole = generate(tiny_model, tiny_tokenizer, renderer, prompts, max_new_tokens=30)
    stop = whole[1].text[4:7]
    assert stop
    ended = generate(tiny_model, tiny_tokenizer, renderer, prompts, max_new_tokens=30, sampling=Sampling(stop=(stop,)))
    for before, after in zip(whole, ended, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert (after.stopped_by == "stop_text") is (stop in before.text)
        assert list(after.ids) == list(before.ids[: len(after.ids)])
    alone = generate(
        tiny_model, tiny_tokenizer, renderer, prompts[1:2], max_new_tokens=30, sampling=Sampling(stop=("never", stop))
    )
    assert alone == ended[1:2]
    assert ended[1].num_tokens < whole[1].num_tokens, "nothing is generated behind the stop text"


def test_a_stop_text_in_the_prompt_ends_nothing(tiny_model, tiny_tokenizer, renderer):
    (answer,) = generate(
        tiny_model, tiny_tokenizer, renderer, ["zzz"], max_new_tokens=5, sampling=Sampling(stop=("zzz",))
    )
    assert answer.stopped_by == "max_new_tokens"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stop": ("",)}, "an empty stop text would end every answer"),
        ({"stop": ("x", "")}, "an empty stop text"),
        ({"temperature": -1.0}, "`temperature` must be 0 or more, not `-1.0`"),
        ({"temperature": float("nan")}, "`temperature` must be 0 or more"),
        ({"top_k": -1}, "`top_k` must be 0 or more"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be above 0"),
    ],
)
def test_what_no_answer_can_be_drawn_with_is_refused_before_a_model_is_asked(given, says):
    with pytest.raises(UsageError, match=says):
        Sampling(**given)
