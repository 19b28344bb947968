"""What a GPU refuses, and what becomes of it."""

import pytest
import torch
from pretend import numbers, varlen

from llmtune.kernels import attention


def test_page_locked_memory_that_is_refused_is_said_and_the_training_goes_on(train_on, undisturbed):
    """WSL2 gives 1 to 2 GB."""
    expected = undisturbed["recomputed"]
    with pytest.warns(RuntimeWarning, match="page-locked memory than 0 B .WSL2"):
        found = train_on(recompute="offload", pinned_limit=0)
    assert found.decided["training.engine"] == "flat"
    assert found.losses == expected.losses
    assert found.pageable != {}


@pytest.mark.campaign
def test_a_backend_whose_backward_pass_fails_is_replaced_and_its_reason_shown(train_on, monkeypatch):
    def no_config(*_args):
        raise RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: Required: 114688 Limit:101376")

    backward = torch.ops.torch_attn._varlen_attn_backward.default
    monkeypatch.setitem(numbers.TWINS, backward, no_config)
    trained = train_on(steps=0)
    assert trained.decided["model.attention"] == "sdpa"
    assert "varlen: RuntimeError: No valid triton configs" in trained.reasons["model.attention"]


@pytest.mark.campaign
def test_a_backend_that_fails_on_longer_documents_only_is_replaced(train_on, monkeypatch):
    """Torch 2.15 chooses another kernel above 128 tokens."""

    def short_only(query, key, value, ends, key_ends, longest, *others):
        if longest > 128:
            raise RuntimeError("cuDNN refuses")
        return varlen.forward(query, key, value, ends, key_ends, longest, *others)

    monkeypatch.setitem(numbers.TWINS, torch.ops.torch_attn._varlen_attn.default, short_only)
    trained = train_on(steps=0)
    assert trained.decided["model.attention"] == "sdpa"
    assert "cuDNN refuses" in trained.reasons["model.attention"]


def test_gradients_that_differ_from_the_plain_engine_s_replace_a_backend(train_on, monkeypatch):
    def halved(*args):
        return tuple(one * 0.5 for one in varlen.backward(*args))

    monkeypatch.setitem(numbers.TWINS, torch.ops.torch_attn._varlen_attn_backward.default, halved)
    trained = train_on(steps=0)
    assert trained.decided["model.attention"] == "sdpa"
    assert "gradient" in trained.reasons["model.attention"]


def test_memory_that_runs_out_in_the_probe_is_not_a_backend_that_does_not_work(train_on, monkeypatch):
    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setitem(numbers.TWINS, torch.ops.torch_attn._varlen_attn.default, full)
    with pytest.raises(torch.OutOfMemoryError):
        train_on(steps=0)


@pytest.mark.campaign
def test_a_torch_without_grouped_heads_in_varlen_attention_gets_them_repeated(
    train_on,
    undisturbed,
    monkeypatch,
):
    """Torch 2.11 has no `enable_gqa`."""
    real, heads = attention.varlen_attn, set()

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        heads.add((query.shape[1], key.shape[1], value.shape[1]))
        return real(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    expected = undisturbed["gpu"]
    monkeypatch.setattr(attention, "varlen_attn", of_2_11)
    trained = train_on()
    assert heads == {(4, 4, 4)}
    assert trained.decided["model.attention"] == "varlen", trained.reasons
    assert trained.losses == pytest.approx(expected.losses, rel=1e-4)
