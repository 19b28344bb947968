"""The arithmetic of a merge, on numbers small enough to check by hand, and against mutants of it."""

import ctypes
import gc
import resource
import sys

import numpy as np
import pytest
import torch

from case_helpers import few_of
from llmtune import durable
from llmtune.deploy import model_files
from llmtune.deploy.compare_logits import compare_logits
from llmtune.deploy.merge_inputs import find_merge_inputs
from llmtune.deploy.merge_math import merge_bias, merge_low_rank, round_once
from llmtune.deploy.merge_plan import plan_merge
from llmtune.deploy.write_merged import write_merged
from llmtune.engine.allocator import M_MMAP_THRESHOLD
from training_helpers import Forked


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_low_rank_update_is_w_plus_scaling_times_b_a():
    weight, a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0], [2.0]])
    folded = merge_low_rank(weight, a, b, scaling=0.5, dtype=torch.float32, is_transposed=False)
    assert folded.weight.tolist() == [[1.5, 7.0], [4.0, 14.0]]
    assert (folded.changed, folded.unchanged_by_rounding) == (4, 0)


def test_a_weight_stored_the_other_way_round_gets_the_transposed_update():
    weight, a, b = draw(6, 4), draw(2, 6, seed=1), draw(4, 2, seed=2)
    straight = merge_low_rank(weight.T.contiguous(), a, b, scaling=2.0, dtype=torch.float32, is_transposed=False)
    turned = merge_low_rank(weight, a, b, scaling=2.0, dtype=torch.float32, is_transposed=True)
    assert torch.equal(turned.weight, straight.weight.T)


def test_a_magnitude_gives_each_output_its_length():
    """DoRA: the row of an output is scaled to the length that was trained."""
    weight, a, b, magnitude = draw(5, 7), draw(2, 7, seed=1), draw(5, 2, seed=2), torch.arange(1.0, 6.0)
    folded = merge_low_rank(weight, a, b, scaling=1.0, dtype=torch.float64, is_transposed=False, magnitude_O=magnitude)
    assert torch.allclose(torch.linalg.vector_norm(folded.weight, dim=1), magnitude.double())


def test_the_result_does_not_depend_on_how_a_matrix_is_cut(monkeypatch):
    weight, a, b = draw(50, 9), draw(3, 9, seed=1), draw(50, 3, seed=2)
    whole = merge_low_rank(weight, a, b, scaling=1.3, dtype=torch.bfloat16, is_transposed=False)
    monkeypatch.setattr("llmtune.deploy.merge_math.CHUNK_ENTRIES", 20)
    cut = merge_low_rank(weight, a, b, scaling=1.3, dtype=torch.bfloat16, is_transposed=False)
    assert torch.equal(whole.weight, cut.weight)
    assert (whole.changed, whole.unchanged_by_rounding) == (cut.changed, cut.unchanged_by_rounding)


def test_entries_that_rounding_puts_back_are_counted():
    """In bfloat16 the next number after 1 is 1.0078125: a change by 0.001 is lost, one by 0.01 is not."""
    weight = torch.ones(1, 3)
    folded = merge_low_rank(
        weight,
        torch.tensor([[0.001, 0.01, 0.0]]),
        torch.ones(1, 1),
        scaling=1.0,
        dtype=torch.bfloat16,
        is_transposed=False,
    )
    assert folded.weight.tolist() == [[1.0, 1.0078125, 1.0]]
    assert (folded.changed, folded.unchanged_by_rounding) == (2, 1)


def test_a_bias_moves_by_scaling_times_its_own_update():
    assert merge_bias(
        torch.tensor([1.0, 2.0]), torch.tensor([10.0, 0.0]), scaling=0.5, dtype=torch.float32
    ).weight.tolist() == [6.0, 2.0]


def test_rounding_to_half_precision_equals_numpys_single_rounding():
    """NumPy turns float64 into float16 in one step; torch goes by way of float32."""
    values = torch.cat([draw(4000).double() * scale for scale in (1e-8, 1e-5, 1.0, 1e3, 7e4)])
    middles = (1 + 2.0**-11) * (
        1 + draw(1000).double() * 2.0**-40
    )  # around a tie of float16, below what float32 can see
    values = torch.cat([values, middles, -middles, torch.zeros(2)])
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)
    assert np.array_equal(round_once(values, torch.float16).numpy(), expected)
    assert not np.array_equal(values.to(torch.float16).numpy(), expected)  # the mutant that rounds twice is caught


def test_rounding_to_bfloat16_takes_the_nearest_and_the_even_one_of_two():
    step = 2.0**-7
    values = torch.tensor(
        [1 + step / 2, 1 + 1.5 * step, 1 + step / 2 + 2.0**-40, -(1 + step / 2 + 2.0**-40)], dtype=torch.float64
    )
    assert round_once(values, torch.bfloat16).tolist() == [1.0, 1 + 2 * step, 1 + step, -(1 + step)]


def test_models_that_differ_are_told_apart_and_a_nan_is_infinitely_far():
    one = [draw(4, 9)]
    assert compare_logits(one, one).max_abs_logit == 0
    assert compare_logits(one, [one[0] + torch.eye(4, 9)]).mean_kl > 0.01
    broken = one[0].clone()
    broken[2, 3] = float("nan")
    assert compare_logits(one, [broken]).mean_kl == float("inf")
    assert compare_logits(one, [broken]).max_abs_logit == float("inf")


