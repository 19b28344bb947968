"""N15 for blocks whose inputs wait in host memory: the bits of recomputed blocks, and a device that holds two inputs at
most.
"""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gradient_helpers import loss_and_gradients
from llmtune.adapters.attach import attach_adapter
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.forward import build_engine, checkpoint_blocks
from llmtune.engine.precision import Precision
from llmtune.errors import ModelError
from llmtune.kernels import activation_offload, tiled_mlp
from llmtune.kernels.activation_offload import HostStore, offload_block_inputs
from llmtune.kernels.tiled_mlp import run_in_tiles

Build = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 12)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_inputs_kept_on_the_host_change_no_bit(
    name: str,
    layout: Any,
    bf16: bool,
    build_model: Build,
    arithmetic: Build,
    make_examples: Callable[..., list[Example]],
) -> None:
    """N15: every block's input leaves and comes back as it was, in pieces that do not divide it evenly; dropout
    included.
    """
    precision = arithmetic(bf16=bf16)
    results, stores = [], []
    for keep in (False, True):
        model, _ = attach_adapter(build_model(name), AdapterConfig(method="lora", r=4, dropout=0.1), seed=0)
        base = model.get_base_model()
        engine = build_engine(
            model, config=Config(model=ModelConfig(gradient_checkpointing=True)), device=CPU, precision=precision
        )
        if keep:
            stores.append(HostStore(CPU))
            assert offload_block_inputs(stores[0], base) == 2
        torch.manual_seed(5)
        for lengths in ((23, 5, 40), (61, 9)):

            def loss(lengths: tuple[int, ...] = lengths, engine: Any = engine) -> torch.Tensor:
                with precision.autocast():
                    return engine.nll_sum(make_micro_batch(make_examples(lengths), engine.layout, 0))

            results.append(loss_and_gradients(model.train(), loss))
    assert results[0][0] == results[2][0]
    assert results[1][0] == results[3][0]
    assert same_bits(results[0][1], results[2][1])
    assert same_bits(results[1][1], results[3][1])
    assert stores[0].num_pages >= 2 * 68 * 48 * 4 // 4096


def test_pages_are_taken_once_and_given_back(
    build_model: Build, flat: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later micro-batches, shorter ones and one whose backward pass never came lock no more memory; nor does a loss
    that is still held.
    """
    model, store = build_model("llama"), HostStore(CPU)
    checkpoint_blocks(model)
    offload_block_inputs(store, model)
    monkeypatch.setattr(tiled_mlp, "LEAST_TOKENS", 48)
    run_in_tiles(model)
    counts = []
    for length in (219, 219, 100, 219):
        loss = model(flat.input_ids[:, :length], use_cache=False).logits.sum()
        loss.backward()
        counts.append(store.num_pages)
        assert len(store._free) == store.num_pages
    model(flat.input_ids, use_cache=False).logits.sum()
    gc.collect()
    model(flat.input_ids, use_cache=False).logits.sum().backward()
    assert counts == [counts[0]] * 4
    assert store.num_pages == counts[0] == 2 * -(-219 * 48 * 4 // 4096)


def test_the_device_holds_no_input_but_the_last_ones(build_model: Build, flat: MicroBatch) -> None:
    """After the forward pass of six blocks only the last block's input is still there; with `true` all six are."""
    alive = {}
    for keep in (False, True):
        torch.manual_seed(0)
        shape = {
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        }
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).train()
        checkpoint_blocks(model)
        if keep:
            offload_block_inputs(HostStore(CPU), model)
        inputs: list[Any] = []
        for block in model.model.layers:
            block.register_forward_pre_hook(lambda _module, args: inputs.append(weakref.ref(args[0].untyped_storage())))  # noqa: B023
        loss = model(flat.input_ids, use_cache=False).logits.sum()
        alive[keep] = sum(one() is not None for one in inputs)
        loss.backward()
    assert alive == {False: 6, True: 1}


def test_tensors_come_back_in_any_order_and_more_than_once() -> None:
    store = HostStore(CPU)
    tensors = [
        torch.randn(3, 700),
        torch.randn(5),
        torch.arange(9, dtype=torch.bfloat16).view(3, 3).t(),
        torch.randn(1, 2048),
    ]
    held = [store.put(one) for one in tensors]
    for index in (3, 2, 1, 0, 2, 0, 3, 3):
        assert torch.equal(store.get(held[index]), tensors[index])


def test_what_comes_next_in_the_backward_pass_is_fetched_before_it_is_asked_for() -> None:
    store = HostStore(CPU)
    first, second, third = (store.put(torch.full((4,), float(number))) for number in range(3))
    assert [one.on_device is None for one in (first, second, third)] == [True, True, False]
    store.get(third)
    assert [one.on_device is None for one in (first, second, third)] == [True, False, True]
    store.get(second)
    assert [one.on_device is None for one in (first, second, third)] == [False, True, True]


def test_on_a_cpu_inputs_stay_where_they_are_and_that_is_said(build_model: Build, arithmetic: Build) -> None:
    config = Config(model=ModelConfig(gradient_checkpointing="offload"))
    engine = build_engine(build_model("llama"), config=config, device=CPU, precision=arithmetic())
    told = next(one for one in engine.decisions if one.key == "model.gradient_checkpointing")
    assert told.value == "offload"
    assert "blocks' inputs stay where they are, a CPU has no other memory" in told.reason


