"""Full tuning in bf16 beside float32 masters: what a GPU computes and holds."""

import pytest
import torch
import transformers
from pretend import numbers

from conftest import FAMILIES
from llmtune.config.schema import Config, TrainingConfig
from llmtune.engine.masters import MasterOptimizer, make_masters
from llmtune.engine.optim import build_optimizer
from llmtune.plan.activation_trace import MicroBatchShape, Peaks
from llmtune.plan.memory import PARTS, division_of, plan_memory
from llmtune.plan.meta_model import count_sizes


@pytest.mark.parametrize(
    ("family", "train_only"),
    [
        ("llama", ()),
        ("llama", (r"model\.layers\.1\..*", r"model\.norm\.weight")),
        pytest.param("gpt2", (), marks=pytest.mark.campaign),
    ],
)
def test_n15_losses_and_norms_with_masters_are_those_of_the_cpu(train_on, family, train_only):
    options = {"lora": False, "masters": True, "train_only": train_only, "steps": 2}
    gpu, cpu = (train_on(card, family, **options) for card in ("rtx4090", "cpu"))
    assert len(gpu.weights) == len(cpu.weights) < (99 if not train_only else 12)
    assert gpu.decided["model.attention"] == "varlen"
    assert {one.dtype for one in gpu.weights} == {torch.float32}
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert gpu.norms == pytest.approx(cpu.norms, rel=2e-2)
    assert sum(gpu.waits.values()) == 2, "one a step"
    assert not gpu.pageable


def test_the_card_holds_what_is_planned():
    """Weights, masters, moments and gradients, at the update."""
    config = Config(training=TrainingConfig(precision="bf16", master_weights=True))
    with torch.device("meta"):
        sizes = count_sizes(transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]()), config)
    none = Peaks(dict.fromkeys(("forward", "loss"), 0), dict.fromkeys(("forward", "loss"), 0), 0)
    plan = plan_memory(
        sizes, none, MicroBatchShape((8,), 7, "flat"), kind="cuda", optimizer="adamw", gradients="single",
        thread_caches=False, process_bytes=0, file_bytes=0, division=division_of(config, 1),
    )  # fmt: skip
    assert plan.moment == "update"
    planned = sum(plan.parts[part] for part in PARTS if part != "process")
    with numbers.machine() as device:
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).to("cuda")
        masters = make_masters(model)
        rule = {"learning_rate": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
        made, _ = build_optimizer("adamw", masters, device=torch.device("cuda", 0), **rule)
        optimizer = MasterOptimizer(made, model, masters)
        for master in masters.values():
            master.grad = torch.ones_like(master)
        optimizer.step()
        held = device.now
    # Each tensor is rounded up to 512 bytes: weights, masters, gradients, two moments and a counter of steps.
    assert 0 <= held - planned <= 6 * 512 * len(masters) + 4096
