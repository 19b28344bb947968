"""N15 for norms and feed-forward modules in tiles: the plain path's numbers, and no product of a whole row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradient_helpers import adapted, difference, loss_and_gradients
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.forward import Engine, build_engine
from llmtune.engine.objective import plain_nll_sum
from llmtune.kernels import tiled_mlp
from llmtune.kernels.patch_model import patch_model
from llmtune.kernels.tiled_mlp import tile_decoder, tiled_forward
from llmtune.models.quantization import disable_cpu_repacking, quantization_config

Build = Callable[..., Any]
CPU = torch.device("cpu")
TILE = 48
"""Tokens of a tile here, the models' width; the rows of `flat` have 219."""
ADAPTERS = {
    "full": None,
    "lora": AdapterConfig(method="lora", r=4, alpha=8),
    "dora": AdapterConfig(method="lora", r=4, dora=True),
}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
SHAPE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, **_HEADS}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_mlp, "LEAST_TOKENS", TILE)


def engine_of(model: Any, precision: Any, recompute: Any = "offload") -> Engine:
    return build_engine(
        model, config=Config(model=ModelConfig(gradient_checkpointing=recompute)), device=CPU, precision=precision
    )


def said(engine: Engine) -> str:
    return next(str(one) for one in engine.decisions if one.key == "training.tiles")


@pytest.mark.parametrize("lengths", [(23, 5, 1, 40, 150), (20, 7)], ids=["longer", "shorter"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
def test_tiles_repeat_the_plain_loss_and_gradients(
    name: str,
    adapter: str,
    lengths: tuple[int, ...],
    build_model: Build,
    arithmetic: Build,
    make_examples: Callable[..., list[Example]],
) -> None:
    """N15: loss 1e-6, gradients 1e-5 relative, float32, for rows longer and shorter than a tile."""
    plain, model = (adapted(build_model(name), ADAPTERS[adapter]) for _ in range(2))
    engine = engine_of(model, arithmetic())
    assert f"training.tiles = {TILE} tokens" in said(engine)
    assert "2 feed-forward modules" in said(engine)
    examples = make_examples(lengths)
    expected = loss_and_gradients(plain, lambda: plain_nll_sum(plain, make_micro_batch(examples, "padded", 0)))
    found = loss_and_gradients(
        model, lambda engine=engine: engine.nll_sum(make_micro_batch(examples, engine.layout, 0))
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found[1], expected[1]) < 1e-5


def test_qwen2_and_dora_run_in_tiles_too(arithmetic: Build, flat: MicroBatch, padded: MicroBatch) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return adapted(
            transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**SHAPE)).train(), ADAPTERS["dora"]
        )

    plain, model = build(), build()
    engine = engine_of(model, arithmetic())
    assert "2 feed-forward modules" in said(engine)
    expected = loss_and_gradients(plain, lambda: plain_nll_sum(plain, padded))
    found = loss_and_gradients(model, lambda engine=engine: engine.nll_sum(flat))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_in_bf16_tiles_are_as_close_to_float32_as_whole_rows(
    name: str, adapter: str, build_model: Build, arithmetic: Build, flat: MicroBatch
) -> None:
    """N15 in bf16: loss within 5e-3, gradients no further from float32 than 1.2 times those of `true`."""
    exact, whole, model = (adapted(build_model(name), ADAPTERS[adapter]) for _ in range(3))
    half = arithmetic(bf16=True)
    engines = engine_of(exact, arithmetic(), False), engine_of(whole, half, True), engine_of(model, half)
    truth = loss_and_gradients(exact, lambda: engines[0].nll_sum(flat))

    def in_half(engine: Engine) -> torch.Tensor:
        with half.autocast():
            return engine.nll_sum(flat)

    expected = loss_and_gradients(whole, lambda: in_half(engines[1]))
    found = loss_and_gradients(model, lambda: in_half(engines[2]))
    assert found[0] == pytest.approx(truth[0], rel=5e-3)
    assert difference(found[1], truth[1]) < 1.2 * difference(expected[1], truth[1])


