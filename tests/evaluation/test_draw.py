"""Drawn answers: greedily those of the library's own `generate`, otherwise by seed alone, and from the right odds."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.evaluation import draw
from llmtune.evaluation.draw import answer_seed, draw_answers
from llmtune.evaluation.generate import continue_ids

STOPS = (7, 3, 11, 50, 100, 150)
PROMPTS = [list(range(5, 5 + length)) for length in (3, 9, 5, 7)]
SHAPE = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": {**SHAPE, **HEADS},
    "gemma2": {**SHAPE, **HEADS},
    "gpt2": GPT2,
    "bloom": {"vocab_size": 200, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind])).eval()


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


def drawn(model, seeds, *, prompts=PROMPTS, temperature=1.0, **more):
    settings = {"stop_token_ids": STOPS, "pad_id": 0, "max_new_tokens": 20} | more
    return draw_answers(model, prompts, seeds, temperature=temperature, **settings)


@pytest.mark.parametrize("kind", MODELS)
def test_at_temperature_0_every_answer_is_the_one_of_generate(kind):
    model = model_of(kind)
    alone = continue_ids(model, PROMPTS, stop_token_ids=STOPS, pad_id=0, max_new_tokens=20)
    assert any(len(answer) < 20 for answer in alone) or kind in ("llama", "gemma2")
    together = drawn(model, [[0, 1, 2]] * 4, temperature=0.0, batch_size=6)
    assert together == [[answer] * 3 for answer in alone]


def test_an_answer_depends_on_its_seed_and_not_on_what_is_drawn_beside_it(llama):
    whole = drawn(llama, [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]])
    assert {len(answer) for group in whole for answer in group} > {20}  # some end early, and leave the batch
    for place, seeds in enumerate([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]):
        for number, seed in enumerate(seeds):
            assert drawn(llama, [[seed]], prompts=[PROMPTS[place]]) == [[whole[place][number]]]
    assert whole[0][0] != whole[0][1]


def test_an_answer_ends_with_its_first_stop_token(llama):
    for group in drawn(llama, [[1, 2, 3, 4]] * 4):
        for answer in group:
            assert not set(answer[:-1]) & {*STOPS}
            assert answer[-1] in STOPS or len(answer) == 20


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_with_their_probabilities(temperature):
    """Chi-square over the first token of 4,000 answers of a model that is far from uniform."""
    count, model = 4000, model_of("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = (logits / temperature).softmax(0) * count
    seeds = [[answer_seed(str(temperature), number) for number in range(count)]]
    answers = drawn(model, seeds, prompts=PROMPTS[:1], temperature=temperature, max_new_tokens=1, batch_size=count)
    seen = torch.bincount(torch.tensor([answer[0] for answer in answers[0]]), minlength=200).double()
    common = expected >= 5  # the rare ones are one class
    assert 10 < common.sum() < 200
    classes = [torch.cat([values[common], values[~common].sum()[None]]) for values in (seen, expected)]
    statistic = float(((classes[0] - classes[1]) ** 2 / classes[1]).sum())
    degrees = int(common.sum())
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def test_drawing_leaves_modes_and_random_states_as_they_were(llama):
    llama.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn(llama, [[1, 2]] * 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert llama.training
    llama.eval()


def test_rows_that_have_ended_leave_the_batch(llama, monkeypatch):
    sizes = []
    advance = draw._Decoder.advance
    monkeypatch.setattr(
        draw._Decoder, "advance", lambda self, ids: (sizes.append(len(ids)), advance(self, ids))[1], raising=True
    )
    drawn(llama, [list(range(16))] * 4)
    assert sizes[0] > 48
    assert sizes[-1] < draw.COMPACT_BELOW * sizes[0]
