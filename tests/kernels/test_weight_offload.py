"""N15 for frozen weights that wait in host memory: the bits of a model that has all of them, two blocks at a time."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from gradient_helpers import adapted, loss_and_gradients
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.engine.forward import build_engine
from llmtune.errors import ModelError
from llmtune.kernels import activation_offload
from llmtune.kernels.patch_model import undo_patches
from llmtune.kernels.weight_offload import WeightStream, offload_weights
from llmtune.models.load import _load_pretrained
from llmtune.models.parameters import count_parameters
from llmtune.models.quantization import disable_cpu_repacking, quantization_config

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"vocab_size": 97, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
SHAPE |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=16),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=3),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=5, n_head=4, bos_token_id=1, eos_token_id=2),
}


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 12)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama in NF4, as loading leaves it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(folder)
    options = {"dtype": torch.float32, "quantization_config": quantization_config("4bit", torch.float32)}
    model = _load_pretrained(folder, CPU, "auto", options, copy.deepcopy(CONFIGS["llama"]), ())
    disable_cpu_repacking(model)
    return model


def a_model(name: str, four_bit: Any, adapter: AdapterConfig) -> Any:
    if name == "4bit":
        return adapted(copy.deepcopy(four_bit), adapter)
    torch.manual_seed(0)
    return adapted(transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).train(), adapter)


ADAPTERS = {
    "all": AdapterConfig(method="lora", r=4),
    # Frozen layers without an adapter, and an adapter that peft itself computes.
    "some": AdapterConfig(method="lora", r=4, dropout=0.1, target_modules=("q_proj", "v_proj")),
}


def everything(
    model: Any, examples: Callable[..., Any], arithmetic: Any, *, recompute: bool | str = True, engine: str = "auto"
) -> list[Any]:
    """Losses and gradients of two micro-batches, a loss and gradients in evaluation, and an answer."""
    config = Config(model=ModelConfig(gradient_checkpointing=recompute))
    built = build_engine(model, config=config, device=CPU, precision=arithmetic)
    found: list[Any] = []

    def loss(lengths: tuple[int, ...] = (23, 5, 40)) -> torch.Tensor:
        with arithmetic.autocast():
            return built.nll_sum(make_micro_batch(examples(lengths), built.layout, 0))

    torch.manual_seed(5)
    found += [loss_and_gradients(model.train(), loss) for _ in range(2)]
    with torch.no_grad():
        found.append(float(loss((61, 9))))
    model.eval()
    found.append(loss_and_gradients(model, loss))
    with torch.no_grad():
        ids = model.generate(input_ids=torch.arange(3, 12)[None], max_new_tokens=5, do_sample=False)
    found.append(ids.tolist())
    found.append(loss_and_gradients(model.train(), loss))
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1] | other[1])
    return bool(one == other)


@pytest.mark.parametrize(
    ("name", "adapter", "bf16", "recompute"),
    [
        pytest.param("llama", "all", False, True, marks=pytest.mark.campaign),
        ("llama", "all", True, "offload"),
        ("llama", "some", False, "offload"),
        ("4bit", "all", False, True),
        ("4bit", "some", True, True),
        pytest.param("gemma3", "all", False, True, marks=pytest.mark.campaign),
        ("mixtral", "all", False, True),
        ("gpt2", "all", False, True),
    ],
)
def test_weights_that_wait_on_the_host_change_no_bit(
    name: str,
    adapter: str,
    bf16: bool,
    recompute: Any,
    four_bit: Any,
    arithmetic: Any,
    make_examples: Callable[..., Any],
) -> None:
    """N15, in training, evaluation, with gradients outside of training (the probe's) and in a generation."""
    chosen = ADAPTERS[adapter] if name != "gpt2" else AdapterConfig(method="lora", r=4)
    results = []
    for offload in (False, True):
        model = a_model(name, four_bit, chosen)
        parameters = count_parameters(model)
        if offload:
            stream = WeightStream(model, CPU)
            assert stream.num_bytes > 0
        results.append(everything(model, make_examples, arithmetic(bf16=bf16), recompute=recompute))
        assert count_parameters(model) == parameters
    assert all(same(one, other) for one, other in zip(*results, strict=True))


def test_at_most_two_blocks_are_on_the_device(
    four_bit: Any, make_examples: Callable[..., Any], arithmetic: Any
) -> None:
    """The next one is there before it is asked for, and the one before it is gone."""
    model = a_model("llama", four_bit, ADAPTERS["all"])
    stream = WeightStream(model, CPU)
    pieces: list[weakref.ref[Any]] = []
    fetch, alive, order = stream._store.fetch, [], []

    def noting(stored: Any) -> None:
        fetch(stored)
        pieces.append(weakref.ref(stored.on_device.untyped_storage()))
        alive.append(sum(piece() is not None for piece in pieces))
        order.append([one.stored for one in stream._blocks].index(stored))

    stream._store.fetch = noting  # type: ignore[method-assign]
    config = Config(model=ModelConfig(gradient_checkpointing=True))
    engine = build_engine(model, config=config, device=CPU, precision=arithmetic())
    for _ in range(2):
        order.clear()
        engine.nll_sum(make_micro_batch(make_examples((23, 5)), engine.layout, 0)).backward()
    assert order == [2, 3, 4, 3, 2, 1, 0, 1]
    order.clear()
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            engine.nll_sum(make_micro_batch(make_examples((23, 5)), engine.layout, 0))
    assert order == [2, 3, 4, 0, 1, 2, 3, 4, 0]
    # With gradients outside of training too, where the library's own layers would keep what they multiplied.
    undo_patches(model.get_base_model())
    model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits.sum().backward()
    assert max(alive) == 2


def test_a_weight_read_outside_of_its_block_s_turn_is_not_a_number(four_bit: Any) -> None:
    model = a_model("llama", four_bit, ADAPTERS["all"])
    WeightStream(model, CPU)
    weight = model.get_base_model().model.layers[3].mlp.up_proj.base_layer.weight
    assert weight.shape == (96, 64)
    assert math.isnan(float(weight.sum()))
    assert weight.untyped_storage().nbytes() == 4


def test_on_a_cpu_weights_stay_where_they_are_and_that_is_said(four_bit: Any) -> None:
    model = a_model("llama", four_bit, ADAPTERS["all"])
    told = offload_weights(model, CPU)
    assert "a CPU has no other memory" in told.reason
    assert bool(model.get_base_model().model.layers[3].mlp.up_proj.base_layer.weight.isfinite().all())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no blocks to bring one by one"):
        offload_weights(torch.nn.Linear(2, 2), torch.device("cuda"))
