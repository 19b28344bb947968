"""Full tuning in bf16 beside float32 masters: the sums of a plain loop, saved and resumed in float32."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune.config.process_options import Options
from llmtune.engine.masters import MasterOptimizer, make_masters
from llmtune.engine.objective import plain_nll_sum
from llmtune.engine.optim import Optimizer
from llmtune.errors import ConfigError
from llmtune.models.parameters import freeze_all_but, trained_parameters
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from rank_helpers import launched
from training_helpers import difference, lines_of, small_run, stopped_after, weights_of

MASTERS = ("training.precision=bf16", "training.master_weights=true", "training.max_steps=4")
KINDS = {"all weights": (), "some of them": (r"model.train_only=['model\.layers\.1\..*','model\.norm\.weight']",)}
"""What is trained: weights that are not stay as they are published."""
PLAIN = (*MASTERS, "training.engine=plain", "evaluation.before_training=false", "evaluation.every_steps=null")


def plain_loop(setup):
    """Float32 masters moved by torch's AdamW, a bf16 copy that computes; returns losses and masters.

    As said in the paper (arXiv:1710.03740, section 3.1), with gradients of micro-batches summed in float32.
    """
    model = AutoModelForCausalLM.from_pretrained(setup.model.config._name_or_path, dtype=torch.float32).train()
    freeze_all_but(model, setup.config.model.train_only or [".*"])
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    masters = {name: weight.detach().clone().requires_grad_() for name, weight in trained.items()}
    decayed = [one for one in masters.values() if one.ndim >= 2]
    others = [one for one in masters.values() if one.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, fused=True), []
    for step, window in enumerate(setup.windows(0)):
        for name, weight in trained.items():
            weight.data = masters[name].detach().to(torch.bfloat16)
        optimizer.zero_grad()
        loss = 0.0
        for batch in window.micro_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                nll = plain_nll_sum(model, batch)
            (nll / window.loss_weight).backward()
            loss += nll.item()
            for name, weight in trained.items():
                before = masters[name].grad
                masters[name].grad = weight.grad.float() if before is None else before + weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate(step)
        optimizer.step()
        losses.append(loss / window.loss_weight)
    return losses, masters


@pytest.mark.parametrize("named", KINDS.values(), ids=KINDS)
def test_n9_an_update_is_that_of_a_plain_loop_with_float32_masters(named, config_of):
    """Bit for bit: masters, the rounded model, and every loss."""
    with StopRequest() as stop:
        run = training.open_run(config_of(*PLAIN, *named), Options(), stop, print_line=lambda _: None)
        results = list(run.steps())
    losses, masters = plain_loop(run.setup)
    assert [result.mean_loss for result in results] == pytest.approx(losses, rel=1e-6)
    assert len(losses) == 4
    assert all(torch.equal(run.setup.parameters[name], master) for name, master in masters.items())
    rounded = trained_parameters(run.setup.model)
    assert all(torch.equal(rounded[name], master.to(torch.bfloat16)) for name, master in masters.items())
    assert all(one.grad is None for one in rounded.values())
    frozen = [weight for weight in run.setup.model.parameters() if not weight.requires_grad]
    assert bool(frozen) == bool(named)
    assert {weight.dtype for weight in frozen} <= {torch.float32}, "as they are published: no master has them"


def test_steps_that_bf16_cannot_add_are_not_lost():
    """1 + 1e-4 is 1 in bf16: sixty such steps move the master, and then the weight."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    masters = make_masters(layer)

    optimizer = MasterOptimizer(Optimizer(torch.optim.SGD(masters.values(), lr=1e-4)), layer, masters)
    for _ in range(60):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert masters["weight"].item() == pytest.approx(1 - 60e-4, abs=1e-6)
    assert layer.weight.item() == float(torch.tensor(1 - 60e-4).bfloat16()) != 1.0