def test_a_tile_is_computed_again_in_the_type_it_was_computed_in() -> None:
    """The backward pass runs outside autocast; a tile's does not."""
    layer, seen = nn.Linear(8, 8), []

    def run(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = layer(x)
        seen.append(output.dtype)
        return output

    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = tiled_forward(run, torch.randn(1, 20, 8), 10, list(layer.parameters())).float().sum()
    total.backward()
    assert seen == [torch.bfloat16] * 4
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_tiles_repeat_a_model_held_in_four_bit(
    arithmetic: Build, make_examples: Callable[..., list[Example]], tmp_path: Any
) -> None:
    """N15 for QLoRA in float32 arithmetic."""
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path)
    models = []
    for _ in range(2):
        options = {
            "quantization_config": quantization_config("4bit", torch.float32),
            "dtype": torch.float32,
            "device_map": {"": "cpu"},
        }
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        disable_cpu_repacking(base)
        models.append(adapted(base, ADAPTERS["lora"]))
    plain, model = models
    engine = engine_of(model, arithmetic())
    assert "2 feed-forward modules" in said(engine)
    examples = make_examples()
    expected = loss_and_gradients(plain, lambda: plain_nll_sum(plain, make_micro_batch(examples, "padded", 0)))
    found = loss_and_gradients(model, lambda engine=engine: engine.nll_sum(make_micro_batch(examples, "flat", 0)))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found[1], expected[1]) < 1e-5


# ---- dropout ----


class Residual(nn.Module):
    """A feed-forward module with dropout between its layers and after them, as GPT-2 has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.3), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.down(self.drop(self.act(self.up(x)))))


def gradients_of(module: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the weights, and what the generator gives next."""
    torch.manual_seed(3)
    x = torch.randn(1, 20, 8).requires_grad_()
    module.zero_grad()
    output = run(x)
    (output * torch.arange(8.0)).sum().backward()
    assert x.grad is not None
    return [
        output.detach(),
        x.grad,
        *(p.grad.clone() for p in module.parameters() if p.grad is not None),
        torch.rand(1),
    ]


