"""Q7: what is planned is what a run then needs. Sizes are exact, and memory follows the tokens."""

import json
import platform
import shutil
from dataclasses import replace

import pytest
import torch

from llmtune.config.distributed_checks import reason_against_masters
from llmtune.config.layers import load_config
from llmtune.engine.allocator import FULL_KERNEL_CACHES_BYTES, tune_allocator
from llmtune.errors import UsageError
from llmtune.kernels import activation_offload, tiled_mlp
from llmtune.kernels.activation_offload import PAGE_BYTES
from llmtune.plan import forecast, memory, resolve_auto, suggestions
from llmtune.plan.activation_trace import extrapolate
from llmtune.plan.forecast import Forecaster
from llmtune.plan.hardware import Target, find_target, process_bytes, resident_bytes
from llmtune.plan.memory import optimizer_bytes
from llmtune.plan.resolve_auto import with_micro_batch
from llmtune.plan.suggestions import largest_batch, suggest
from llmtune.plan.summary import as_dict, make_plan, plan_lines
from llmtune.training.calibration import steps_from_the_start
from llmtune.training.progress import measured_bytes
from plan_helpers import FEW_LAYERS, OPTIONS, ROOMY, assembled_like, traced
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import LORA, Forked

WAITING = ("model.gradient_checkpointing=true", "model.offload_weights=true")


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", [(), LORA, (*LORA, "training.precision=bf16")])
def test_q7_weights_adapter_gradients_and_optimizer_are_counted_to_the_byte(forecaster_of, kind):
    forecaster = forecaster_of(*kind)
    counted = forecaster.sizes(forecaster.config)
    setup = assembled_like(forecaster)
    step_once(setup)
    frozen = [parameter for parameter in setup.model.parameters() if not parameter.requires_grad]
    trained = list(setup.parameters.values())
    base = frozen if kind else trained
    assert counted.base_bytes == bytes_of(base) + bytes_of(setup.model.buffers())
    assert counted.adapter_bytes == (bytes_of(trained) if kind else 0)
    assert counted.gradient_bytes == bytes_of(trained)
    assert (counted.parameters, counted.trained) == (setup.counts.total, setup.counts.trained)
    state = [
        value
        for _, part in setup.optimizer.part_of()
        for entry in part.state.values()
        for value in entry.values()
        if value.ndim
    ]
    distinct = {value.data_ptr(): value for value in state}.values()
    planned = optimizer_bytes("adamw", entries=counted.trained, entry_bytes=counted.gradient_bytes)
    assert planned == bytes_of(distinct)


def test_q7_weights_in_bf16_beside_float32_masters_are_counted_to_the_byte(forecaster_of):
    forecaster = forecaster_of("training.precision=bf16", "training.master_weights=true")
    counted, plan = forecaster.sizes(forecaster.config), forecaster.memory()
    setup = assembled_like(forecaster)
    step_once(setup)
    entries = counted.trained
    assert counted.base_bytes == measured_bytes(setup)["weights"] == 2 * entries + bytes_of(setup.model.buffers())
    assert counted.gradient_bytes == bytes_of(setup.parameters.values()) == 4 * entries
    assert plan.parts["optimizer"] == 12 * entries
    steps = 4 * len(setup.parameters)  # AdamW's counters
    assert plan.parts["optimizer"] == measured_bytes(setup)["optimizer"] - steps


