"""Held-out loss: the numbers, and that measuring changes nothing."""

import functools
import math
import random

import numpy as np
import pytest
import torch

from example_list import ExampleList
from llmtune.data.dataset.batches import eval_batches
from llmtune.data.example import Conversation, Example, Message
from llmtune.engine.objective import plain_nll_sum
from llmtune.errors import DataError
from llmtune.evaluation.heldout import evaluate, token_bytes, trained_bytes


def batches(examples, size=2, layout="padded"):
    return eval_batches(examples, batch_size=size, layout=layout, pad_id=0, max_group_tokens=None)


def in_float64(model, examples):
    """Compute (nats, weight) in NumPy float64, one example at a time."""
    nats = weight = 0.0
    for example in examples:
        ids = example.input_ids.astype(np.int64)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().numpy()
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        for position in range(1, len(ids)):
            nats += float(example.weights[position]) * (log_sum[position - 1] - logits[position - 1, ids[position]])
            weight += float(example.weights[position])
    return nats, weight


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_loss_is_the_one_of_float64_however_rows_are_batched(tiny_model, held_out, size, layout):
    """N1 for evaluation: a sum of sums divided once, never a mean of means."""
    tiny_model.eval()
    nats, weight = in_float64(tiny_model, held_out)
    found = evaluate(
        functools.partial(plain_nll_sum, tiny_model),
        batches(held_out, size, layout),
        model=tiny_model,
        total_bytes=123.5,
    )
    assert found["eval_num_loss_tokens"] == weight
    assert found["eval_mean_nll"] == pytest.approx(nats / weight, rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(math.exp(nats / weight), rel=1e-5)
    assert found["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / 123.5, rel=1e-6)


def test_a_mean_of_means_would_be_told_apart(tiny_model, held_out):
    """The mutant of the law above: the rows are ragged enough for it to show."""
    nll_sum = functools.partial(plain_nll_sum, tiny_model.eval())
    found = evaluate(nll_sum, batches(held_out), model=tiny_model)
    with torch.no_grad():
        means = [float(nll_sum(batch)) / batch.loss_weight for batch in batches(held_out)]
    assert abs(np.mean(means) - found["eval_mean_nll"]) > 1e-4


def test_evaluation_changes_nothing(tiny_model, held_out, states):
    """N12: weights, gradients, every module's mode and all random states are as before; dropout is off meanwhile."""
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    tiny_model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    before, python_state, numpy_state = states(tiny_model), random.getstate(), np.random.get_state()[1].copy()
    seen = []

    def nll_sum(batch):
        seen.append([module.training for module in tiny_model.modules()])
        torch.rand(3)
        return plain_nll_sum(tiny_model, batch)

    evaluate(nll_sum, batches(held_out), model=tiny_model)
    after = states(tiny_model)
    assert not any(any(modes) for modes in seen)
    assert before[0] == after[0]
    assert all(torch.equal(one, other) for one, other in zip(before[1] + before[2], after[1] + after[2], strict=True))
    assert torch.equal(before[3], after[3])
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_an_evaluation_that_fails_leaves_the_model_training(tiny_model, held_out):
    def fails(batch):
        raise RuntimeError("out of memory")

    tiny_model.train()
    with pytest.raises(RuntimeError):
        evaluate(fails, batches(held_out), model=tiny_model)
    assert all(module.training for module in tiny_model.modules())


def test_rows_without_a_trained_token_are_refused(tiny_model):
    nothing = ExampleList([Example("held-out:1", np.array([3, 4, 5], np.int32), np.zeros(3, np.float32))])
    with pytest.raises(DataError, match="held-out rows have no trained token"):
        evaluate(functools.partial(plain_nll_sum, tiny_model), batches(nothing), model=tiny_model)


def test_several_processes_divide_their_sum_once(tiny_model, held_out):
    """N2 for evaluation: two processes with unequal shares give the loss of one."""
    nll_sum = functools.partial(plain_nll_sum, tiny_model)
    whole = evaluate(nll_sum, batches(held_out), model=tiny_model)
    shares = [ExampleList([held_out[0]]), ExampleList([held_out[index] for index in range(1, 6)])]
    numbers = [[], []]
    for share, noted in zip(shares, numbers, strict=True):
        evaluate(
            nll_sum,
            batches(share),
            model=tiny_model,
            sum_over_devices=lambda value, noted=noted: noted.append(value) or 1.0,
        )
    sums = iter(np.sum(numbers, axis=0))
    both = evaluate(nll_sum, batches(shares[0]), model=tiny_model, sum_over_devices=lambda _: float(next(sums)))
    assert both["eval_mean_nll"] == pytest.approx(whole["eval_mean_nll"], rel=1e-6)


def test_a_token_is_worth_the_bytes_of_its_text_and_a_control_token_none(tiny_tokenizer):
    counts = token_bytes(tiny_tokenizer)
    text = "the user asks: caf\u00e9 \U0001f600 0123"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert counts[ids].sum() == len(text.encode())
    assert counts[tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")] == 0


def test_the_bytes_of_a_conversation_are_those_of_its_answers(renderer, tiny_tokenizer):
    answers = ("caf\u00e9", "of words and numbers")
    messages = tuple(
        message for answer in answers for message in (Message("user", "the user asks"), Message("assistant", answer))
    )
    rendered = renderer.render(Conversation("row:1", messages))
    example = Example("row:1", np.array(rendered.input_ids, np.int32), np.array(rendered.weights, np.float32))
    assert trained_bytes(ExampleList([example]), tiny_tokenizer) == sum(len(answer.encode()) for answer in answers)


def test_weights_count_in_bytes_as_they_count_in_nats(tiny_tokenizer):
    ids = np.array(tiny_tokenizer("abcd", add_special_tokens=False)["input_ids"], np.int32)
    half = Example("row:1", ids, np.full(len(ids), 0.5, np.float32))
    assert trained_bytes(ExampleList([half]), tiny_tokenizer) == 2.0


def test_sentencepiece_pieces_are_counted_as_text():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581the": 2, "\u00e9": 3, "<0x0A>": 4, "\u2581": 5}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    bare.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="</s>")
    assert token_bytes(tokenizer).tolist() == [0, 0, 4, 2, 1, 1]