def test_a_model_without_blocks_that_can_be_recomputed_is_refused() -> None:
    with pytest.raises(ModelError, match="the inputs of Linear's blocks cannot be kept elsewhere"):
        offload_block_inputs(HostStore(CPU), torch.nn.Linear(2, 2))


# ---- the benchmark ----

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("limit", [0, 4095, 4096, 5000, 78_475, 342_733, 1 << 20, 1 << 21])
def test_the_benchmark_finds_the_longest_row_within_two_percent(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    longest = importlib.import_module("longest_row").longest
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    found = longest(fits, least=4096, most=1 << 20, within=0.02)
    assert len(tried) <= 15
    if limit < 4096:
        assert found is None
    else:
        assert found in tried
        assert min(limit, 1 << 20) / 1.02 - 1 <= found <= limit


@pytest.mark.campaign
def test_the_benchmark_runs_on_a_cpu() -> None:
    """Real tries, each in a process of its own: 1,024 tokens of the tiny shape fit in 4 GB, nothing fits in 10 MB."""
    command = [
        sys.executable,
        "longest_row.py",
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--gb",
        "4",
        "0.01",
        "--least",
        "512",
        "--most",
        "1024",
    ]
    done = subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True)
    rows = done.stdout.splitlines()
    assert rows[2].startswith("| 4 GB | offload | 1,024 (not tried longer) | ")
    assert rows[3].startswith("| 0.01 GB | offload | less than 512 |")


# ---- on a GPU ----

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
WIDE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}


def wide_model(recompute: Any, tokens: int) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A LoRA of a Llama shape on the GPU, and its loss of one row."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    shape = transformers.LlamaConfig(**WIDE, num_key_value_heads=2, max_position_embeddings=1 << 20)
    base = transformers.LlamaForCausalLM(shape).to(device, torch.bfloat16)
    model, _ = attach_adapter(base, AdapterConfig(method="lora", r=8), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    precision = Precision("bf16", device)
    engine = build_engine(
        model, config=Config(model=ModelConfig(gradient_checkpointing=recompute)), device=device, precision=precision
    )
    assert engine.layout == "flat", engine.decisions
    ids = torch.randint(3, 512, (tokens,), generator=torch.Generator().manual_seed(1)).numpy().astype("int32")
    weights = (ids % 3 > 0).astype("float32")
    weights[0] = 0
    batch = make_micro_batch([Example("row", ids, weights)], "flat", 0)

    def loss() -> torch.Tensor:
        with precision.autocast():
            return engine.nll_sum(batch)

    return model.train(), loss


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_offloaded_blocks_repeat_recomputed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """N15 on CUDA, bf16, three times over: the same loss bits where a row is one tile; with tiles loss within 1e-3,
    gradients within 2e-2.

    Gradients are compared with a bound throughout, because flash attention's backward pass adds in no fixed order.
    """
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 20)

    def results(recompute: Any, least: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
        monkeypatch.setattr(tiled_mlp, "LEAST_TOKENS", least)
        model, loss = wide_model(recompute, 8192)
        return [loss_and_gradients(model, loss) for _ in range(3)]

    def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
        total = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
        return float((total / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5)

    expected, one_tile, tiled = results(True, 8192)[0], results("offload", 8192), results("offload", 1024)
    assert {loss for loss, _ in one_tile} == {expected[0]}
    assert max(apart(gradients, expected[1]) for _, gradients in one_tile) < 1e-2
    assert [loss for loss, _ in tiled] == [pytest.approx(expected[0], rel=1e-3)] * 3
    assert max(apart(gradients, expected[1]) for _, gradients in tiled) < 2e-2


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_the_peak_falls_and_the_host_is_locked_once() -> None:
    peaks, pages = {}, 0
    for recompute in (True, "offload"):
        model, loss = wide_model(recompute, 32768)
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss_and_gradients(model, loss)
            torch.cuda.synchronize()
            peaks[recompute] = torch.cuda.max_memory_allocated() - before
        if recompute == "offload":
            cells = model.get_base_model().model.layers[0]._gradient_checkpointing_func.__closure__
            store = next(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, HostStore))
            pages = store.num_pages
            assert all(page.is_pinned() for page in store._free)
            assert len(store._free) == pages
        del model, loss
        gc.collect()
        torch.cuda.empty_cache()
    assert pages == 8 * -(-32768 * 512 * 2 // activation_offload.PAGE_BYTES)
    assert peaks["offload"] < 0.5 * peaks[True]


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_a_store_gives_back_what_it_was_given_while_the_device_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies run beside other work: without the events, memory would be taken again before it is read."""
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 22)
    device = torch.device("cuda")
    store, weight = HostStore(device), torch.randn(4096, 4096, device=device)
    for _ in range(3):
        held = []
        for number in range(8):
            x = torch.full((4096, 4096), float(number), device=device)
            held.append(store.put(x))
            del x
            _busy = weight @ weight
        for number in reversed(range(8)):
            x = store.get(held[number])
            _busy = weight @ weight
            assert bool((x == number).all())
            del x
        del held
    assert store.num_pages == 8 * 16
