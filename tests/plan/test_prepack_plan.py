"""`model.weights_prepack`: frozen weights are laid out beforehand where there is room, and the plan counts them (Q7)."""

import pytest
import torch

from llmtune.errors import ConfigError
from llmtune.kernels import weight_prepack
from llmtune.plan import resolve_auto
from llmtune.plan.activation_trace import MicroBatchShape, Peaks
from llmtune.plan.hardware import Target
from llmtune.plan.memory import plan_memory
from llmtune.plan.meta_model import count_sizes
from llmtune.plan.suggestions import suggest
from llmtune.plan.summary import make_plan, plan_lines
from llmtune.training.calibration import steps_from_the_start
from plan_helpers import ROOMY, assembled_like
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import LORA

BF16 = (*LORA[:2], "training.precision=bf16")
KEPT, LEFT = "model.weights_prepack=true", "model.weights_prepack=false"

needs_bf16 = pytest.mark.skipif(not weight_prepack.can_prepack(), reason="this CPU does not multiply bf16 natively")


@pytest.fixture(autouse=True)
def _native_bf16(monkeypatch):
    """Plans are about this choice, not about the machine under the tests."""
    monkeypatch.setattr(weight_prepack, "can_prepack", lambda: True)


def chosen_by(forecaster):
    prepared, decisions = resolve_auto.resolve(forecaster)
    return prepared.config.model.weights_prepack, [one for one in decisions if one.key == "model.weights_prepack"]


def test_q7_the_layouts_are_counted_to_the_byte_and_on_top_of_all_else(forecaster_of):
    forecaster = forecaster_of(*BF16, KEPT)
    model = assembled_like(forecaster_of(*BF16, LEFT)).model.get_base_model()  # any CPU can build this one
    linear = [
        one for name, one in model.named_parameters() if one.dim() == 2 and "lora_" not in name and "embed" not in name
    ]
    head = model.get_output_embeddings().weight
    assert len(linear) == 14
    assert head is model.get_input_embeddings().weight
    held = 2 * 2 * sum(one.numel() for one in [*linear, head])
    memory, without = forecaster.memory(), forecaster.memory(resolve_auto.with_prepack(forecaster.config, False))
    assert memory.parts["prepacked"] == memory.sizes.prepacked_bytes == held
    assert without.parts == memory.parts | {"prepacked": 0}
    assert memory.moment == without.moment != "loading"
    assert f"  {'prepacked':<13}" in "\n".join(plan_lines(make_plan(forecaster)))


def test_counting_leaves_a_model_as_it_was(forecaster_of):
    forecaster = forecaster_of(*BF16)
    model = forecaster._build(forecaster.config)
    before = [type(module) for module in model.modules()]
    assert count_sizes(model, forecaster.config).prepacked_bytes
    assert [type(module) for module in model.modules()] == before


@needs_bf16
def test_what_is_planned_is_what_is_kept(forecaster_of):
    model = assembled_like(forecaster_of(*BF16, KEPT)).model
    kept = [module for module in model.modules() if "_prepacked" in vars(module)]
    planned = forecaster_of(*BF16, KEPT).memory().parts["prepacked"]
    assert planned == 2 * 2 * sum(module.weight.numel() for module in kept) > 0


def test_q7_nothing_is_laid_out_while_weights_are_read(forecaster_of):
    counted = forecaster_of(*BF16).sizes(forecaster_of(*BF16).config)
    small = Peaks(
        dict.fromkeys(("forward", "loss", "last block", "first block", "end"), 0), dict.fromkeys(("forward",), 0), 0
    )
    memory = plan_memory(
        counted, small, MicroBatchShape((1,), 1, "flat"), kind="cpu", optimizer="adamw", gradients="single",
        prepacked=True, thread_caches=True, process_bytes=0, file_bytes=1 << 40,
    )  # fmt: skip
    assert (memory.moment, memory.parts["prepacked"]) == ("loading", 0)


def test_auto_lays_out_where_the_plan_has_room_and_only_there(forecaster_of):
    forecaster = forecaster_of(*BF16)
    value, (decision,) = chosen_by(forecaster)
    assert (value, decision.value) == (True, True)
    assert "planned" in decision.reason
    with_them, without = (
        forecaster.memory(resolve_auto.with_prepack(forecaster.config, one)).peak_bytes for one in (True, False)
    )
    assert without < with_them
    tight = forecaster_of(*BF16, target=Target("a tight machine", "cpu", int((with_them + without) / 2 / 0.9)))
    value, (decision,) = chosen_by(tight)
    assert (value, decision.value) == (False, False)


def test_auto_takes_no_memory_from_a_run_that_recomputes_to_save_it(forecaster_of):
    recomputed = (*BF16, "model.gradient_checkpointing=true")
    assert chosen_by(forecaster_of(*recomputed)) == (False, [])
    assert chosen_by(forecaster_of(*recomputed, KEPT)) == (True, [])


