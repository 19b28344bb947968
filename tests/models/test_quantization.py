"""4-bit and 8-bit bases: quiet, exact, and really trained on, on this CPU too."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune.adapters.attach import attach_adapter
from llmtune.models.parameters import count_parameters, trained_parameters
from llmtune.models.quantization import bnb_optimizer, dequantized_weight, import_bitsandbytes, is_quantized_linear

IDS_BT = torch.arange(4, 36).reshape(2, 16)


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if is_quantized_linear(module)}


def dequantized_copy(folder, model):
    """The same model with plain float32 weights that equal what the quantized layers compute with."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, module in linear_layers(model).items():
        plain.get_submodule(name).weight.data = dequantized_weight(module)
    return plain


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_every_linear_layer_but_the_head_is_quantized(tiny_model_folder, load, quantization):
    model = load(tiny_model_folder, quantization=quantization).model
    assert len(linear_layers(model)) == 14
    assert type(model.lm_head) is torch.nn.Linear
    assert count_parameters(model) == 31_392 + 0  # entries, not bytes: as many as the plain model has


def test_4bit_is_nf4_with_double_quantization(tiny_model_folder, load):
    state = load(tiny_model_folder, quantization="4bit").model.model.layers[0].self_attn.q_proj.weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)


def test_4bit_logits_are_those_of_the_dequantized_base_in_training_and_evaluation(tiny_model_folder, load):
    model = load(tiny_model_folder, quantization="4bit").model
    plain = dequantized_copy(tiny_model_folder, model)
    with torch.no_grad():
        expected = plain(input_ids=IDS_BT).logits
        for mode in (False, True, False):
            model.train(mode)
            torch.testing.assert_close(model(input_ids=IDS_BT).logits, expected, atol=2e-6, rtol=1e-5)


def test_evaluation_in_between_does_not_change_4bit_training(tiny_model_folder, load, lora):
    """bitsandbytes repacks 4-bit weights in evaluation on some CPUs; after that nothing trains (N12)."""

    def gradients(*, look_first):
        model, _ = attach_adapter(load(tiny_model_folder, quantization="4bit").model, lora(), seed=0)
        if look_first:
            with torch.no_grad():
                model.eval()(input_ids=IDS_BT)
        model.train()(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
        return {name: one.grad for name, one in trained_parameters(model).items()}

    plain, looked = gradients(look_first=False), gradients(look_first=True)
    assert all(torch.equal(plain[name], looked[name]) for name in plain)
    assert any(bool(grad.abs().sum() > 0) for grad in plain.values())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_on_a_quantized_base_reduces_the_loss(tiny_model_folder, load, lora, quantization, precision):
    base = load(tiny_model_folder, quantization=quantization, precision=precision).model
    frozen = {name: module.weight.detach().clone() for name, module in linear_layers(base).items()}
    model, _ = attach_adapter(base, lora(r=8), seed=0)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.02)
    model.train()
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=IDS_BT, labels=IDS_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert {one.dtype for one in trained_parameters(model).values()} == {torch.float32}
    after = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in linear_layers(model).items()
    }
    assert all(torch.equal(after[name].weight, frozen[name]) for name in frozen)


def test_4bit_gradients_are_those_of_the_dequantized_base(tiny_model_folder, load, lora):
    base = load(tiny_model_folder, quantization="4bit").model
    plain, _ = attach_adapter(dequantized_copy(tiny_model_folder, base), lora(), seed=0)
    quantized, _ = attach_adapter(base, lora(), seed=0)
    for model in (plain, quantized):
        with torch.no_grad():
            for name, one in trained_parameters(model).items():
                if "lora_B" in name:
                    one.fill_(0.01)
        model.train()(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    wanted, found = trained_parameters(plain), trained_parameters(quantized)
    for name in wanted:
        torch.testing.assert_close(found[name].grad, wanted[name].grad, atol=1e-6, rtol=1e-4)


def test_layers_are_chosen_without_a_word_of_bitsandbytes():
    """peft, which chooses them, imports it."""
    code = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from llmtune.adapters.target_modules import adapted_layers
small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**small))
assert adapted_layers(model, {"target_modules": ["q_proj"]}) == ["model.layers.0.self_attn.q_proj"]
assert "bitsandbytes" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bitsandbytes_is_imported_without_a_word_a_look_at_a_hub_or_a_compiler(tmp_path):
    """The compiler is 0.8 s of every start with an adapter; what is decorated is still compiled, with its options."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('bitsandbytes went looking for code on a hub')")
    code = """
import sys, torch
sys.path.insert(0, ".")
at_once = torch.compile
from llmtune.models import quantization
quantization.import_bitsandbytes()
assert "kernels" not in sys.modules
assert torch.compile is at_once
assert "torch._inductor.compile_fx" not in sys.modules
from bitsandbytes.backends.default import ops
asked = []
def compiled(function, **options):
    asked.append(options)
    return lambda *args: function(*args) + 1
torch.compile = compiled
with quantization._compile_at_first_call():
    def plain(x): return x
    def other(x): return 10 * x
    bare, given = torch.compile(plain), torch.compile(dynamic=False)(other)
assert (asked, bare.__name__, torch.compile) == ([], "plain", compiled)
assert (bare(1), bare(2), asked) == (2, 3, [{}])
assert (given(1), given(2), asked) == (11, 21, [{}, {"dynamic": False}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["adamw_8bit", "lion"])
def test_an_optimizer_of_bitsandbytes_takes_groups_and_goes_downhill(name):
    import_bitsandbytes()
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.ones(64))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = bnb_optimizer(name, groups, 0.01, (0.9, 0.99), 1e-8)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    losses = []
    for _ in range(20):
        loss = (weight**2).mean() + (bias**2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
