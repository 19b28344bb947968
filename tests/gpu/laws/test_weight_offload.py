"""Frozen weights that wait in host memory: the bits of resident ones, with copies that arrive late."""

import copy
import json
import re
from contextlib import suppress

import pytest
import torch
import transformers
from pretend import numbers
from pretend.machine import BLOCK_BYTES

from conftest import FAMILIES
from llmtune.adapters.attach import attach_adapter
from llmtune.cli.main import run
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.engine.probe import Probe
from llmtune.errors import DivergedError
from llmtune.kernels import activation_offload
from llmtune.kernels.activation_offload import HostStore
from llmtune.kernels.weight_offload import offload_weights
from llmtune.models import load
from llmtune.models.quantization import disable_cpu_repacking, quantization_config
from llmtune.plan.meta_model import count_sizes


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 12)


@pytest.fixture
def unprobed(monkeypatch):
    """Backends are taken as they are: what is tried before a training has been tried by another test."""
    monkeypatch.setattr(Probe, "_measure_library", lambda _probe: None)
    monkeypatch.setattr(Probe, "_compare", lambda _probe, _head: None)


def same(one, other):
    return (one.losses, one.norms) == (other.losses, other.norms) and all(map(torch.equal, one.weights, other.weights))


@pytest.mark.parametrize("recompute", [True, pytest.param("offload", marks=pytest.mark.campaign)])
def test_n15_offloaded_weights_repeat_every_bit_with_copies_that_arrive_late(train_on, undisturbed, recompute):
    trained = train_on(family="deep", recompute=recompute, offload_weights=True)
    assert same(trained, undisturbed["deep"])
    assert sum(trained.waits.values()) == sum(undisturbed["deep"].waits.values()) == 2, "one a step"
    assert not trained.pageable


def test_without_the_wait_another_training_comes_out(train_on, undisturbed, unprobed, monkeypatch):
    """The tester is tested: a block that does not wait for its weights computes with what lay there before."""
    monkeypatch.setattr(HostStore, "_wait", lambda _store, _stored: None)
    with suppress(DivergedError):
        assert not same(train_on(family="deep", recompute=True, offload_weights=True), undisturbed["deep"])


def test_where_page_locked_memory_is_refused_they_wait_in_ordinary_memory(train_on, undisturbed, unprobed):
    with pytest.warns(RuntimeWarning, match="waits in ordinary memory"):
        trained = train_on(family="deep", recompute=True, offload_weights=True, pinned_limit=1 << 14)
    assert same(trained, undisturbed["deep"])
    assert trained.pageable


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """A model of four blocks in NF4, on the host, where it is quantized."""
    folder, dtype = tmp_path_factory.mktemp("llama"), torch.bfloat16
    transformers.AutoModelForCausalLM.from_config(FAMILIES["deep"](), dtype=dtype).save_pretrained(folder)
    options = {"dtype": dtype, "quantization_config": quantization_config("4bit", dtype)}
    model = load._load_pretrained(folder, torch.device("cpu"), "auto", options, FAMILIES["deep"](), ())
    disable_cpu_repacking(model)
    return model


@pytest.mark.parametrize("targets", ["all-linear", pytest.param(("q_proj", "v_proj"), marks=pytest.mark.campaign)])
def test_n15_weights_in_four_bits_are_computed_with_as_on_the_cpu(train_model, four_bit, monkeypatch, targets):
    """Packed, with the scales of their blocks; of frozen layers without an adapter too."""
    adapter = AdapterConfig(method="lora", r=4, target_modules=targets)

    def train(device):
        model, _ = attach_adapter(copy.deepcopy(four_bit), adapter, seed=0)
        offload_weights(model, device)
        return train_model(model, device, adapter=adapter, recompute=True)

    cpu = train(torch.device("cpu"))
    with numbers.machine():
        gpu = train(torch.device("cuda", 0))
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert gpu.norms == pytest.approx(cpu.norms, rel=2e-2)
    monkeypatch.setattr(HostStore, "_wait", lambda _store, _stored: None)
    with suppress(DivergedError), numbers.machine():
        assert not same(train(torch.device("cuda", 0)), gpu)


def test_the_card_holds_what_is_planned():
    """All but the frozen matrices of blocks, and of these two blocks'."""
    adapter = AdapterConfig(method="lora", r=4)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["deep"](), dtype=torch.bfloat16)
    model, _ = attach_adapter(model, adapter, seed=0)
    sizes = count_sizes(model, Config(model=ModelConfig(offload_weights=True), adapter=adapter))
    with numbers.machine() as device:
        offload_weights(model, torch.device("cuda", 0))
        blocks = model.get_base_model().model.layers
        with torch.no_grad():
            model(input_ids=torch.arange(3, 12, device="cuda")[None])
        held = device.now
        tensors = sum(1 for one in model.parameters()) + sum(1 for _ in model.buffers())
        planned = sizes.base_bytes + sizes.adapter_bytes - sizes.offloaded_bytes + sizes.two_offloaded_bytes
        assert len(blocks) == 4
        assert abs(held - planned) <= tensors * BLOCK_BYTES


