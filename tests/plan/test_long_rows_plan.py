"""Q7: plans of long rows. A stand-in goes through few of many alike pieces and holds what all of them hold."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from case_helpers import few_of
from llmtune.kernels import attention_layout, chunks, linear_cross_entropy, tiled_attention, tiled_mlp
from llmtune.plan import activation_trace
from llmtune.plan.activation_trace import MicroBatchShape
from llmtune.plan.hardware import Target
from plan_helpers import FEW_LAYERS, traced
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import LORA


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Rows of a few hundred tokens are cut as those of a large model are with 100,000."""
    monkeypatch.setattr(tiled_mlp, "LEAST_TOKENS", 64)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", 32)
    monkeypatch.setattr(linear_cross_entropy, "TRAINED_CHUNK_ROWS", 48)
    for module in (attention_layout, tiled_attention):
        monkeypatch.setattr(module, "TILE_TOKENS", 32)
        monkeypatch.setattr(module, "MAX_SAVED_TOKENS", 256)
    monkeypatch.setattr(tiled_attention, "TILE_ROWS", 64)
    monkeypatch.setattr(attention_layout, "SHORT_TOKENS", 32)
    monkeypatch.setattr(attention_layout, "LEAST_PIECE", 16)


class Counting(TorchDispatchMode):
    """How many operators were run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


long_traced = partial(traced, checkpointing="offload", device_type="cuda", compute=torch.bfloat16)


@pytest.mark.parametrize(
    ("method", "lengths", "options"),
    [
        (FEW_LAYERS, (421,), {}),  # tiles of two sizes, a last chunk of 5 rows
        pytest.param(LORA[:2], (421,), {}, marks=pytest.mark.campaign),
        pytest.param(LORA[:2], (448,), {}, marks=pytest.mark.campaign),
        pytest.param(LORA[:2], (250, 20, 130), {"trained_tokens": 301}, marks=pytest.mark.campaign),
        ((), (421,), {}),  # the head is trained: longer chunks and its gradient
        pytest.param(LORA[:2], (448,), {"checkpointing": False}, marks=pytest.mark.campaign),
        # Runs of queries, with more keys each.
        pytest.param(LORA[:2], (421,), {"device_type": "cpu", "checkpointing": True}, marks=pytest.mark.campaign),
        pytest.param(LORA[:2], (80, 330, 110), {"device_type": "cpu"}, marks=pytest.mark.campaign),
        ((), (300,), {"device_type": "cpu"}),
    ],
)
def test_q7_the_plan_of_few_pieces_is_the_plan_of_all(forecaster_of, monkeypatch, method, lengths, options):
    """To the byte, but for the sums that chunks of the loss leave: 8 bytes each."""
    forecaster = forecaster_of(*method)
    with Counting() as planned_operators:
        planned = long_traced(forecaster, lengths, blocks=1, **options)
    monkeypatch.setattr(activation_trace, "FIRST", 1 << 30)
    with Counting() as operators:
        exact = long_traced(forecaster, lengths, blocks=1, **options)
    assert planned_operators.count < operators.count
    left_out = 8 * -(-sum(lengths) // 32)
    assert planned.phases == pytest.approx(exact.phases, abs=left_out)
    assert planned.activation_bytes == pytest.approx(exact.activation_bytes, abs=left_out)
    assert planned.gradients == exact.gradients
    assert planned.host_bytes == exact.host_bytes


def test_q7_a_shape_traced_again_holds_as_much(forecaster_of):
    """The masks of a CPU's tiles are made once for a shape, and belong to each trace of it."""
    forecaster = forecaster_of(*FEW_LAYERS)
    first, second = (traced(forecaster, (330,), blocks=1) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("method", [pytest.param(LORA[:2], marks=pytest.mark.campaign), ()])
def test_q7_a_row_ten_times_as_long_is_planned_by_as_many_operators(forecaster_of, method):
    counts = []
    for tokens in (2_000, 20_000):
        with Counting() as operators:
            long_traced(forecaster_of(*method), (tokens,), blocks=1)
        counts.append(operators.count)
    assert counts[0] > 500
    assert counts[1] <= 1.01 * counts[0]


def test_training_runs_every_chunk_and_a_plan_both_ends_and_the_largest_pair():
    sizes = [1, 2, 3, 4, 9, 9, 5, 1, 1, 1, 1]
    assert list(chunks.every_chunk(sizes, lambda size: size)) == sizes
    select = activation_trace.representative_chunks
    assert select(range(11)) == [0, 1, 8, 9, 10]
    assert select(range(11), lambda number: sizes[number]) == [0, 1, 4, 5, 6, 8, 9, 10]
    assert list(select(range(5))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("recompute", few_of(["false", "true", "offload"], ["true"]))
def test_q7_the_plan_of_many_blocks_is_the_trace_of_all_of_them(forecaster_of, recompute):
    """On a GPU what a block lacks beside another's input would otherwise count once for each block.

    A page of the host is 16 MiB.
    """
    overrides = (*FEW_LAYERS, "training.precision=bf16", f"model.gradient_checkpointing={recompute}")
    forecaster = forecaster_of(*overrides, target=Target("a GPU", "cuda", 1 << 40))
    forecaster.shape.config.num_hidden_layers = 5
    batch = MicroBatchShape((500,), 400, "flat")
    planned = forecaster.peaks(forecaster.config, batch, "single")
    checkpointing = {"true": True, "false": False}.get(recompute, recompute)
    exact = long_traced(forecaster, batch.lengths, trained_tokens=400, checkpointing=checkpointing)
    assert planned.phases == pytest.approx(exact.phases, rel=0.02)
    assert (planned.activation_bytes, planned.host_bytes) == (exact.activation_bytes, exact.host_bytes)