MUTANTS = {
    "scaling forgotten": lambda kind, *a, **k: kind(*a, **(k | {"scaling": 1.0})),
    "update subtracted": lambda kind, *a, **k: kind(*a, **(k | {"scaling": -k["scaling"]})),
    "magnitude forgotten": lambda kind, *a, **k: kind(
        *a, **{key: value for key, value in k.items() if key != "magnitude_O"}
    ),
    "rounded to bfloat16": lambda kind, *a, **k: type(kind(*a, **k))(
        kind(*a, **(k | {"dtype": torch.bfloat16})).weight.to(k["dtype"]), 0, 0
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_merge_that_computes_something_else_leaves_no_folder(make, monkeypatch, mutant):
    """N8: over tolerance, exit 5 and no output. Each mutant of the arithmetic is caught by the comparison."""
    from llmtune.deploy import write_merged as write
    from llmtune.deploy.merge import merge_lora
    from llmtune.errors import CheckpointError

    adapter, merged = make.adapter(make.base(), dora=True), make.path("merged")
    monkeypatch.setattr(write, "merge_low_rank", lambda *a, **k: MUTANTS[mutant](merge_low_rank, *a, **k))
    with pytest.raises(CheckpointError, match="is not the tuned one") as refusal:
        merge_lora(adapter, merged, dtype="float32")
    assert refusal.value.exit_code == 5
    assert not merged.exists()
    assert not [path for path in make.folder.iterdir() if "part" in path.name]


class LeftOut:
    """Merges every matrix but the fifth."""

    count = 0

    def __call__(self, *a, **k):
        self.count += 1
        return merge_low_rank(*a, **(k | {"scaling": 0.0} if self.count == 5 else k))


def transposed(weight, a, b, **k):
    square = weight.shape[0] == weight.shape[1]
    return merge_low_rank(weight, *((b.T.contiguous(), a.T.contiguous()) if square else (a, b)), **k)


WRONG = {
    "scale wrong by 1 %": lambda *a, **k: merge_low_rank(*a, **(k | {"scaling": 1.01 * k["scaling"]})),
    "alpha / sqrt(r)": lambda *a, **k: merge_low_rank(*a, **(k | {"scaling": 4 * k["scaling"]})),
    "transposed": transposed,
}


@pytest.mark.parametrize("size", few_of([0.1, 1.0, 4.0], [1.0]))
def test_a_merge_in_float32_is_judged_by_what_rounding_does_to_this_model(make, monkeypatch, size):
    """N8: a right merge is never refused, however strong the adapter; a wrong one always is.

    At size 1 the order of sums moves a logit by 3.7e-4, beyond 1e-5 of the largest one.
    """
    from llmtune.deploy import write_merged as write
    from llmtune.deploy.merge import merge_lora
    from llmtune.errors import CheckpointError

    adapter = make.adapter(make.base(), r=16, alpha=32.0, size=size)
    merge_lora(adapter, make.path("merged"))
    for wrong in (*WRONG.values(), LeftOut()):
        monkeypatch.setattr(write, "merge_low_rank", wrong)
        with pytest.raises(CheckpointError, match="is not the tuned one"):
            merge_lora(adapter, make.path("merged"))


def memory_of_merge(adapter, output):
    """By how many bytes writing a merge raises the peak of this process, which has read all of the base."""
    model_files.MAX_SHARD_BYTES = 30_000_000
    origin = find_merge_inputs(adapter, None)
    plan = plan_merge(origin, dtype=torch.float32, dequantize=True)
    for _ in plan.base.stored():
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with durable.commit_folder(output, replace=False) as staging:
        write_merged(plan, origin, staging)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def print_memory_of_merge(first, adapter, output):
    """The same on stdout, without what the first merge of a process loads."""
    count_each_tensor()
    memory_of_merge(first, output.with_name("first"))
    print(memory_of_merge(adapter, output))


def count_each_tensor():
    """Let the system's count be that of tensors alive: what the allocator keeps would be used again, unseen.

    Each tensor of 64 KiB or more gets pages of its own from here on, which go back when it ends. Without that, gaps
    between tensors count as well, and they differ from run to run.
    """
    gc.collect()
    if sys.platform == "linux":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_MMAP_THRESHOLD, 65_536)
        allocator.malloc_trim(0)


def test_writing_a_merge_takes_the_memory_of_a_few_matrices_and_not_of_the_model(make):
    """A model of 147 MB in matrices of 2 MB and less is merged within 40 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = make.path("base")
    config = LlamaConfig(
        vocab_size=len(make.tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=14, num_attention_heads=8,  # noqa: E501
        max_position_embeddings=64, bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    make.tokenizer.save_pretrained(base)
    model_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert model_bytes > 140_000_000
    adapter = make.adapter(base, target_modules=("q_proj", "down_proj"))
    small = make.adapter(make.base())
    child = Forked(lambda: print_memory_of_merge(small, adapter, make.path("merged")))
    printed, _ = child.communicate(100)
    assert child.returncode == 0, printed
    assert int(printed) < 40_000_000
