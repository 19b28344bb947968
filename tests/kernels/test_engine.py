"""N15 and N5 for the whole engine: the plain path's loss and gradients on every architecture, and documents that cannot
see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from gradient_helpers import difference, loss_and_gradients
from llmtune.config.schema import Config, ModelConfig, TrainingConfig
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.forward import Engine, build_engine, group_tokens
from llmtune.engine.objective import plain_nll_sum
from llmtune.errors import ConfigError
from llmtune.kernels import attention

CPU = torch.device("cpu")
NAMES = ("llama", "llama-tied", "mistral", "qwen3", "gemma2", "gemma3", "granite", "cohere", "phi", "phi3", "gpt2")
Build = Callable[..., Any]


def engine_of(model: Any, precision: Any, config: Config | None = None) -> Engine:
    return build_engine(model, config=config or Config(), device=CPU, precision=precision)


@pytest.mark.parametrize("name", NAMES)
def test_the_flat_engine_repeats_the_plain_loss_and_gradients(
    name: str, build_model: Build, arithmetic: Build, flat: MicroBatch, padded: MicroBatch
) -> None:
    """N15: loss 1e-6, gradients 1e-5 relative, float32, against the library's own forward on padded rows."""
    plain, model = build_model(name), build_model(name)
    engine = engine_of(model, arithmetic())
    assert engine.layout == "flat", engine.decisions
    expected, expected_gradients = loss_and_gradients(plain, lambda: plain_nll_sum(plain, padded))
    found, found_gradients = loss_and_gradients(model, lambda: engine.nll_sum(flat))
    assert found == pytest.approx(expected, rel=1e-6)
    assert difference(found_gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_the_flat_engine_is_as_close_to_float32_as_the_plain_path(
    name: str, build_model: Build, arithmetic: Build, flat: MicroBatch, padded: MicroBatch
) -> None:
    """N15 in bf16: loss within 5e-3, gradients no further from float32 than 1.5 times the plain path's bf16."""
    exact, plain, model = build_model(name), build_model(name), build_model(name)
    half = arithmetic(bf16=True)
    engine = engine_of(model, half)
    assert engine.layout == "flat", engine.decisions
    truth, true_gradients = loss_and_gradients(exact, lambda: plain_nll_sum(exact, padded))
    with half.autocast():
        _, plain_gradients = loss_and_gradients(plain, lambda: plain_nll_sum(plain, padded))
        found, found_gradients = loss_and_gradients(model, lambda: engine.nll_sum(flat))
    assert found == pytest.approx(truth, rel=5e-3)
    assert difference(found_gradients, true_gradients) < 1.5 * difference(plain_gradients, true_gradients)


@pytest.mark.parametrize("name", NAMES)
def test_a_document_does_not_change_its_neighbours_loss_or_logits_by_one_bit(
    name: str, build_model: Build, arithmetic: Build, make_examples: Callable[..., list[Example]]
) -> None:
    """N5: the second document is replaced by another of the same length; every hidden state of the others is
    bit-identical.
    """
    model = build_model(name)
    engine_of(model, arithmetic())
    examples = make_examples((23, 31, 150))
    others = [examples[0], make_examples((23, 31, 150), seed=7)[1], examples[2]]
    states = []
    for documents in (examples, others):
        batch = make_micro_batch(documents, "flat", 0)
        assert batch.segments is not None
        mask = attention.segment_mask(batch.segments, 150, CPU)
        decoder = model.get_decoder()
        states.append(
            decoder(
                input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
        )
    assert torch.equal(states[0][:, :23], states[1][:, :23])
    assert torch.equal(states[0][:, 54:], states[1][:, 54:])
    assert not torch.equal(states[0][:, 23:54], states[1][:, 23:54])


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_changes_no_bit(
    name: str, layout: Any, build_model: Build, arithmetic: Build, make_examples: Callable[..., list[Example]]
) -> None:
    model, stored = build_model(name), build_model(name)
    training = TrainingConfig(engine="auto" if layout == "flat" else "plain")
    batch = make_micro_batch(make_examples(), layout, 0)
    engine = engine_of(model, arithmetic(), Config(model=ModelConfig(gradient_checkpointing=True), training=training))
    found = loss_and_gradients(model, lambda: engine.nll_sum(batch))
    expected = loss_and_gradients(
        stored, lambda: engine_of(stored, arithmetic(), Config(training=training)).nll_sum(batch)
    )
    assert [
        module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")
    ].count(True) >= 2
    assert found[0] == expected[0]
    assert difference(found[1], expected[1]) == 0


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_compiled_blocks_repeat_the_plain_loss_and_gradients(
    layout: Any, build_model: Build, arithmetic: Build, make_examples: Callable[..., list[Example]], padded: MicroBatch
) -> None:
    """N15 for compiled blocks, over two lengths; needs a C++ compiler on a CPU."""
    plain, model = build_model("llama"), build_model("llama")
    training = TrainingConfig(compile=True, engine="auto" if layout == "flat" else "plain")
    engine = engine_of(model, arithmetic(), Config(training=training))
    assert engine.layout == layout
    for lengths in ((23, 5, 40), (61, 9)):
        examples = make_examples(lengths)
        expected = loss_and_gradients(plain, lambda: plain_nll_sum(plain, make_micro_batch(examples, "padded", 0)))  # noqa: B023
        found = loss_and_gradients(model, lambda: engine.nll_sum(make_micro_batch(examples, layout, 0)))  # noqa: B023
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert difference(found[1], expected[1]) < 1e-5


def test_a_micro_batch_without_trained_tokens_adds_nothing(
    build_model: Build, arithmetic: Build, make_examples: Callable[..., list[Example]]
) -> None:
    """N3: 0 and zero gradients, never NaN."""
    model = build_model("llama")
    engine = engine_of(model, arithmetic())
    silent = [replace(example, weights=np.zeros_like(example.weights)) for example in make_examples((4, 9))]
    loss, gradients = loss_and_gradients(model, lambda: engine.nll_sum(make_micro_batch(silent, "flat", 0)))
    assert loss == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


def test_generation_is_the_same_under_the_flat_engine(build_model: Build, arithmetic: Build) -> None:
    """Ordinary calls keep the library's attention: padded prompts and a cache work as before."""
    model = build_model("mistral").eval()
    prompts = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    options: dict[str, Any] = {
        "attention_mask": (prompts > 0).long(),
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 0,
    }
    before = model.generate(prompts, **options)
    engine_of(model, arithmetic())
    assert torch.equal(model.generate(prompts, **options), before)


def test_the_plain_engine_is_taken_when_asked_for(build_model: Build, arithmetic: Build, padded: MicroBatch) -> None:
    model = build_model("llama")
    engine = engine_of(model, arithmetic(), Config(training=TrainingConfig(engine="plain")))
    assert engine.layout == "padded"
    assert str(engine.decisions[0]) == "training.engine = plain: asked for by training.engine"
    assert torch.equal(engine.nll_sum(padded), plain_nll_sum(model, padded))


def test_a_model_that_bends_its_logits_in_an_unknown_way_is_found_out(build_model: Build, arithmetic: Build) -> None:
    """The probe is the mutant test of the engine: a rule of the head that the fast path does not know costs it the job."""  # noqa: E501
    model = build_model("llama")
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 1.5)
    engine = engine_of(model, arithmetic())
    assert engine.layout == "padded"
    assert "its loss on a probe is" in engine.decisions[0].reason
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_lets_documents_see_each_other_is_found_out(
    build_model: Build, arithmetic: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant of the backend with one segment for the whole row fails the probe."""

    def leaking(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: attention.Segments,
        params: attention.AttentionParams,
    ) -> torch.Tensor:
        one_document = attention.Segments(segments.cu_seqlens[[0, -1]], segments.max_seqlen)
        return attention._eager(query, key, value, one_document, params)

    monkeypatch.setitem(attention.BACKENDS, "tiles", leaking)
    monkeypatch.setitem(attention.BACKENDS, "sdpa", leaking)
    for bf16 in (False, True):
        engine = engine_of(build_model("llama"), arithmetic(bf16=bf16))
        assert engine.layout == "padded"
        assert engine.decisions[0].reason.count("probe") + engine.decisions[0].reason.count("neighbour changed") == 2


@pytest.mark.parametrize("asked", ["flash", "flex"])
def test_attention_that_needs_a_gpu_is_refused_on_a_cpu(asked: Any, build_model: Build, arithmetic: Build) -> None:
    with pytest.raises(ConfigError, match=f"`{asked}`"):
        engine_of(build_model("llama"), arithmetic(), Config(model=ModelConfig(attention=asked)))


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_the_attention_asked_for_is_the_one_that_runs(asked: Any, build_model: Build, arithmetic: Build) -> None:
    model = build_model("llama")
    engine = engine_of(model, arithmetic(), Config(model=ModelConfig(attention=asked)))
    assert engine.layout == "flat"
    assert model.config._attn_implementation == attention.IMPLEMENTATION_NAMES.get(asked, f"llmtune_segments_{asked}")


def test_building_the_engine_leaves_modes_and_random_numbers_alone(build_model: Build, arithmetic: Build) -> None:
    """N12: the probe draws nothing and leaves every module's mode as it was."""
    model = build_model("llama")
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    engine_of(model, arithmetic())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_narrow_model_takes_larger_micro_batches_on_a_cpu(build_model: Build, arithmetic: Build) -> None:
    """The engine cuts by the model's width as the plan does, which sees nothing but the config."""
    narrow, wide = (LlamaConfig(hidden_size=width, num_attention_heads=1) for width in (256, 258))
    assert group_tokens(narrow) > group_tokens(wide)
    model = build_model("llama")
    assert model.config.hidden_size <= narrow.hidden_size
    assert engine_of(model, arithmetic()).max_group_tokens == group_tokens(narrow)