def test_n15_dropout_in_a_tile_is_the_same_when_the_tile_is_computed_again() -> None:
    """The reference runs tile after tile and keeps everything: the same draws, the same sums; and the generator goes on
    as if once.
    """
    module = Residual().train()
    weights = list(module.parameters())
    expected = gradients_of(
        module, lambda x: torch.cat([module(x[:, start : start + 5]) for start in range(0, 20, 5)], dim=1)
    )
    for _ in range(2):
        found = gradients_of(module, lambda x: tiled_forward(module, x, 5, weights))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[-1], expected[-1])
        assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_p2_with_dropout_the_same_seed_gives_the_same_bits(
    build_model: Build, arithmetic: Build, flat: MicroBatch
) -> None:
    """Longer rows draw in another order than `true` does, but always in the same one; a row no longer than a tile draws
    as `true` does.
    """
    config = AdapterConfig(method="lora", r=4, dropout=0.2)

    def run(recompute: Any, batch: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
        model = adapted(build_model("llama"), config)
        engine = engine_of(model, arithmetic(), recompute)
        torch.manual_seed(11)
        return loss_and_gradients(model, lambda: engine.nll_sum(batch))

    one, other, recomputed = run("offload", flat), run("offload", flat), run(True, flat)
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert one[0] != recomputed[0]


def test_rows_no_longer_than_a_tile_are_those_of_true_bit_for_bit(
    build_model: Build, arithmetic: Build, make_examples: Callable[..., list[Example]]
) -> None:
    results = []
    for recompute in ("offload", True):
        model = adapted(build_model("llama"), AdapterConfig(method="lora", r=4, dropout=0.2))
        engine = engine_of(model, arithmetic(), recompute)
        torch.manual_seed(11)
        results.append(
            loss_and_gradients(
                model, lambda engine=engine: engine.nll_sum(make_micro_batch(make_examples((20, 9, 19)), "flat", 0))
            )
        )
    assert results[0][0] == results[1][0]
    assert difference(results[0][1], results[1][1]) == 0


# ---- memory and work ----


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor of a width that anything computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and one.dim() > 1 and one.shape[-1] == self.width:
                self.rows = max(self.rows, one.shape[:-1].numel())
        return result


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_nothing_as_wide_as_the_feed_forward_layer_exists_for_a_whole_row(
    adapter: str, build_model: Build, arithmetic: Build, flat: MicroBatch
) -> None:
    """Gate, up and product [T, 80] of 219 tokens are there with `true`; in tiles no more than a tile's 48."""
    rows = {}
    for recompute in (True, "offload"):
        model = adapted(build_model("llama"), ADAPTERS[adapter])
        engine = engine_of(model, arithmetic(), recompute)
        with _Largest(80) as largest:
            loss_and_gradients(model, lambda engine=engine: engine.nll_sum(flat))
        rows[recompute] = largest.rows
    assert rows[True] == 219
    assert rows["offload"] <= TILE


@pytest.mark.parametrize(("name", "passes"), [("llama", 2), ("gemma3", 3)])
def test_a_block_computed_again_ends_before_its_feed_forward_products(
    name: str, passes: int, build_model: Build, arithmetic: Build, flat: MicroBatch
) -> None:
    """Once forward, once again in tiles. (Gemma normalises what comes out, so there it is needed once more.)"""
    model = build_model(name)
    engine = engine_of(model, arithmetic())
    seen = []
    for block in model.get_decoder().layers:
        block.mlp.gate_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    loss_and_gradients(model, lambda engine=engine: engine.nll_sum(flat))
    assert sum(seen) == 2 * passes * 219
    assert max(seen) <= TILE


def test_evaluation_in_tiles_gives_the_same_loss(build_model: Build, arithmetic: Build, flat: MicroBatch) -> None:
    model, plain = build_model("llama").eval(), build_model("llama").eval()
    engine, other = engine_of(model, arithmetic()), engine_of(plain, arithmetic(), False)
    with torch.no_grad():
        assert float(engine.nll_sum(flat)) == pytest.approx(float(other.nll_sum(flat)), rel=1e-6)


def test_a_second_backward_pass_is_refused(build_model: Build) -> None:
    norm = nn.LayerNorm(8)
    output = tiled_forward(norm, torch.randn(1, 20, 8), 5, list(norm.parameters()))
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass through tiles"):
        output.sum().backward()


# ---- what stays as it is ----


def test_experts_are_left_alone_and_said(arithmetic: Build, flat: MicroBatch, padded: MicroBatch) -> None:
    """A mixture of experts trains with its norms in tiles, and the decision names what does not run so."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

    def build() -> Any:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**SHAPE, **experts)).train()

    plain, model = build(), build()
    engine = engine_of(model, arithmetic())
    assert "9 norms; " in said(engine)
    assert "not Qwen3MoeSparseMoeBlock: it holds Qwen3MoeExperts and Qwen3MoeTopKRouter" in said(engine)
    expected = loss_and_gradients(plain, lambda: plain_nll_sum(plain, padded))
    found = loss_and_gradients(model, lambda: engine.nll_sum(flat if engine.layout == "flat" else padded))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found[1], expected[1]) < 1e-5


class Shifted(nn.Module):
    """Made of layers that treat each token by itself, and looks at the token before all the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.roll(x, 1, dims=1)


def test_a_module_that_looks_at_other_tokens_is_found_out(build_model: Build) -> None:
    model = build_model("llama")
    model.model.layers[0].mlp = Shifted(48)
    tiling = tile_decoder(model.get_decoder(), 48)
    assert tiling.skipped == {"Shifted": "its outputs depend on what other tokens stand beside"}
    assert tiling.feed_forwards == 1


def test_what_is_left_alone_goes_by_the_librarys_name(build_model: Build) -> None:
    """Fused functions give modules a class of ours, which no user has heard of."""
    model = build_model("llama")
    for block in model.model.layers:
        block.mlp.down_proj = nn.Conv1d(48, 48, 1)
    patch_model(model, "cpu")
    assert tile_decoder(model.get_decoder(), 48).skipped == {"LlamaMLP": "it holds Conv1d"}


def test_tiles_change_no_name_of_a_weight(build_model: Build) -> None:
    model = build_model("llama")
    before = list(model.state_dict())
    tile_decoder(model.get_decoder(), 48)
    assert list(model.state_dict()) == before
