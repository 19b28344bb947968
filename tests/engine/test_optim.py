"""Which rule moves which parameter, and how weights decay."""

import pytest
import torch

from llmtune.engine import optim
from llmtune.engine.optim import OPTIMIZERS, build_optimizer, learning_rate_scales, matrices_of_blocks
from llmtune.engine.update import set_learning_rate
from llmtune.errors import ConfigError
from llmtune.models.parameters import trained_parameters

CPU = torch.device("cpu")
ON_CPU = ["adamw", "adamw_8bit", "lion", "adafactor", "muon", "sgd"]


def build(name, parameters, *, rate=0.1, decay=0.5, orthogonal=(), device=CPU, module=optim):
    return module.build_optimizer(
        name,
        parameters,
        learning_rate=rate,
        weight_decay=decay,
        betas=(0.9, 0.999),
        eps=1e-8,
        device=device,
        orthogonal=orthogonal,
    )


@pytest.mark.parametrize("name", ON_CPU)
def test_matrices_decay_and_vectors_do_not(name):
    """With zero gradients a step is decay alone: matrices times 1 - rate x decay = 0.95, decoupled in every optimizer."""  # noqa: E501
    parameters = {"matrix": torch.nn.Parameter(torch.ones(4, 4)), "vector": torch.nn.Parameter(torch.ones(4))}
    optimizer, _ = build(name, parameters, orthogonal={"matrix"})
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(parameters["matrix"], torch.full((4, 4), 0.95))
    assert torch.equal(parameters["vector"], torch.ones(4))


def test_decaying_vectors_is_caught(mutant):
    broken = mutant(optim, '{"params": vectors, "weight_decay": 0.0}', '{"params": vectors, "weight_decay": 0.5}')
    parameters = {"vector": torch.nn.Parameter(torch.ones(4))}
    optimizer, _ = build("adamw", parameters, module=broken)
    parameters["vector"].grad = torch.zeros(4)
    optimizer.step()
    assert not torch.equal(parameters["vector"], torch.ones(4))


@pytest.mark.parametrize("name", ON_CPU)
def test_every_optimizer_lowers_the_loss(bench, name):
    """Thirty passes over four rows, at a rate that suits the rule."""
    rate = {"lion": 1e-3, "sgd": 2e-2}.get(name, 1e-2)
    plan = bench.plan(bench.examples(4), batch_size=4, accumulation=1, max_steps=30)
    results = bench.training(bench.model(), plan, optimizer_name=name, learning_rate=rate).run()
    assert results[-1].train_mean_nll < 0.7 * results[0].train_mean_nll


def test_the_fused_kernel_is_used_and_said_and_equals_the_plain_one():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    optimizer, decisions = build("adamw", {"matrix": ours})
    assert str(decisions[0]) == "training.optimizer = adamw, fused: torch has the fused kernel for cpu"
    plain = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.5, foreach=False)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(8, 8)
        optimizer.step()
        plain.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest(bench):
    model = bench.model()
    parameters = dict(model.named_parameters())
    orthogonal = matrices_of_blocks(model, parameters)
    assert len(orthogonal) == 2 * 7
    assert "lm_head.weight" not in orthogonal
    assert "model.embed_tokens.weight" not in orthogonal
    optimizer, decisions = build("muon", parameters, orthogonal=orthogonal)
    rules = {name: type(dict(optimizer.part_of())[parameter]).__name__ for name, parameter in parameters.items()}
    assert {name for name, rule in rules.items() if rule == "Muon"} == orthogonal
    assert {rules[name] for name in parameters.keys() - orthogonal} == {"AdamW"}
    assert decisions[0].reason == "14 matrices of the blocks; AdamW for the other 7 tensors"


