"""Q7: plans of weights that move in the backward pass (`training.step_in_backward`): parts, suggestions, windows."""

from llmtune.engine.update import whole_window_is_smaller
from llmtune.plan import suggestions as suggestions_module
from llmtune.plan.hardware import Target
from llmtune.plan.suggestions import suggest
from plan_helpers import assembled_like
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import LORA

EARLY = ("training.step_in_backward=true", "training.max_grad_norm=null")
ONE_MICRO_BATCH = ("training.batch_size=4", "training.gradient_accumulation_steps=1")


def test_q7_gradients_that_go_at_once_are_planned_as_the_largest_of_them(forecaster_of):
    """The update then holds one gradient instead of all, and so does the end of the backward pass; summed gradients
    exist as ever.
    """
    plain, early = forecaster_of(*ONE_MICRO_BATCH), forecaster_of(*ONE_MICRO_BATCH, *EARLY)
    counted = early.sizes(early.config)
    assert counted.largest_gradient_bytes == 400 * 32 * 4  # the embeddings
    assert counted.largest_gradient_bytes < counted.gradient_bytes
    batch, several = early.largest_micro_batch(early.config)
    assert not several
    single, dropped = (early.peaks(early.config, batch, life).phases for life in ("single", "dropped"))
    assert dropped["forward"] == single["forward"]
    assert single["end"] - dropped["end"] > 0.3 * counted.gradient_bytes
    assert early.memory().parts["gradients"] <= counted.largest_gradient_bytes
    summed = forecaster_of(*EARLY, "training.batch_size=2", "training.gradient_accumulation_steps=2")
    assert summed.memory().parts["gradients"] >= counted.gradient_bytes
    assert plain.memory().peak_bytes >= early.memory().peak_bytes


def test_moving_weights_in_the_backward_pass_is_proposed_where_it_helps_and_is_allowed(forecaster_of):
    tiny = Target("a tiny GPU", "cuda", 1 << 20)
    short = (
        "data.max_length=24",
        "data.overlong=truncate_right",
        "training.batch_size=1",
        "training.gradient_accumulation_steps=1",
    )
    few_tokens = (*short, "model.gradient_checkpointing=true")
    overrides = "training.step_in_backward=true training.max_grad_norm=null"
    suggestions = {
        suggestion.overrides: suggestion.peak_bytes for suggestion in suggest(forecaster_of(*few_tokens, target=tiny))
    }
    changed = forecaster_of(*few_tokens, *EARLY, target=tiny).memory().peak_bytes
    assert suggestions[overrides] == changed < forecaster_of(*few_tokens, target=tiny).memory().peak_bytes

    def proposed(*more):
        forecaster = forecaster_of(*few_tokens, *more, target=tiny)
        change = suggestions_module._step_in_backward(forecaster.config, forecaster)
        return None if change is None else change[0]

    assert proposed() == overrides
    assert proposed("training.max_grad_norm=null") == "training.step_in_backward=true"
    for refused in (LORA[:2], EARLY, ("training.precision=fp16",)):
        assert proposed(*refused) is None


def test_windows_stay_whole_where_that_takes_less_and_the_plan_knows(forecaster_of, monkeypatch):
    """On a CPU windows are cut between documents; with recomputed blocks and few tokens that would only keep all
    gradients alive.
    """
    monkeypatch.setattr("llmtune.plan.forecast.group_tokens", lambda _shape: 40)
    monkeypatch.setattr("llmtune.engine.forward.group_tokens", lambda _shape: 40)
    chosen = {}
    for recompute in ("false", "true"):
        forecaster = forecaster_of(*ONE_MICRO_BATCH, *EARLY, f"model.gradient_checkpointing={recompute}")
        setup = assembled_like(forecaster)
        several = any(len(window.micro_batches) > 1 for window in setup.batches.windows())
        assert forecaster.largest_micro_batch(forecaster.config)[1] == several
        chosen[recompute] = (
            next(decision.value for decision in setup.decisions if decision.key == "training.step_in_backward.windows"),
            several,
        )
    assert chosen == {"false": ("cut", True), "true": ("whole", False)}


def test_a_window_is_whole_up_to_what_its_blocks_keep(forecaster_of):
    """2 blocks of 32 floats a token, half as much again for the allocator: 384 bytes; without recomputing never."""
    forecaster = forecaster_of(*ONE_MICRO_BATCH, *EARLY, "model.gradient_checkpointing=true")
    shape = forecaster.shape.config
    assert whole_window_is_smaller(forecaster.config, window_tokens=100, shape=shape, gradient_bytes=38_400)
    assert not whole_window_is_smaller(forecaster.config, window_tokens=101, shape=shape, gradient_bytes=38_400)
    assert not whole_window_is_smaller(
        forecaster_of(*ONE_MICRO_BATCH, *EARLY).config, window_tokens=1, shape=shape, gradient_bytes=1 << 40
    )
