"""Q7: planned attention keeps what its kernel keeps on a GPU: key and value heads as they are, not one a query head."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtune.kernels import linear_cross_entropy
from llmtune.kernels.attention import BACKENDS, AttentionParams, Segments
from llmtune.plan.activation_trace import LiveBytes, MicroBatchShape, trace
from llmtune.plan.attention_memory import fake_flex_attention, flash_backward_bytes
from llmtune.plan.hardware import Target
from llmtune.plan.meta_model import ModelShape, build_meta_model
from plan_helpers import FEW_LAYERS
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import LORA

LENGTHS, HEADS, WIDTH = (300, 100), 8, 64
TOKENS = sum(LENGTHS)
QUERY = TOKENS * HEADS * WIDTH * 2
"""Bytes of the queries, and of the output, in bf16."""
SUMS = TOKENS * HEADS * 4
"""Bytes of one float32 a query and head."""


def bytes_of_attention(attend, key_heads):
    """Bytes alive after attention on new bf16 fake tensors, and the most in its backward pass.

    The output's gradient is counted in neither.
    """
    marks = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.zeros(1, TOKENS, HEADS, WIDTH, dtype=torch.bfloat16)
        rows = [torch.zeros(1, TOKENS, heads, WIDTH, dtype=torch.bfloat16) for heads in (HEADS, key_heads, key_heads)]
    live = LiveBytes([weight, gradient, marks, *rows], on_gpu=True, widened={})
    with mode, live:
        query, key, value = ((row + weight).transpose(1, 2) for row in rows)
        output = attend(query, key, value, Segments(marks, max(LENGTHS)), AttentionParams(0.125))
        del query, key, value
        saved = live.now - live.before
        live.enter("end")
        torch.autograd.backward(output, gradient)
    return saved, live.phases["end"] - live.before


@pytest.mark.parametrize("key_heads", [2, 8])
def test_q7_flash_attention_keeps_grouped_heads_as_they_are(key_heads):
    """Queries, keys, values, output, a float32 a query and head, and 16 bytes for a dropout that never is."""
    saved, _ = bytes_of_attention(BACKENDS["varlen"], key_heads)
    assert saved == 2 * QUERY + 2 * QUERY * key_heads // HEADS + SUMS + 16


@pytest.mark.parametrize("key_heads", [2, 8])
def test_q7_flash_attention_holds_its_kernels_own_sums_while_it_goes_back(key_heads):
    """Float32 sums for queries, and where heads are grouped, key and value gradients for each query head.

    Beside what was saved, the three gradients, and the zeros that torch makes for results which are not differentiated.
    """
    saved, peak = bytes_of_attention(BACKENDS["varlen"], key_heads)
    own = (TOKENS + 128 * len(LENGTHS)) * HEADS * (WIDTH + 1) * 4 + (2 * QUERY if key_heads < HEADS else 0)
    assert flash_backward_bytes(TOKENS, len(LENGTHS), HEADS, key_heads, WIDTH, 2) == own
    assert peak == saved + QUERY + 2 * QUERY * key_heads // HEADS + own + SUMS + 16


@pytest.mark.parametrize("key_heads", [2, 8])
def test_q7_flex_attention_keeps_grouped_heads_as_they_are(key_heads):
    saved, _ = bytes_of_attention(fake_flex_attention, key_heads)
    assert saved == 2 * QUERY + 2 * QUERY * key_heads // HEADS + SUMS


@pytest.mark.parametrize("key_heads", [2, 8])
def test_q7_sdpa_keeps_keys_and_values_for_every_query_head_and_its_output_twice(key_heads):
    """By document, so the whole output is a copy."""
    saved, _ = bytes_of_attention(BACKENDS["sdpa"], key_heads)
    assert saved == 5 * QUERY + SUMS


def test_variable_length_attention_is_given_grouped_heads(monkeypatch):
    """torch's function takes them as they are (`enable_gqa`); it needs a CUDA device, so only what it is called with is
    looked at.
    """
    from llmtune.kernels import attention

    calls = []

    def recorded(query, key, value, *marks, enable_gqa=False, **settings):
        settings["enable_gqa"] = enable_gqa
        calls.append((tuple(query.shape), tuple(key.shape), tuple(value.shape), marks[2:], settings))
        return query

    monkeypatch.setattr(attention, "varlen_attn", recorded)
    query, key, value = (torch.zeros(1, heads, 12, 16) for heads in (6, 2, 2))
    segments = Segments(torch.tensor([0, 5, 12], dtype=torch.int32), 7)
    assert BACKENDS["varlen"](query, key, value, segments, AttentionParams(0.25, window=4)).shape == (1, 12, 6, 16)
    settings = {"scale": 0.25, "window_size": (3, 0), "enable_gqa": True}
    assert calls == [((12, 6, 16), (12, 2, 16), (12, 2, 16), (7, 7), settings)]


def on_a_gpu(forecaster_of, *overrides, has_bf16=True):
    return forecaster_of(*overrides, target=Target("a GPU", "cuda", 1 << 40, has_bf16))


def meta_model(forecaster):
    tokenizer = forecaster.prepared.tokenizer.tokenizer
    return build_meta_model(forecaster.shape, forecaster.config, tokenizer, dtype=torch.float32)


def worst_case(forecaster):
    batch, several = forecaster.largest_micro_batch(forecaster.config)
    return batch, "summed" if several else "single"


def peaks_by(forecaster, backend, compute):
    batch, gradients = worst_case(forecaster)
    return trace(
        meta_model(forecaster),
        batch,
        device_type="cuda",
        compute=compute,
        checkpointing=False,
        gradients=gradients,
        attention=backend,
    )


@pytest.fixture(scope="module")
def kept_by_way():
    """Type of arithmetic -> the bytes that each way of attention keeps."""
    return {}


@pytest.mark.parametrize(
    ("overrides", "has_bf16", "backend", "compute"),
    [
        (("training.precision=bf16",), True, "varlen", torch.bfloat16),
        pytest.param(("training.precision=fp16",), False, "flex", torch.float16, marks=pytest.mark.campaign),
        pytest.param(("training.precision=fp32",), True, "flex", None, marks=pytest.mark.campaign),
        (("training.precision=bf16", "model.attention=flex"), True, "flex", torch.bfloat16),
        (("training.precision=bf16", "model.attention=sdpa"), True, "sdpa", torch.bfloat16),
    ],
)
def test_q7_a_gpu_is_planned_with_the_attention_that_it_will_train_with(
    forecaster_of, kept_by_way, overrides, has_bf16, backend, compute
):
    forecaster = on_a_gpu(forecaster_of, *LORA[:2], "model.dtype=float32", *overrides, has_bf16=has_bf16)
    forecaster.shape.config.num_hidden_layers = 2
    planned = forecaster.peaks(forecaster.config, *worst_case(forecaster))
    if compute not in kept_by_way:
        kept_by_way[compute] = {
            name: peaks_by(forecaster, name, compute).activation_bytes for name in ("varlen", "flex", "sdpa")
        }
    activations = kept_by_way[compute]
    assert len({*activations.values()}) == 3
    assert planned.activation_bytes == activations[backend]


def test_q7_a_model_with_a_soft_cap_is_planned_with_the_next_way(forecaster_of):
    """Flash attention has none, so such a model trains with flex attention."""
    from transformers import Gemma2Config

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    forecaster = on_a_gpu(forecaster_of, *LORA[:2], "training.precision=bf16", "model.dtype=float32")
    forecaster.__dict__["shape"] = ModelShape(Gemma2Config(**small, head_dim=16, vocab_size=400), 0)
    planned = forecaster.peaks(forecaster.config, *worst_case(forecaster))
    assert planned.activation_bytes == peaks_by(forecaster, "flex", torch.bfloat16).activation_bytes
    with pytest.raises(NotImplementedError, match="no soft cap"):
        peaks_by(forecaster, "varlen", torch.bfloat16)


def test_q7_a_gpu_takes_a_chunk_of_logits_at_once_and_a_cpu_a_few_rows_of_it(forecaster_of, monkeypatch):
    """The chunk is in float32 twice then: its logits and its probabilities."""
    monkeypatch.setattr(linear_cross_entropy, "SLICE_NUMBERS", 4 * 400)
    forecaster = on_a_gpu(forecaster_of, *FEW_LAYERS)
    batch = MicroBatchShape((300,), 256, "flat")
    losses = []
    for kind in ("cpu", "cuda"):
        model = build_meta_model(
            forecaster.shape, forecaster.config, forecaster.prepared.tokenizer.tokenizer, dtype=torch.float32
        )
        peaks = trace(model, batch, device_type=kind, compute=torch.bfloat16, checkpointing=False, gradients="single")
        losses.append(peaks.phases["loss"] - peaks.activation_bytes)
    vocabulary = forecaster.shape.config.vocab_size
    assert losses[1] - losses[0] == pytest.approx(2 * (256 - 4) * vocabulary * 4, rel=0.1)


def test_q7_gradients_are_a_part_of_their_own_wherever_the_worst_moment_is(forecaster_of):
    """Of five recomputed blocks that lie behind when the worst of the first comes, every gradient has been made."""
    forecaster = on_a_gpu(forecaster_of, *FEW_LAYERS, "training.batch_size=1", "training.gradient_accumulation_steps=1")
    forecaster.shape.config.num_hidden_layers = 5
    batch, several = forecaster.largest_micro_batch(forecaster.config)
    assert not several
    each = forecaster.sizes(forecaster.config).gradient_bytes // 5
    peaks = forecaster.peaks(forecaster.config, batch, "single")
    made = peaks.gradients
    assert (made["forward"], made["loss"]) == (0, 0)
    assert made["end"] in (0, 5 * each)
    assert 3 * each <= made["first block"] <= 5 * each
    held_before = forecaster.peaks(forecaster.config, batch, "summed")
    assert not any(held_before.gradients.values())
