"""Q7: plans of long rows. A stand-in goes through few of many alike pieces and holds what all of them hold."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.kernels import chunked_mlp, chunks, head_loss
from llmtune.models.load import choose_weight_dtype
from llmtune.plan.activation_trace import MicroBatchShape, trace
from llmtune.plan.hardware import Target
from llmtune.plan.meta_model import build_meta_model
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import LORA


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Rows of a few hundred tokens are cut as those of a large model are with 100,000."""
    monkeypatch.setattr(chunked_mlp, "LEAST_TOKENS", 64)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 32)
    monkeypatch.setattr(head_loss, "TRAINED_CHUNK_ROWS", 48)


def traced(
    forecaster,
    lengths,
    *,
    recompute="offload",
    device_type="cuda",
    trained=None,
    seen: AbstractContextManager | None = None,
):
    config = forecaster.config
    full = config.adapter.method == "none"
    dtype, _ = choose_weight_dtype(config.model.dtype, trained=full, precision="bf16")
    model = build_meta_model(forecaster.shape, config, forecaster.prepared.tokenizer.tokenizer, dtype=dtype)
    batch = MicroBatchShape(lengths, trained or sum(lengths), "flat")
    with seen or nullcontext():
        return trace(
            model, batch, device_type=device_type, compute=torch.bfloat16, checkpointing=recompute, gradients="single"
        )


@pytest.mark.parametrize(
    ("method", "lengths", "options"),
    [
        (LORA[:2], (997,), {}),  # tiles of two sizes, a last chunk of 5 rows
        (LORA[:2], (512,), {}),
        (LORA[:2], (500, 30, 200), {"trained": 601}),
        ((), (1013,), {}),  # the head is trained: longer chunks and its gradient
        (LORA[:2], (1500,), {"recompute": False}),
        (LORA[:2], (1500,), {"device_type": "cpu", "recompute": True}),  # runs of queries, with more keys each
        (LORA[:2], (300, 1300, 450), {"device_type": "cpu"}),
        ((), (1100,), {"device_type": "cpu"}),
    ],
)
def test_q7_the_plan_of_few_pieces_is_the_plan_of_all(forecaster_of, monkeypatch, method, lengths, options):
    """To the byte, but for the sums that chunks of the loss leave: 8 bytes each."""
    forecaster = forecaster_of(*method)
    few = traced(forecaster, lengths, **options)
    monkeypatch.setattr(chunks, "FIRST", 1 << 30)
    every = traced(forecaster, lengths, **options)
    left_out = 8 * -(-sum(lengths) // 32)
    assert few.phases == pytest.approx(every.phases, abs=left_out)
    assert few.kept == pytest.approx(every.kept, abs=left_out)
    assert few.gradients == every.gradients
    assert few.host_bytes == every.host_bytes


def test_q7_a_shape_traced_again_holds_as_much(forecaster_of):
    """The masks of a CPU's tiles are made once for a shape, and belong to each trace of it: blocks follow from two of
    them.
    """
    forecaster = forecaster_of(*LORA[:2])
    assert traced(forecaster, (1300,), device_type="cpu") == traced(forecaster, (1300,), device_type="cpu")


class Counting(TorchDispatchMode):
    """How many operators were run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [LORA[:2], ()])
def test_q7_a_row_ten_times_as_long_is_planned_by_as_many_operators(forecaster_of, method):
    counts = []
    for tokens in (2_000, 20_000):
        counting = Counting()
        traced(forecaster_of(*method), (tokens,), seen=counting)
        counts.append(counting.count)
    assert counts[0] > 500
    assert counts[1] <= 1.01 * counts[0]


def test_real_tensors_go_through_every_piece():
    """Also in the order they come; of a stand-in both ends stay, and the largest pair with what follows it."""
    sizes = [1, 2, 3, 4, 9, 9, 5, 1, 1, 1, 1]
    assert list(chunks.telling_pieces(sizes, torch.zeros(1), lambda size: size)) == sizes
    with FakeTensorMode():
        stand_in = torch.zeros(1)
    assert chunks.telling_pieces(range(11), stand_in) == [0, 1, 8, 9, 10]
    assert chunks.telling_pieces(range(11), stand_in, lambda number: sizes[number]) == [0, 1, 4, 5, 6, 8, 9, 10]
    assert list(chunks.telling_pieces(range(5), stand_in)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("recompute", ["false", "true", "offload"])
def test_q7_the_plan_of_many_blocks_is_the_trace_of_all_of_them(forecaster_of, recompute):
    """On a GPU what a block lacks beside another's input would otherwise count once for each block.

    A page of the host is 16 MiB.
    """
    there = Target("a GPU", "cuda", 1 << 40)
    forecaster = forecaster_of(
        *LORA[:2], "training.precision=bf16", f"model.gradient_checkpointing={recompute}", target=there
    )
    forecaster.shape.config.num_hidden_layers = 6
    batch = MicroBatchShape((500,), 400, "flat")
    planned = forecaster.peaks(forecaster.config, batch, "single")
    exact = traced(
        forecaster, batch.lengths, trained=400, recompute={"true": True, "false": False}.get(recompute, recompute)
    )
    assert planned.phases == pytest.approx(exact.phases, rel=0.02)
    assert (planned.kept, planned.host_bytes) == (exact.kept, exact.host_bytes)