def test_masters_are_chosen_on_a_gpu_in_bf16_alone(forecaster_of):
    gpu, old = Target("a GPU", "cuda", 1 << 40), Target("an old GPU", "cuda", 1 << 40, has_bf16=False)

    def chosen(*overrides, target=gpu):
        return resolve_auto.resolve_rates(forecaster_of(*overrides, target=target))[0].config.training.master_weights

    assert chosen("training.precision=bf16")
    in_backward = ("training.step_in_backward=true", "training.max_grad_norm=null")
    for overrides in (("training.precision=fp32",), LORA, ("model.dtype=bfloat16",), in_backward):
        assert chosen("training.precision=bf16", *overrides) is False
    assert chosen("training.precision=auto", target=old) is False
    assert chosen("training.precision=bf16", target=Target("a CPU", "cpu", 1 << 40)) is False
    forecaster = forecaster_of("training.precision=bf16", "training.master_weights=true", target=gpu)
    assert suggestions._without_masters(forecaster.config, forecaster)[0] == "training.master_weights=false"
    text, changed = suggestions._step_in_backward(forecaster.config, forecaster)
    assert text == "training.step_in_backward=true training.max_grad_norm=null training.master_weights=false"
    assert reason_against_masters(changed) == "training.step_in_backward"


@pytest.mark.parametrize("rows", ["short", "long"])
def test_masters_are_chosen_where_the_plan_of_a_step_fits_as_well_with_them(rows, forecaster_of):
    """They take more for each weight, and half of what blocks keep for each token: rows decide which is less."""
    long = ("training.batch_size=16", "data.packing=best_fit", "data.max_length=256")
    words = (
        "training.precision=bf16",
        "model.gradient_checkpointing=false",
        *(long if rows == "long" else ("training.batch_size=1",)),
    )
    gpu = Target("a GPU", "cuda", 1 << 40)
    masters, float32 = (
        forecaster_of(*words, f"training.master_weights={value}", target=gpu).memory().peak_bytes
        for value in ("true", "false")
    )
    assert (masters < float32) == (rows == "long")
    share = gpu.budget_bytes / gpu.total_bytes
    for budget, expected in (
        (min(masters, float32) - 1000, masters < float32),
        ((masters + float32) // 2, masters < float32),
        (max(masters, float32) + 1000, True),
    ):
        forecaster = forecaster_of(*words, target=Target("a GPU", "cuda", int(budget / share) + 1))
        prepared, decisions = resolve_auto.resolve_rates(forecaster)
        assert prepared.config.training.master_weights is expected, budget
        (decision,) = [one for one in decisions if one.key == "training.master_weights"]
        assert expected or decision.reason.startswith("planned ")


def test_masters_are_not_chosen_where_they_would_cost_recomputation_or_the_model_has_no_plan(
    forecaster_of, monkeypatch
):
    words = ("training.precision=bf16", "model.gradient_checkpointing=auto", "training.batch_size=1")
    gpu = Target("a GPU", "cuda", 1 << 40)
    masters, float32 = (
        forecaster_of(*words, f"training.master_weights={value}", "model.gradient_checkpointing=false", target=gpu)
        .memory()
        .peak_bytes
        for value in ("true", "false")
    )
    assert float32 < masters
    between = int((masters + float32) / 2 * gpu.total_bytes / gpu.budget_bytes)
    forecaster = forecaster_of(*words, target=Target("a GPU", "cuda", between))
    recomputed = with_micro_batch(forecaster.config, (1, 2), recompute=True)
    recomputed = replace(recomputed, training=replace(recomputed.training, master_weights=True))
    assert forecaster.memory(recomputed).peak_bytes < forecaster.target.budget_bytes
    prepared, (*_, decision) = resolve_auto.resolve_rates(forecaster)
    assert prepared.config.training.master_weights is False
    assert "blocks would be recomputed" in str([decision, *prepared.decisions])

    def without_plan(*_):
        raise NotImplementedError("an operator without a shape")

    monkeypatch.setattr(forecast, "trace", without_plan)
    prepared, _ = resolve_auto.resolve_rates(forecaster_of(*words, "training.batch_size=3", target=gpu))
    assert prepared.config.training.master_weights is False


def test_q7_four_bit_weights_are_counted_as_bitsandbytes_holds_them(forecaster_of):
    forecaster = forecaster_of(*LORA, "model.quantization=4bit")
    counted = forecaster.sizes(forecaster.config)
    model = assembled_like(forecaster).model
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    states = [weight.quant_state for weight in frozen if getattr(weight, "quant_state", None) is not None]
    scales = [
        scale
        for state in states
        for scale in (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    ]
    assert len(states) == 14
    assert counted.base_bytes == pytest.approx(bytes_of([*frozen, *model.buffers(), *scales]), rel=0.01)


def step_once(setup):
    next(steps_from_the_start(setup))


def losses_of(setup):
    return [result.train_mean_nll for result in steps_from_the_start(setup)]


def test_q7_steps_and_tokens_are_those_of_the_batches(forecaster_of):
    forecaster = forecaster_of("training.epochs=1.5")
    steps = forecaster.steps()
    batches = forecaster.prepared.batch_plan()
    windows = list(batches.windows())
    assert (steps.total_steps, steps.steps_per_epoch) == (len(windows), 5) == (8, 5)
    assert steps.run_tokens == sum(window.num_tokens for window in windows)
    assert steps.tokens == sum(window.num_tokens for window in windows[:5])


def test_q7_padding_is_counted_only_where_rows_are_padded(forecaster_of):
    assert forecaster_of().steps().padding_share == 0
    forecaster = forecaster_of("training.engine=plain")
    windows = list(forecaster.prepared.batch_plan().windows())
    positions = sum(batch.input_ids.numel() for window in windows for batch in window.micro_batches)
    tokens = sum(window.num_tokens for window in windows)
    assert forecaster.steps().padding_share == pytest.approx(1 - tokens / positions)


def test_q7_the_parts_add_up_to_the_peak(forecaster_of):
    planned = forecaster_of(*LORA).memory()
    assert planned.peak_bytes == sum(planned.parts.values())
    assert set(planned.parts) == {
        "process", "weights", "adapter", "reference", "gradients", "optimizer", "activations", "loss", "workspace",
        "allocator",
    }  # fmt: skip


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="gaps of glibc's allocator")
def test_q7_more_gaps_are_planned_where_threads_keep_small_blocks(forecaster_of, monkeypatch):
    """Not where the user's tunable takes these caches away, nor under another allocator, which has none of them."""
    forecaster = forecaster_of()
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    gaps = 2 * forecaster.sizes(forecaster.config).largest_gradient_bytes
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    with_caches = forecaster.memory()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    without = forecaster.memory()
    assert with_caches.moment == without.moment == "loss"
    assert (with_caches.parts["allocator"] - gaps) / (without.parts["allocator"] - gaps) == pytest.approx(
        70 / 25, rel=1e-3
    )
    assert with_caches.parts | {"allocator": 0} == without.parts | {"allocator": 0}
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")  # no process is started in this test
    assert forecaster.memory().parts == without.parts


def test_q7_more_gaps_are_planned_on_a_gpu_whose_allocator_cannot_grow_a_segment(forecaster_of, monkeypatch):
    forecaster = forecaster_of(target=Target("a GPU", "cuda", 1 << 40))

    def gaps(setting):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", setting)
        return forecaster.memory().parts["allocator"]

    growing = gaps("expandable_segments:True")
    assert growing > 0
    assert gaps("max_split_size_mb:128") == pytest.approx(5 * growing, rel=1e-3)


def test_q7_gaps_are_those_of_what_a_process_of_several_holds_and_not_of_blocks_that_go_back(
    forecaster_of, monkeypatch
):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    deep = ("model.name=custom-nano", "model.architecture.n_layers=5", "training.batch_size=8")
    forecaster = replace(forecaster_of(*deep, "adapter.method=none", "distributed.strategy=fsdp"), world_size=4)
    sizes, parts = forecaster.sizes(forecaster.config), forecaster.memory().parts
    largest = sizes.largest_gradient_bytes
    assert parts["gradients"] < 0.7 * sizes.gradient_bytes, "a part of each, beside two blocks and the embedding"
    share = round(0.25 * sum(parts[part] for part in ("gradients", "activations", "loss", "workspace")))
    assert parts["allocator"] == share + 2 * largest
    monkeypatch.setattr(memory, "SHARDED_LARGEST_BLOCK", largest - 1)
    assert forecaster.memory().parts["allocator"] == share
    alone = replace(forecaster, world_size=1)
    assert alone.memory().parts["allocator"] > share + 2 * largest, "its heap keeps them"


def test_q7_the_process_counts_the_kernels_that_a_run_in_bf16_collects_and_none_in_fp32(forecaster_of):
    """Their share is fixed, since both caches are full after a while; the rest is what the process holds at this
    moment.
    """
    plain, half = forecaster_of("training.precision=fp32"), forecaster_of("training.precision=bf16")
    for forecaster in (plain, half):
        assert forecaster.process_bytes > 0
    assert plain.process_bytes == pytest.approx(process_bytes(None), abs=16 << 20)
    assert half.process_bytes - FULL_KERNEL_CACHES_BYTES == pytest.approx(process_bytes(torch.bfloat16), abs=16 << 20)
    assert forecaster_of(target=Target("a card elsewhere", "cuda", 1 << 40)).process_bytes == 0


def growth_of_a_process_that_has_read_rows():
    """Bytes by which a process grows that has read and dropped rows, as the plan counts them."""
    tune_allocator()
    before = process_bytes(None)
    rows = [b"x" * (100_000 + n) for n in range(3_000)]
    stays = b"x" * 100_000
    del rows
    assert resident_bytes() > before + (250 << 20), "the allocator returned it"
    print(process_bytes(None) - before, len(stays))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator keeps what was freed")
def test_q7_what_reading_rows_has_left_free_is_not_planned_twice():
    """The steps use it again: counted with the process it would be planned twice."""
    child = Forked(growth_of_a_process_that_has_read_rows)
    printed, _ = child.communicate(timeout=60)
    assert child.returncode == 0, printed
    assert int(printed.split()[0]) < 32 << 20


def test_q7_activations_grow_in_proportion_to_the_tokens(forecaster_of):
    forecaster = forecaster_of(*FEW_LAYERS)
    single, double, triple = (traced(forecaster, (100,) * count).activation_bytes for count in (1, 2, 3))
    assert double - single == pytest.approx(triple - double, rel=0.01)
    assert double == pytest.approx(2 * single, rel=0.02)


def test_q7_more_blocks_follow_from_two_and_three(forecaster_of):
    forecaster = forecaster_of()
    forecaster.shape.config.num_hidden_layers = 5
    exact = traced(forecaster, (100, 60))
    guess = extrapolate(traced(forecaster, (100, 60), blocks=2), traced(forecaster, (100, 60), blocks=3), 5)
    assert guess == exact


def test_q7_recomputed_blocks_keep_less(forecaster_of):
    forecaster = forecaster_of(*FEW_LAYERS)
    assert (
        traced(forecaster, (100, 100), checkpointing=True).activation_bytes
        < 0.5 * traced(forecaster, (100, 100)).activation_bytes
    )


def test_q7_offloaded_blocks_leave_as_much_on_a_gpu_however_many_they_are(forecaster_of):
    """Two blocks' inputs are in flight; the others' wait in pages of the host, counted apart.

    A CPU keeps them, like `true`.
    """
    forecaster = forecaster_of(*FEW_LAYERS)
    forecaster.shape.config.num_hidden_layers = 5
    offloaded = {"checkpointing": "offload", "device_type": "cuda"}
    two, three, five = (traced(forecaster, (200,), blocks=blocks, **offloaded) for blocks in (2, 3, 5))
    assert three.activation_bytes == two.activation_bytes
    assert three.phases["last block"] == pytest.approx(two.phases["last block"], rel=0.02)
    assert [peaks.host_bytes for peaks in (two, three, five)] == [blocks * PAGE_BYTES for blocks in (2, 3, 5)]
    assert extrapolate(two, three, 5) == five
    on_a_cpu, recomputed = (traced(forecaster, (200,), blocks=3, checkpointing=kind) for kind in ("offload", True))
    assert on_a_cpu.host_bytes == 0
    assert on_a_cpu.activation_bytes == recomputed.activation_bytes > three.activation_bytes


def test_q7_tiles_bound_what_feed_forward_layers_hold(forecaster_of, monkeypatch):
    """Of 1,200 tokens the products of 100 are alive at a time."""
    monkeypatch.setattr(tiled_mlp, "LEAST_TOKENS", 100)
    forecaster = forecaster_of(*FEW_LAYERS)
    forecaster.shape.config.intermediate_size = 4096
    untiled, tiled = (
        traced(forecaster, (1200,), checkpointing=kind, device_type="cuda").peak_bytes for kind in (True, "offload")
    )
    assert untiled > 3 * 1200 * 4096 * 4
    assert tiled < 0.4 * untiled


def test_q7_what_autograd_really_keeps_is_what_was_traced(forecaster_of):
    """The same micro-batch on real tensors: bytes of the distinct storages that autograd saves, within 15 %."""
    forecaster = forecaster_of(*LORA[:2])
    setup = assembled_like(forecaster)
    batch, _ = forecaster.largest_micro_batch(forecaster.config)
    real = next(
        micro_batch
        for window in setup.batches.windows()
        for micro_batch in window.micro_batches
        if micro_batch.num_tokens == batch.tokens
    )
    saved = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in setup.model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = setup.objective.loss_sum(real)
    loss.backward()
    planned = forecaster.peaks(forecaster.config, batch, "single").activation_bytes
    assert planned == pytest.approx(sum(saved.values()), rel=0.15)


def test_auto_batch_keeps_the_global_batch_and_the_losses(forecaster_of):
    fixed = forecaster_of("training.batch_size=8", "training.gradient_accumulation_steps=1")
    auto = ("training.batch_size=auto", "training.gradient_accumulation_steps=1")
    roomy, decisions = resolve_auto.fit_to_memory(forecaster_of(*auto))
    assert (roomy.config.training.batch_size, roomy.config.training.gradient_accumulation_steps) == (8, 1)
    assert [decision.key for decision in decisions] == ["training.batch_size"]
    forecaster = forecaster_of(*auto)
    between = forecaster.memory(with_micro_batch(forecaster.config, (2, 4), False)).peak_bytes
    tight = forecaster_of(*auto, target=Target("a tight machine", "cpu", int((between + 1000) / 0.9)))
    prepared, _ = resolve_auto.fit_to_memory(tight)
    training = prepared.config.training
    assert training.batch_size < 8
    assert training.batch_size * training.gradient_accumulation_steps == 8
    small = Forecaster(prepared, OPTIONS, ROOMY)
    assert losses_of(assembled_like(small)) == pytest.approx(losses_of(assembled_like(fixed)), rel=1e-5)


def test_auto_checkpointing_recomputes_only_where_nothing_fits_without(forecaster_of):
    auto = (*FEW_LAYERS, "model.gradient_checkpointing=auto", "training.batch_size=8")
    forecaster = forecaster_of(*auto)
    assert resolve_auto.fit_to_memory(forecaster)[0].config.model.gradient_checkpointing is False
    size = (8, 2)
    with_it, without = (
        forecaster.memory(with_micro_batch(forecaster.config, size, recompute)).peak_bytes
        for recompute in (True, False)
    )
    assert with_it < without
    tight = forecaster_of(*auto, target=Target("a tight machine", "cpu", int((with_it + without) / 2 / 0.9)))
    prepared, decisions = resolve_auto.fit_to_memory(tight)
    assert prepared.config.model.gradient_checkpointing is True
    assert [decision.key for decision in decisions] == ["model.gradient_checkpointing"]


def gpu_too_small_for(forecaster, recompute):
    """A GPU that holds the offloaded run and not the one with this `model.gradient_checkpointing`."""
    offloaded, larger = (
        forecaster.memory(with_micro_batch(forecaster.config, (8, 2), level)).peak_bytes
        for level in ("offload", recompute)
    )
    assert offloaded < larger
    return Target("a small GPU", "cuda", int((offloaded + larger) / 2 / 0.95))


@pytest.fixture
def long_rows(monkeypatch):
    """Rows that are much longer than a tile and a page."""
    monkeypatch.setattr(tiled_mlp, "LEAST_TOKENS", 64)
    monkeypatch.setattr(activation_offload, "PAGE_BYTES", 1 << 12)
    return (*FEW_LAYERS, "training.batch_size=8")


def test_auto_checkpointing_offloads_only_on_a_gpu_that_recomputing_alone_does_not_fit(forecaster_of, long_rows):
    auto = (*long_rows, "model.gradient_checkpointing=auto")
    forecaster = forecaster_of(*auto, target=Target("a GPU", "cuda", 1 << 40))
    small = gpu_too_small_for(forecaster, True)
    prepared, decisions = resolve_auto.fit_to_memory(forecaster_of(*auto, target=small))
    assert prepared.config.model.gradient_checkpointing == "offload"
    assert [decision.value for decision in decisions] == ["offload"]
    compiled = resolve_auto.fit_to_memory(forecaster_of(*auto, "training.compile=true", target=small))[0].config
    on_a_cpu = resolve_auto.fit_to_memory(forecaster_of(*auto, target=Target("a tiny CPU", "cpu", 1)))[0].config
    assert compiled.model.gradient_checkpointing is on_a_cpu.model.gradient_checkpointing is True


def test_offloading_is_advised_where_recomputing_is_not_enough(forecaster_of, long_rows):
    recomputed = (*long_rows, "model.gradient_checkpointing=true")
    small = gpu_too_small_for(forecaster_of(*recomputed, target=Target("a GPU", "cuda", 1 << 40)), True)
    advised = {change.overrides: change.fits for change in suggest(forecaster_of(*recomputed, target=small))}
    assert advised["model.gradient_checkpointing=offload"]
    enough = suggest(forecaster_of(*long_rows, target=Target("a GPU", "cuda", 1 << 40)))
    assert not any("offload" in change.overrides for change in enough)
    offloaded = make_plan(forecaster_of(*long_rows, "model.gradient_checkpointing=offload", target=small))
    assert offloaded.fits
    assert "of page-locked memory of the host, for what is offloaded" in "\n".join(plan_lines(offloaded))
    assert as_dict(offloaded)["memory"]["host_bytes"] == offloaded.memory.host_bytes > 0


@pytest.fixture
def deep(tmp_path, tiny_model_folder):
    """LoRA on two layers of each of six blocks of the tiny model, which nothing loads."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "deep")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6, "layer_types": None}))
    return (*FEW_LAYERS, f"model.name={folder}")


def test_offloaded_weights_leave_two_blocks_on_a_gpu_and_are_advised_where_nothing_else_fits(forecaster_of, deep):
    gpu, recomputed, offload = Target("a GPU", "cuda", 1 << 40), *WAITING
    resident, offloaded = (forecaster_of(*deep, recomputed, *more, target=gpu) for more in ((), (offload,)))
    whole, sizes = resident.memory(), offloaded.sizes(offloaded.config)
    assert 3 * sizes.two_offloaded_bytes == sizes.offloaded_bytes == offloaded.memory().host_bytes
    assert whole.peak_bytes - offloaded.memory().peak_bytes == 2 * sizes.two_offloaded_bytes
    small = Target("a small GPU", "cuda", int(offloaded.memory().peak_bytes / 0.95) + 1)
    advised = {change.overrides: change.fits for change in suggest(forecaster_of(*deep, target=small))}
    assert advised["model.offload_weights=true model.gradient_checkpointing=true"]
    assert not any("offload" in change.overrides for change in suggest(forecaster_of(*deep, target=gpu)))
    auto = forecaster_of(*deep, "model.gradient_checkpointing=auto", offload, target=gpu)
    assert resolve_auto.fit_to_memory(auto)[0].config.model.gradient_checkpointing is True


def test_on_a_cpu_offloaded_weights_take_what_they_took(forecaster_of, deep):
    offloaded = forecaster_of(*deep, *WAITING).memory()
    assert offloaded.host_bytes == 0
    assert offloaded.peak_bytes == forecaster_of(*deep, WAITING[0]).memory().peak_bytes


def test_a_run_that_went_on_keeps_what_it_chose(forecaster_of):
    prepared = forecaster_of("training.batch_size=auto", "training.gradient_accumulation_steps=3").prepared
    before = {
        "training": {"batch_size": 6, "gradient_accumulation_steps": 4},
        "model": {"gradient_checkpointing": False},
    }
    config = resolve_auto.keep_resolved(prepared, before).config
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == (6, 4)


class OtherRank:
    """A process that is not the main one, which chose smaller micro-batches and recomputed blocks."""

    is_main = False

    def from_main(self, config):
        training = config["training"] | {"batch_size": 4, "gradient_accumulation_steps": 2}
        return config | {"training": training, "model": config["model"] | {"gradient_checkpointing": True}}


def test_several_processes_do_as_the_first_one_does(forecaster_of):
    auto = ("training.batch_size=auto", "training.gradient_accumulation_steps=1", "model.gradient_checkpointing=auto")
    forecaster = forecaster_of(*auto)
    mine = resolve_auto.fit_to_memory(forecaster)[0].config
    assert (mine.training.batch_size, mine.model.gradient_checkpointing) == (8, False)
    config = resolve_auto.resolve_on_all_ranks(forecaster, OtherRank()).config
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == (4, 2)
    assert config.model.gradient_checkpointing is True


def test_what_does_not_fit_gets_changes_that_need_less(forecaster_of):
    forecaster = forecaster_of(target=Target("a tiny GPU", "cuda", 1 << 20))
    plan = make_plan(forecaster, full=True)
    assert plan.fits is False
    assert plan.largest_batch is None
    assert plan.changes
    assert all(change.peak_bytes < plan.memory.peak_bytes for change in plan.changes)
    assert {"adapter.method=lora", "training.optimizer=adamw_8bit"} <= {
        change.overrides for change in suggest(forecaster)
    }
    assert "DOES NOT FIT" in "\n".join(plan_lines(plan))
    assert json.loads(json.dumps(as_dict(plan)))["fits"] is False


def test_the_largest_batch_fits_and_one_more_does_not(forecaster_of):
    forecaster = forecaster_of(*LORA[:2], target=Target("a GPU", "cuda", 1 << 40))
    assert largest_batch(forecaster, forecaster.memory()) == 20
    single, four = (
        forecaster.memory(with_micro_batch(forecaster.config, (size, 1), False)).peak_bytes for size in (1, 4)
    )
    tight = forecaster_of(*LORA[:2], target=Target("a small GPU", "cuda", int((single + four) / 2 / 0.95)))
    assert 1 <= largest_batch(tight, tight.memory()) < 20


@pytest.mark.parametrize(
    ("name", "gibibytes"), [("24GB", 24), ("rtx3090", 24), ("RTX4090", 23.99), ("a100-80", 80), ("80 gib", 80)]
)
def test_a_named_device_has_its_memory(name, gibibytes):
    assert find_target(name).total_bytes == pytest.approx(gibibytes * 2**30, rel=1e-3)


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="`rtx9999` is no known device") as error:
        find_target("rtx9999")
    assert "a100-40" in str(error.value)


def test_t4_has_no_bf16():
    """An adapter takes fp16 there, full tuning fp32, as `choose_precision` says on the card itself."""
    from llmtune.plan.hardware import precision_on

    full = load_config(None, overrides=["training.precision=auto"], environ={}).config
    lora = load_config(None, overrides=["training.precision=auto", "adapter.method=lora"], environ={}).config
    assert [precision_on(find_target("t4"), one) for one in (full, lora)] == ["fp32", "fp16"]
    assert [precision_on(find_target("l4"), one) for one in (full, lora)] == ["bf16", "bf16"]
