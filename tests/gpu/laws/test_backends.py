"""Every architecture on every card takes the backend that it should, with one wait of the host a step."""

import pytest

from llmtune.kernels import attention


def rarely(*names):
    """Cases that only the campaign runs."""
    return [pytest.param(name, marks=pytest.mark.campaign) for name in names]


FAST = rarely("llama", "gpt2", "gemma3", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "mixtral")
AMPERE_AND_LATER = ("rtx3090", "rtx4090", "a100-80", "h100", "h200")


@pytest.mark.parametrize("family", FAST)
def test_a_model_takes_variable_length_flash_attention_and_nothing_else_is_tried(train_on, family):
    trained = train_on("rtx4090", family, steps=1)
    assert trained.decided["training.engine"] == "flat", trained.reasons
    assert trained.decided["model.attention"] == "varlen"


@pytest.mark.campaign
@pytest.mark.parametrize("card", AMPERE_AND_LATER)
def test_every_card_from_ampere_on_takes_it(train_on, card):
    assert train_on(card, steps=1).decided["model.attention"] == "varlen"


def test_queries_and_keys_are_given_one_object_of_ends(train_on, monkeypatch):
    """On Hopper torch 2.15 takes cuDNN's kernel where `cu_seq_q is cu_seq_k` (its `varlen.py`)."""
    real, alike = attention.varlen_attn, set()

    def noting(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        alike.add(cu_seq_q is cu_seq_k and max_q == max_k)
        return real(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)

    monkeypatch.setattr(attention, "varlen_attn", noting)
    train_on("h100", steps=1)
    assert alike == {True}


VARIANTS = {
    "lora": {},
    "lora recomputed": {"recompute": True},
    "lora offloaded": {"recompute": "offload"},
    "lora with dropout": {"dropout": 0.1},
    "full": {"lora": False},
    "full recomputed": {"lora": False, "recompute": True},
    "full, weights move in the backward pass": {"lora": False, "in_backward": True},
    "muon": {"lora": False, "optimizer": "muon"},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "sdpa": {"attention": "sdpa"},
    "sdpa recomputed": {"attention": "sdpa", "recompute": True},
    "eager": {"attention": "eager"},
    "plain": {"engine": "plain"},
    "noise on embeddings": {"neftune_alpha": 5.0},
}


KNOWN_WAITS = {
    # Asked before the first weight moves; afterwards the window could no longer be skipped.
    "full, weights move in the backward pass": ("update.py",),
    # The library looks into its padding mask.
    "plain": ("masking_utils.py",),
}


OFTEN = ("lora offloaded",)


@pytest.mark.parametrize("variant", [*OFTEN, *rarely(*sorted(VARIANTS.keys() - OFTEN))])
def test_the_host_waits_once_a_step_and_copies_only_from_page_locked_memory(train_on, variant):
    trained = train_on("rtx4090", **VARIANTS[variant])
    known = KNOWN_WAITS.get(variant, ())
    waits = {place: count for place, count in trained.waits.items() if not any(file in place for file in known)}
    assert list(waits.values()) == [len(trained.losses)], waits
    assert "loop.py" in next(iter(waits)), waits
    assert trained.pageable == {}


@pytest.mark.parametrize(
    ("card", "precision", "expected"),
    [pytest.param("t4", one, "sdpa", marks=pytest.mark.campaign) for one in ("fp16", "fp32")],
)
def test_a_card_before_ampere_takes_attention_by_document_and_says_what_was_faster(train_on, card, precision, expected):
    trained = train_on(card, precision=precision)
    assert trained.decided["model.attention"] == expected
    assert "what is faster failed" in trained.reasons["model.attention"]


@pytest.mark.campaign
def test_a_model_with_a_bound_on_scores_takes_tiles_where_flex_attention_fails(train_on):
    """Gemma 2; flex attention needs a compiler for the device."""
    trained = train_on("rtx4090", "gemma2")
    assert trained.decided["model.attention"] == "tiles", trained.reasons