@pytest.mark.parametrize("named", KINDS.values(), ids=KINDS)
def test_p2_a_stopped_run_goes_on_bit_for_bit_from_its_masters(named, config_of, tmp_path, tiny_model_folder):
    """Checkpoints hold the masters, in float32; best and final models do too, and load as such."""
    whole = training.train(config_of(*MASTERS, *named, "checkpoint.every_steps=2", name="whole")).folder
    stopped_after(3, config_of(*MASTERS, *named, "checkpoint.every_steps=2", name="stopped"))
    stopped = training.resume(str(tmp_path / "runs" / "stopped"), print_line=lambda _: None).folder
    assert difference(whole, stopped) == ""
    assert weights_of(whole) == weights_of(stopped)
    assert lines_of(whole) == lines_of(stopped)
    saved = load_file(max((whole / "checkpoints").glob("step-*")) / "model.safetensors")
    for name in ("best", "final"):
        final = load_file(whole / "checkpoints" / name / "model.safetensors")
        assert {one.dtype for one in (*final.values(), *saved.values())} == {torch.float32}
        assert json.loads((whole / "checkpoints" / name / "config.json").read_text())["dtype"] == "float32"
    assert all(torch.equal(final[name], saved[name]) for name in saved)
    before = load_file(tiny_model_folder / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], final[name])}
    assert moved == saved.keys()
    assert (moved == before.keys()) == (not named)
    assert any(not torch.equal(one, one.bfloat16().float()) for one in saved.values()), "masters, not rounded weights"


def test_a_run_may_go_on_without_masters_and_with_them_again(config_of, tiny_model_folder, tmp_path):
    """What is saved is float32 either way; only roundings differ."""
    whole = training.train(config_of(*MASTERS, name="whole"), print_line=lambda _: None).folder
    stopped_after(1, config_of(*MASTERS, "checkpoint.every_steps=1", name="run"))
    run, said = tmp_path / "runs" / "run", []
    without = ("training.master_weights=false", "training.max_minutes=0.000001")  # one step more
    assert training.resume(str(run), overrides=without, print_line=said.append).step == 2
    with_them = ("training.master_weights=true", "training.max_minutes=null")
    assert training.resume(str(run), overrides=with_them, print_line=said.append).step == 4
    assert any("training.master_weights was True, is now False" in line for line in said)
    final, expected = (load_file(path / "checkpoints" / "final" / "model.safetensors") for path in (run, whole))
    assert final.keys() == expected.keys()
    begun = load_file(tiny_model_folder / "model.safetensors")
    for name, weight in expected.items():
        assert final[name].dtype == torch.float32
        assert (final[name] - weight).norm() < 0.1 * (weight - begun[name]).norm()


def test_the_default_on_a_cpu_is_float32_as_ever(config_of):
    with StopRequest() as stop:
        run = training.open_run(config_of("training.precision=bf16"), Options(), stop, print_line=lambda _: None)
    assert run.setup.config.training.master_weights is False
    assert not isinstance(run.setup.optimizer, MasterOptimizer)
    assert {one.dtype for one in run.setup.model.parameters()} == {torch.float32}


def test_masters_in_fp32_arithmetic_are_refused_with_the_fix(config_of):
    with pytest.raises(ConfigError, match="bf16") as refused:
        training.train(config_of("training.master_weights=true"))
    assert "training.precision: bf16" in str(refused.value)


@pytest.mark.campaign
def test_n2_two_processes_sum_the_gradients_of_masters(tiny_model_folder, rows_file, tmp_path):
    """The losses and masters of one process, but for roundings of bf16."""
    given = small_run(tiny_model_folder, rows_file, tmp_path, *MASTERS, "training.gradient_accumulation_steps=4")
    words = [word for word in given if not word.startswith("adapter.")]
    own = [sys.executable, "-m", "llmtune"]
    losses, masters = [], []
    for name, devices in (("alone", ()), ("together", ("--devices", "2"))):
        launched("train", *devices, *words, f"run.name={name}", launcher=own)
        losses.append([line["train_mean_nll"] for line in lines_of(tmp_path / name) if "train_mean_nll" in line])
        masters.append(load_file(tmp_path / name / "checkpoints" / "final" / "model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in masters[0].items():
        torch.testing.assert_close(masters[1][name], weight, atol=1e-4, rtol=1e-3)