@pytest.mark.campaign
def test_a_run_evaluates_answers_stops_and_goes_on_with_offloaded_weights(tmp_path, monkeypatch):
    """P2, N15: its adapter, its held-out losses and its answers are those of the run with resident weights."""
    monkeypatch.setenv("LLMTUNE_CACHE_DIR", str(tmp_path / "cache"))
    words = ["train", "-c", "test", "model.name=custom-nano", "data.max_samples=12", f"run.output_dir={tmp_path}"]
    words += ["adapter.method=lora", "adapter.r=4", "model.gradient_checkpointing=true", "checkpoint.every_steps=2"]
    words += [
        "training.lr_schedule=constant",
        "training.warmup_ratio=0",
        "evaluation.every_steps=2",
        "evaluation.max_new_tokens=4",
    ]
    waiting = "model.offload_weights=true"
    with numbers.machine():
        for name, steps, *more in (("resident", 4), ("offloaded", 4, waiting), ("stopped", 2, waiting)):
            assert run([*words, *more, f"run.name={name}", f"training.max_steps={steps}"]) == 0
        assert run(["resume", str(tmp_path / "stopped"), "--allow-changes", "training.max_steps=4"]) == 0
    adapters = [
        (tmp_path / name / "checkpoints" / "final" / "adapter_model.safetensors").read_bytes()
        for name in ("resident", "offloaded", "stopped")
    ]
    assert adapters[0] == adapters[1] == adapters[2]
    samples, lines = (
        [(tmp_path / name / file).read_text().splitlines() for name in ("resident", "offloaded")]
        for file in ("samples.jsonl", "metrics.jsonl")
    )
    answers = [[json.loads(line)["text"] for line in one] for one in samples]
    assert answers[0] == answers[1] != []
    heldout = [re.findall(r'"eval_mean_nll": ([\d.]+)', "".join(one)) for one in lines]
    assert heldout[0] == heldout[1] != []
    said = json.loads((tmp_path / "offloaded" / "run.json").read_text())["decisions"]
    assert any("page-locked memory of the host" in one["reason"] for one in said)


OBJECTIVES = {
    "dpo": ("objective.method=dpo",),
    "dpo against its start": ("objective.method=dpo", "objective.reference=start"),
    "grpo": (
        "objective.method=grpo",
        "objective.num_generations=2",
        "objective.max_new_tokens=4",
        "objective.rewards={regex: 1.0}",
        "objective.reward_pattern='[aeiou]'",
    ),
}


@pytest.mark.campaign
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_n15_runs_that_compare_or_draw_answers_are_those_with_resident_weights(objective, tmp_path, monkeypatch):
    """Their forward passes without gradients, without the adapter and token by token go through the same stream."""
    monkeypatch.setenv("LLMTUNE_CACHE_DIR", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    made = [{"prompt": f"what is {n}?", "chosen": f"{n} it is", "rejected": f"no {n * 7}"} for n in range(8)]
    kept = ("prompt",) if objective == "grpo" else ("prompt", "chosen", "rejected")
    rows.write_text("".join(json.dumps({name: row[name] for name in kept}) + "\n" for row in made))
    words = ["train", "-c", "test", "model.name=custom-nano", f"data.train={rows}", f"run.output_dir={tmp_path}"]
    words += ["adapter.method=lora", "adapter.r=4", "model.gradient_checkpointing=true", "training.max_steps=3"]
    words += ["data.test_size=2", "evaluation.prompts=[]", *OBJECTIVES[objective]]
    with numbers.machine():
        for name, more in (("resident", ()), ("offloaded", ("model.offload_weights=true",))):
            assert run([*words, *more, f"run.name={name}"]) == 0
    adapters, lines = zip(
        *(
            (
                (tmp_path / name / "checkpoints" / "final" / "adapter_model.safetensors").read_bytes(),
                re.findall(r'"(?:eval|train)_loss": ([-\d.e]+)', (tmp_path / name / "metrics.jsonl").read_text()),
            )
            for name in ("resident", "offloaded")
        ),
        strict=True,
    )
    assert adapters[0] == adapters[1]
    assert lines[0] == lines[1]
    assert len(lines[0]) >= 3
