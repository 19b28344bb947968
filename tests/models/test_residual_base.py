"""PiSSA and OLoRA: as peft has them, and saved so that the adapter fits the base as it is on the disk."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmtune.adapters.attach import attach_adapter
from llmtune.adapters.residual_base import TakenPart, take_part
from llmtune.adapters.write import adapter_state_and_config, write_adapter
from llmtune.config.schema import AdapterConfig
from llmtune.errors import AdapterError
from llmtune.models.read_config import quiet_libraries

IDS = torch.arange(3, 40)[None]
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).save_pretrained(folder)
    return folder


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def started(model, init, **keys):
    config = AdapterConfig(method="lora", r=4, init=init, target_modules=TARGETS, **keys)
    adapted, _ = attach_adapter(model, config, seed=0)
    return (adapted, *take_part(adapted, init, seed=0))


def with_adapter(base_folder, folder):
    with quiet_libraries():
        return PeftModel.from_pretrained(load(base_folder), folder).eval()


def trained(adapted):
    """Move what is trained, as a few steps would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_the_first_values_are_those_of_peft_and_outputs_stay(init, base_folder):
    adapted, _, decision = started(load(base_folder), init, alpha=8.0)
    with quiet_libraries():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), init_lora_weights=init)
        theirs = dict(get_peft_model(load(base_folder), config).named_parameters())
    for name, parameter in adapted.named_parameters():
        if init == "pissa_niter_4":  # by other random directions, which take out as much
            assert parameter.detach().norm().item() == pytest.approx(theirs[name].detach().norm().item(), rel=0.02)
        else:
            torch.testing.assert_close(parameter, theirs[name], atol=1e-5, rtol=0)
    assert float((logits(adapted) - logits(load(base_folder))).abs().max()) < 1e-5
    moved = load(base_folder).state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert float((adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight - moved).norm()) > 0.1
    assert "rank 8" in decision.reason


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "keys",
    [{}, {"rslora": True}, {"dora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 12.0}}],
    ids=["plain", "rslora", "dora", "patterns"],
)
def test_what_is_saved_fits_the_base_as_it_is(init, keys, base_folder, tmp_path):
    adapted, taken, _ = started(load(base_folder), init, **keys)
    expected = logits(trained(adapted))
    write_adapter(adapted, tmp_path, taken=taken)
    loaded = with_adapter(base_folder, tmp_path)
    assert float((logits(loaded) - logits(load(base_folder))).abs().max()) > 1e-2
    assert float((logits(loaded) - expected).abs().max()) < 2e-5


def test_the_saved_tensors_are_those_that_peft_converts(base_folder, tmp_path):
    with quiet_libraries():
        config = LoraConfig(r=4, lora_alpha=32, target_modules=list(TARGETS), init_lora_weights="pissa")
        theirs = get_peft_model(load(base_folder), config)
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        trained(theirs).save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    adapted, taken, _ = started(load(base_folder), "pissa", alpha=32.0)
    (tmp_path / "ours").mkdir()
    write_adapter(trained(adapted), tmp_path / "ours", taken=taken)
    ours, other = (with_adapter(base_folder, tmp_path / name) for name in ("ours", "theirs"))
    assert ours.peft_config["default"].r == other.peft_config["default"].r == 8
    for name, tensor in adapter_state_and_config(other)[0].items():
        torch.testing.assert_close(adapter_state_and_config(ours)[0][name], tensor, atol=1e-5, rtol=0)


def test_a_checkpoint_gives_the_part_and_the_trained_half_back_bit_for_bit(base_folder):
    adapted, taken, _ = started(load(base_folder), "pissa")
    held, _ = adapter_state_and_config(trained(adapted))
    saved = taken.as_lora(held)
    assert all(torch.equal(tensor, held[name]) for name, tensor in taken.trained(saved).items())
    assert TakenPart.from_saved(saved).digest() == taken.digest()
    again, _ = attach_adapter(
        load(base_folder), AdapterConfig(method="lora", r=4, init="pissa", target_modules=TARGETS), seed=0
    )
    # Of a checkpoint with other first values, as another machine may compute them.
    other = {name: tensor.roll(1, 0 if "lora_A" in name else 1) for name, tensor in taken.tensors.items()}
    part, _ = take_part(again, "pissa", seed=0, saved=TakenPart(other).as_lora(held))
    assert part.digest() == TakenPart(other).digest() != taken.digest()
    assert float((logits(again) - logits(load(base_folder))).abs().max()) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weights_stored_the_other_way_round_are_taken_apart_too(init, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    before = logits(model)
    adapted, _ = attach_adapter(model, AdapterConfig(method="lora", r=4, init=init), seed=0)
    take_part(adapted, init, seed=0)
    assert float((logits(adapted) - before).abs().max()) < 1e-5


def test_what_a_16_bit_base_loses_is_told(base_folder):
    _, _, decision = started(load(base_folder, torch.bfloat16), "pissa")
    assert "bfloat16 rounds the rest by up to 1" in decision.reason
    assert "e-03 of a weight's norm" in decision.reason


@pytest.mark.parametrize(
    ("targets", "r", "problem"),
    [
        (("embed_tokens", "q_proj"), 4, "`model.embed_tokens` is an embedding"),
        (("v_proj",), 17, "is \\(16, 32\\), less than rank 17"),
    ],
)
def test_a_layer_of_which_no_part_can_be_taken_is_named(targets, r, problem, base_folder):
    adapted, _ = attach_adapter(
        load(base_folder), AdapterConfig(method="lora", r=r, init="pissa", target_modules=targets), seed=0
    )
    with pytest.raises(AdapterError, match=problem):
        take_part(adapted, "pissa", seed=0)


def test_a_head_tied_to_the_embedding_is_left_alone(base_folder):
    model = load(base_folder)
    model.lm_head.weight = model.model.embed_tokens.weight
    adapted, _ = attach_adapter(
        model, AdapterConfig(method="lora", r=4, init="olora", target_modules=("lm_head",)), seed=0
    )
    with pytest.raises(AdapterError, match="tied to the embedding"):
        take_part(adapted, "olora", seed=0)