def test_matrices_of_adapters_are_matrices_of_blocks(bench):
    model = bench.model(lora=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert matrices_of_blocks(model, parameters) == parameters.keys()


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_a_paged_optimizer_is_refused_where_nothing_is_paged(name):
    with pytest.raises(
        ConfigError, match=f"`{name}` pages its state between GPU and CPU memory; this run is on the cpu"
    ) as caught:
        build(name, {"matrix": torch.nn.Parameter(torch.ones(4, 4))})
    assert caught.value.problems[0].fix == f"use `{name.removeprefix('paged_')}` here"


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown optimizer `adam`") as caught:
        build("adam", {"matrix": torch.nn.Parameter(torch.ones(4, 4))})
    assert all(name in caught.value.problems[0].fix for name in OPTIMIZERS)


def test_a_learning_rate_reaches_every_part(bench):
    model = bench.model()
    plan = bench.plan(bench.examples(8), batch_size=4, accumulation=1, max_steps=3)
    training = bench.training(model, plan, optimizer_name="muon", schedule="linear", warmup_steps=2)
    for result in training.steps():
        assert {group["lr"] for group in training.optimizer.param_groups} == {result.learning_rate}


def test_one_builder_for_every_name_of_the_config():
    from typing import get_args, get_type_hints

    from llmtune.config.schema import TrainingConfig

    assert set(get_args(get_type_hints(TrainingConfig)["optimizer"])) == OPTIMIZERS.keys()
    assert build_optimizer is optim.build_optimizer


def test_adafactor_is_that_of_the_trainer_of_transformers(tmp_path):
    """The same weights after three steps of `optim: adafactor`, bit for bit."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    gradients = [[torch.randn(6, 4), torch.randn(4)] for _ in range(3)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.ones(4))] for _ in range(2))
    optimizer, _ = build("adafactor", {"matrix": ours[0], "vector": ours[1]}, rate=0.01, decay=0.1)
    arguments = TrainingArguments(output_dir=tmp_path, optim="adafactor", learning_rate=0.01, report_to="none")
    rule, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = rule(groups, **options)
    for step in gradients:
        for mine, other, gradient in zip(ours, theirs, step, strict=True):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


# --- rates of their own


@pytest.fixture
def lora_model(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    from llmtune.adapters.attach import attach_adapter
    from llmtune.config.schema import AdapterConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    config = AdapterConfig(method="lora", r=4, modules_to_save=("lm_head",), target_modules=("q_proj", "up_proj"))
    return attach_adapter(model, config, seed=0)[0]


def rates_of(optimizer, parameters, rate):
    """Name of each parameter -> its rate where that of the schedule is `rate`."""
    set_learning_rate(optimizer, rate)
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {names[id(one)]: group["lr"] for group in optimizer.param_groups for one in group["params"]}


@pytest.mark.parametrize("name", ON_CPU)
def test_lora_plus_gives_the_rates_that_peft_gives(name, lora_model):
    from peft.optimizers import create_loraplus_optimizer

    parameters = trained_parameters(lora_model)
    scales, decisions = learning_rate_scales(
        lora_model, parameters, learning_rate=0.25, embedding_learning_rate=None, loraplus_lr_ratio=16.0
    )
    assert [decision.key for decision in decisions] == ["training.loraplus_lr_ratio"]
    orthogonal = matrices_of_blocks(lora_model, parameters)
    optimizer, _ = build_optimizer(
        name, parameters, learning_rate=0.25, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, device=CPU,
        orthogonal=orthogonal, lr_scales=scales,
    )  # fmt: skip
    theirs = create_loraplus_optimizer(lora_model, torch.optim.AdamW, lr=0.25, loraplus_lr_ratio=16.0)
    expected = {
        names: group["lr"]
        for group in theirs.param_groups
        for one in group["params"]
        for names, parameter in parameters.items()
        if parameter is one
    }
    assert rates_of(optimizer, parameters, 0.25) == expected
    assert set(expected.values()) == {0.25, 4.0}
    assert set(rates_of(optimizer, parameters, 0.125).values()) == {0.125, 2.0}


def test_the_embedding_has_a_rate_of_its_own_beside_lora_plus(lora_model):
    parameters = trained_parameters(lora_model)
    scales, _ = learning_rate_scales(
        lora_model, parameters, learning_rate=0.5, embedding_learning_rate=0.125, loraplus_lr_ratio=4.0
    )
    assert {scale for name, scale in scales.items() if "lora_B" in name} == {4.0}
    assert {name: scale for name, scale in scales.items() if "lora_B" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight": 0.25
    }


def test_a_rate_for_what_is_not_trained_is_refused(lora_model, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    named = {name: p for name, p in full.named_parameters() if "norm" in name}
    for ratio, rate, says in ((4.0, None, "no LoRA layer"), (None, 0.1, "neither the embedding")):
        with pytest.raises(ConfigError, match=says):
            learning_rate_scales(full, named, learning_rate=0.5, embedding_learning_rate=rate, loraplus_lr_ratio=ratio)


def test_a_builder_that_passes_over_the_factors_is_caught(mutant, lora_model):
    parameters = trained_parameters(lora_model)
    scales = {name: 8.0 for name in parameters if "lora_B" in name}
    broken = mutant(optim, "own = {} if scale == 1.0 else {LR_SCALE: scale}", "own = {}")
    found = []
    for module in (optim, broken):
        optimizer, _ = module.build_optimizer(
            "adamw", parameters, learning_rate=0.5, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, device=CPU,
            lr_scales=scales,
        )  # fmt: skip
        found.append({rates_of(optimizer, parameters, 0.5)[name] for name in scales})
    assert found == [{4.0}, {0.5}]
