"""Models built from nothing: standard architectures, true counts, seeded starts, impossible shapes refused."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune.config.schema import ArchitectureConfig
from llmtune.errors import ConfigError, ModelError
from llmtune.models.save import write_model
from llmtune.models.scratch import INITIAL_STD, build_config, build_model, choose_architecture, parameter_count


def build(tokenizer, seed=0, name="custom-nano", **shape):
    return build_model(build_config(name, ArchitectureConfig(**shape), tokenizer), seed=seed)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ({}, "LlamaForCausalLM"),
        ({"positions": "rotary", "n_kv_heads": 2}, "LlamaForCausalLM"),
        ({"pre_norm": False}, "Olmo2ForCausalLM"),
        ({"positions": "learned"}, "GPT2LMHeadModel"),
    ],
)
def test_the_architecture_follows_positions_and_norms(tiny_tokenizer, shape, kind):
    model = build(tiny_tokenizer, **shape)
    assert type(model).__name__ == kind
    assert model.config.architectures == [kind]
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 128)


def test_the_start_is_a_function_of_shape_and_seed_alone(tiny_tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(tiny_tokenizer, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = build(tiny_tokenizer, seed=5).state_dict(), build(tiny_tokenizer, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_what_writes_into_the_residual_stream_starts_smaller_with_depth(tiny_tokenizer, positions):
    model = build(tiny_tokenizer, n_layers=8, d_model=128, positions=positions)
    into = [
        w
        for name, w in model.named_parameters()
        if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
    ]
    other = [
        w
        for name, w in model.named_parameters()
        if name.endswith(("q_proj.weight", "up_proj.weight", "c_attn.weight", "c_fc.weight"))
    ]
    assert len(into) == 16
    assert torch.cat([w.flatten() for w in into]).std().item() == pytest.approx(
        INITIAL_STD / 4, rel=0.02
    )  # sqrt(2 x 8) = 4
    assert torch.cat([w.flatten() for w in other]).std().item() == pytest.approx(INITIAL_STD, rel=0.02)
    assert all(bool((w == 1).all()) for name, w in model.named_parameters() if w.ndim == 1 and name.endswith("weight"))
    assert all(bool((w == 0).all()) for name, w in model.named_parameters() if name.endswith("bias"))


def test_an_untrained_model_is_as_unsure_as_can_be(tiny_tokenizer):
    model = build(tiny_tokenizer)
    ids = torch.randint(0, len(tiny_tokenizer), (2, 64), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(torch.tensor(float(len(tiny_tokenizer))).log().item(), abs=0.2)


def random_shape(rng):
    positions = rng.choice(["rotary", "rotary", "learned"])
    heads = rng.choice([1, 2, 3, 4, 6])
    shape = {
        "positions": positions,
        "n_heads": heads,
        "d_model": heads * rng.choice([4, 8, 10, 16]),
        "n_layers": rng.choice([1, 2, 3]),
        "d_ff": rng.choice([None, 16, 40, 96]),
        "max_seq_len": rng.choice([16, 32, 64]),
        "attention_dropout": rng.choice([None, 0.1]),
        "activation": rng.choice([None, "silu", "gelu", "relu"]),
        "tie_embeddings": rng.choice([None, True, False]),
        "vocab_size": rng.choice([None, 400, 431]),
    }
    if positions == "learned":
        shape["dropout"] = rng.choice([None, 0.1])
    else:
        shape["pre_norm"] = rng.choice([None, True, False])
        shape["n_kv_heads"] = rng.choice([None, *(n for n in range(1, heads + 1) if heads % n == 0)])
    return shape


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.campaign) for seed in range(12, 50))]
)
def test_a_random_shape_trains_two_steps_and_loads_in_plain_transformers_with_equal_logits(
    tiny_tokenizer, tmp_path, seed
):
    wanted = ArchitectureConfig(**random_shape(random.Random(seed)))
    vocabulary = max(tiny_tokenizer.get_vocab().values()) + 1
    model = build_model(build_config("custom-nano", wanted, tiny_tokenizer), seed=seed)
    shape = choose_architecture("custom-nano", wanted, vocabulary)
    assert sum(one.numel() for one in model.parameters()) == parameter_count(shape)

    torch.manual_seed(seed)
    ids = torch.randint(0, vocabulary, (2, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = model.eval()(input_ids=ids, labels=ids).loss.item()
    model.train()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.eval()(input_ids=ids, labels=ids).loss.item() < before

    write_model(model, tiny_tokenizer, tmp_path, stop_token_ids=[tiny_tokenizer.eos_token_id])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("shape", "key", "words"),
    [
        ({"d_model": 100, "n_heads": 3}, "n_heads", "3 heads do not divide a width of 100.*n_heads=(2 or 4|4 or 2)"),
        ({"d_model": 12, "n_heads": 4}, "n_heads", "even width per head, and 12 / 4 is 3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads", "3 key/value heads do not divide 4"),
        ({"n_layers": 0}, "n_layers", "n_layers is 0"),
        ({"d_model": -8}, "d_model", "d_model is -8"),
        ({"attention_dropout": 1.0}, "attention_dropout", "attention_dropout is 1.0"),
        ({"dropout": 0.1}, "dropout", "no dropout on the residual stream.*positions=learned"),
        ({"positions": "learned", "n_kv_heads": 2}, "n_kv_heads", "no grouped-query attention"),
        ({"positions": "learned", "pre_norm": False}, "pre_norm", "no standard architecture"),
        ({"vocab_size": 10}, "vocab_size", "the tokenizer has 314 ids, more than 10"),
    ],
)
def test_an_impossible_shape_is_refused_with_the_fix(tiny_tokenizer, shape, key, words):
    with pytest.raises(ConfigError, match=f"(?s){words}") as caught:
        build_config("custom-nano", ArchitectureConfig(**shape), tiny_tokenizer)
    assert [one.where for one in caught.value.problems] == [f"model.architecture.{key}"]


def test_the_shape_that_was_built_is_said(tiny_tokenizer, load):
    """Heads that follow from another width are a choice made for the user."""
    shape = ArchitectureConfig(d_model=100, n_layers=1)
    made = load("custom-nano", trained="full", seed=5, tokenizer=tiny_tokenizer, architecture=shape)
    assert [one.reason.partition(" parameters")[2] for one in made.decisions] == [": 1 layers x 100, 1 heads; seed 5"]


def test_everything_impossible_is_said_at_once(tiny_tokenizer):
    with pytest.raises(ConfigError) as caught:
        build_config(
            "custom-nano", ArchitectureConfig(d_model=100, n_heads=3, dropout=0.5, vocab_size=1), tiny_tokenizer
        )
    assert [one.where.rsplit(".", 1)[1] for one in caught.value.problems] == ["n_heads", "dropout", "vocab_size"]


def test_the_vocabulary_asked_for_is_the_number_of_rows_and_never_too_small(tiny_tokenizer):
    assert build(tiny_tokenizer).get_input_embeddings().weight.shape[0] == 314
    assert build(tiny_tokenizer, vocab_size=512).get_input_embeddings().weight.shape[0] == 512


def test_special_token_ids_travel_in_the_config(tiny_tokenizer):
    config = build_config("custom-nano", ArchitectureConfig(), tiny_tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id)


def test_a_pretrained_name_is_no_scratch_model():
    with pytest.raises(ModelError, match="no model that is built from scratch"):
        choose_architecture("gpt2-small", ArchitectureConfig(), 300)