def test_auto_never_makes_a_run_recompute_or_its_micro_batches_smaller(forecaster_of):
    """What fits without the layouts is chosen first; they take what is left."""
    auto = (
        *BF16,
        "training.batch_size=auto",
        "training.gradient_accumulation_steps=1",
        "model.gradient_checkpointing=auto",
    )
    forecaster = forecaster_of(*auto)
    whole = resolve_auto.with_micro_batch(resolve_auto.resolve(forecaster)[0].config, (8, 1), False)
    needed = forecaster.memory(resolve_auto.with_prepack(whole, False)).peak_bytes
    tight = forecaster_of(*auto, target=Target("a tight machine", "cpu", int((needed + 1000) / 0.9)))
    config = resolve_auto.resolve(tight)[0].config
    assert (config.training.batch_size, config.model.gradient_checkpointing, config.model.weights_prepack) == (
        8,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("overrides", "target"),
    [
        ((*LORA[:2], "training.precision=fp32"), ROOMY),
        ((*LORA, "training.precision=bf16"), ROOMY),
        (("training.precision=bf16",), ROOMY),
        ((*BF16, "training.engine=plain"), ROOMY),
        (BF16, Target("a GPU", "cuda", 1 << 40)),
    ],
)
def test_where_it_cannot_be_auto_says_nothing_and_asking_is_refused(forecaster_of, overrides, target):
    assert chosen_by(forecaster_of(*overrides, target=target)) == (False, [])
    if "adapter.method=lora" in overrides:
        with pytest.raises(ConfigError, match="frozen weights cannot be laid out beforehand"):
            resolve_auto.resolve(forecaster_of(*overrides, KEPT, target=target))


def test_a_model_without_a_plan_keeps_its_weights_as_they_are(forecaster_of, monkeypatch):
    forecaster = forecaster_of(*BF16)
    monkeypatch.setattr(
        forecaster, "memory", lambda _config: (_ for _ in ()).throw(NotImplementedError("no stand-ins"))
    )
    assert chosen_by(forecaster) == (False, [])


def test_it_is_the_first_thing_to_give_up_where_memory_is_short(forecaster_of):
    needed = forecaster_of(*BF16, KEPT).memory().peak_bytes
    found = suggest(forecaster_of(*BF16, KEPT, target=Target("a small machine", "cpu", needed // 2)))
    assert found[0].overrides == LEFT
    assert not any(
        LEFT in one.overrides
        for one in suggest(forecaster_of(*BF16, LEFT, target=Target("a small machine", "cpu", 1 << 20)))
    )


def test_a_run_that_went_on_keeps_the_choice_and_one_from_before_there_was_any_keeps_plain_weights(forecaster_of):
    prepared = forecaster_of(*BF16).prepared
    training = {"batch_size": 8, "gradient_accumulation_steps": 1}
    model = {"gradient_checkpointing": False}

    def kept(more, of=prepared):
        return resolve_auto.keep_resolved(
            of, {"training": training, "model": model | more}
        ).config.model.weights_prepack

    assert (kept({"weights_prepack": True}), kept({"weights_prepack": False}), kept({})) == (True, False, False)
    asked = forecaster_of(*BF16, LEFT, "model.gradient_checkpointing=auto").prepared
    assert kept({"weights_prepack": True}, of=asked) is False


class OtherRank:
    """A process that is not the first: it hears what the first one chose."""

    is_main = False

    def sum(self, *values):
        assert values == (0.0, 0.0, 0.0, 0.0)
        return (4.0, 2.0, 0.0, 0.0)


def test_several_processes_do_as_the_first_one_does(forecaster_of):
    forecaster = forecaster_of(*BF16)
    assert chosen_by(forecaster)[0] is True
    config = resolve_auto.resolve_on_all_ranks(forecaster, OtherRank()).config
    assert (config.training.batch_size, config.model.weights_prepack) == (4, False)


@needs_bf16
def test_a_run_says_what_it_kept_and_trains_the_same_bits(forecaster_of):
    """N15 through the whole of an assembled run: losses of every step are equal with and without."""
    losses = {}
    for wanted in (KEPT, LEFT):
        setup = assembled_like(forecaster_of(*BF16, wanted))
        said = [str(one) for one in setup.decisions if one.key == "model.weights_prepack"]
        assert len(said) == (wanted == KEPT)
        steps = list(steps_from_the_start(setup))
        weights = torch.cat([one.detach().flatten() for one in setup.parameters.values()])
        losses[wanted] = [one.train_mean_nll for one in steps], weights
    assert losses[KEPT][0] == losses[LEFT][0]
    assert torch.equal(losses[KEPT][1], losses[LEFT][1])
