"""What a micro-batch costs beside its products never rises unseen: bytes moved and operations, as counted."""

from pathlib import Path

import pytest

from llmtune.kernels import lora

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BUDGETS = {
    ("llama-3-8b", "none"): (273.4, 5777),
    ("llama-3-8b", "torch"): (158.9, 4553),
    ("llama-3-8b", "torch, Liger"): (78.68, 3410),
    ("llama-3-8b recomputed", "none"): (348.1, 8017),
    ("llama-3-8b recomputed", "torch"): (199.3, 6345),
    ("llama-3-8b recomputed", "torch, Liger"): (100.8, 4882),
    ("llama-3.2-1b", "none"): (80.41, 3025),
    ("llama-3.2-1b", "torch"): (51.65, 2409),
    ("llama-3.2-1b", "torch, Liger"): (23.18, 1730),
    ("llama-3.2-1b recomputed", "none"): (99.79, 4145),
    ("llama-3.2-1b recomputed", "torch"): (62.44, 3305),
    ("llama-3.2-1b recomputed", "torch, Liger"): (29.12, 2466),
    ("llama-3.2-1b masters", "none"): (143.9, 2082),
    ("llama-3.2-1b masters", "torch"): (111.2, 1356),
    ("llama-3.2-1b masters", "torch, Liger"): (76.98, 828),
    ("llama-3-8b masters", "torch, Liger"): (402.9, 1612),
}
"""(model, libraries whose kernels run) -> gigabytes and operations beside the products: LoRA on all linear layers, or
full tuning in bf16 beside float32 masters with one update of all weights, four documents of 1,024 tokens.
"""

MOST = ("llama-3-8b", "torch, Liger")
FULL = ("llama-3.2-1b masters", "torch, Liger")


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roofline

    def count(model, libraries):
        shape, _, kind = model.partition(" ")
        options = {"method": kind} if kind in roofline.UPDATE_BYTES else {"recompute": bool(kind)}
        found = roofline.count("h100", shape, [1024] * 4, roofline.LIBRARIES[libraries], **options)
        return found.other_bytes / 1e9, found.operations

    return count


@pytest.mark.parametrize(
    "case",
    [case if case in (MOST, FULL) else pytest.param(case, marks=pytest.mark.campaign) for case in BUDGETS],
    ids=str,
)
def test_bytes_and_operations_beside_the_products_stay_within_their_budget(counted, case):
    """A lower count is a new budget too."""
    assert counted(*case) == pytest.approx(BUDGETS[case], rel=2e-3)


def test_a_copy_more_in_a_block_is_noticed(counted, monkeypatch):
    """The tester is tested."""
    real = lora._run
    monkeypatch.setattr(lora, "_run", lambda members, x: [one.clone() for one in real(members, x)])
    gigabytes, operations = counted(*MOST)
    assert gigabytes > 1.01 * BUDGETS[MOST][0]
    assert operations > 1.01 * BUDGETS[MOST][1]


def test_weights_rounded_anew_in_a_micro_batch_are_noticed(counted):
    """The tester is tested: a model held in float32 rounds its weights for every product."""
    gigabytes, _ = counted("llama-3.2-1b full", FULL[1])
    assert gigabytes > 1.01 * BUDGETS[FULL][0]
