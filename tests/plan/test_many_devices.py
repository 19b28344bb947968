"""`llmtune plan --devices N`: memory of each device and bytes sent in a step, by strategy."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtune.cli.main import run
from llmtune.common.text import readable_bytes
from llmtune.engine.devices import Devices
from llmtune.plan.hardware import SHARE, Target
from llmtune.plan.many_devices import FORMULAS, plan_strategies, strategy_lines, traffic_bytes
from llmtune.plan.resolve_auto import resolve_rates, resolve_strategy
from plan_helpers import assembled_like
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401
from training_helpers import LORA

H100 = Target("h100", "cuda", 81559 * 2**20)
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
COUNTS = {"gradient_bytes": 1000, "block_bytes": 600, "outside_bytes": 400, "micro_batches": 3}


@pytest.mark.parametrize(
    ("strategy", "devices", "sent"),
    [
        ("ddp", 1, 0),
        ("ddp", 2, 1000),
        ("ddp", 8, 1750),
        ("fsdp", 1, 0),
        ("fsdp", 2, 3900),  # half of (2 x 600 + 400 + 1000) x 3
        ("fsdp", 8, 6825),
        ("zero-1", 8, 1750),  # the same bytes as ddp: gradients one way, moved weights the other
        ("zero-2", 8, 3500),  # gradients of three micro-batches, and the moved weights
        ("zero-3", 8, 7875),  # 7/8 of (2 x 1000 + 1000) x 3
    ],
)
def test_bytes_sent_in_a_step_follow_the_formula(strategy, devices, sent):
    assert traffic_bytes(strategy, devices, **COUNTS) == sent


@pytest.mark.parametrize("kind", [(), LORA])
def test_blocks_and_what_is_outside_of_them_are_all_weights(forecaster_of, kind):
    forecaster = replace(forecaster_of(*kind, target=H100), world_size=8)
    ddp, fsdp, *zero = plan_strategies(forecaster)
    model = assembled_like(forecaster_of(*kind)).model
    inside = sum(weight.nbytes for name, weight in model.named_parameters() if ".layers." in name)
    assert ddp.block_bytes == inside
    assert ddp.block_bytes + ddp.outside_bytes == sum(weight.nbytes for weight in model.parameters())
    assert ddp.gradient_bytes == sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert fsdp.peak_bytes < ddp.peak_bytes
    peaks = [stage.peak_bytes for stage in zero]
    assert sorted(peaks, reverse=True) == peaks  # each stage divides more
    assert zero[2].peak_bytes < ddp.peak_bytes
    assert ddp.sent_bytes == -(-2 * ddp.gradient_bytes * 7 // 8)


def test_devices_that_share_rows_take_a_part_of_the_activations_and_send_heads(forecaster_of):
    """The tiny model has 2 blocks, 4 heads and 2 key heads of 8 numbers; four devices need two of each key head."""
    words = ("training.batch_size=4", "training.gradient_accumulation_steps=1")
    forecaster = replace(forecaster_of(*words, target=H100), world_size=4)
    shared = replace(forecaster_of(*words, "distributed.sequence_parallel=4", target=H100), world_size=4)
    batch = shared.batches(shared.config)
    lengths = shared.prepared.examples.lengths
    tokens = sum(int(lengths[group].sum()) for group in batch.groups(1))
    assert batch.global_batch == 4
    assert len(batch.groups(1)[0]) == 4, "one group of devices has all rows"
    number_bytes = 2 if shared.precision == "bf16" else 4
    row_bytes = 2 * (4 + 4) * 8 * 2 * number_bytes
    ddp, whole = plan_strategies(shared)[0], plan_strategies(forecaster)[0]
    assert ddp.exchanged_bytes == -(-2 * tokens * row_bytes * 3 // 16)
    assert ddp.sent_bytes - ddp.exchanged_bytes == whole.sent_bytes
    assert ddp.formula.endswith(" + exchanged")
    parts = shared.memory().parts
    one = replace(forecaster, world_size=1).memory().parts
    assert parts["activations"] == pytest.approx(one["activations"] / 4, rel=0.01)


@pytest.mark.parametrize(("devices", "sharing"), [(8, 3), (3, 3)])
def test_rows_that_devices_cannot_share_are_named(forecaster_of, devices, sharing):
    """Three divide neither eight devices nor the model's four heads."""
    forecaster = replace(forecaster_of(f"distributed.sequence_parallel={sharing}", target=H100), world_size=devices)
    assert [plan.refused_for for plan in plan_strategies(forecaster)] == ["distributed.sequence_parallel"] * 5


def test_a_strategy_that_a_training_would_refuse_is_named(forecaster_of):
    forecaster = replace(forecaster_of("training.optimizer=lion", target=H100), world_size=8)
    ddp, *others = strategy_lines(plan_strategies(forecaster))[1:6]
    assert len(others) == 4
    assert all(line.endswith("refused for training.optimizer") for line in others)
    assert "refused" not in ddp


def test_divided_weights_are_planned_in_float32_where_ddp_has_bf16_weights_beside_masters(forecaster_of):
    def plans(*words):
        forecaster = forecaster_of("training.precision=bf16", *words, target=H100)
        return plan_strategies(replace(forecaster.with_prepared(resolve_rates(forecaster)[0]), world_size=8))

    masters, float32 = plans(), plans("training.master_weights=false")
    assert masters[1:] == float32[1:]
    assert masters[0].block_bytes == float32[0].block_bytes / 2
    refused = [plan.refused_for for plan in plans("training.master_weights=true")]
    assert refused == [None, *["training.master_weights"] * 4]


def test_the_processes_of_a_machine_share_its_free_memory_in_the_plan(
    tiny_model_folder,
    rows_file,  # noqa: F811
    capsys,
    monkeypatch,
):
    free = SimpleNamespace(available=8 * 10**9)
    monkeypatch.setattr("llmtune.plan.hardware.psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("llmtune.plan.hardware.resident_bytes", lambda: 10**9)  # else the first plan makes it grow
    said = {}
    for count in (1, 4):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        assert run(["plan", f"model.name={tiny_model_folder}", f"data.train={rows_file}", "--json"]) == 0
        said[count] = json.loads(capsys.readouterr().out)
    assert said[4]["device"] == "this CPU, shared by 4 processes"
    apart = said[1]["budget_bytes"] - said[4]["budget_bytes"]
    assert apart == pytest.approx(SHARE["cpu"] * free.available * 3 / 4, abs=4)


def test_the_command_prints_each_strategy_with_its_formula(tiny_model_folder, rows_file, capsys):  # noqa: F811
    words = ["plan", f"model.name={tiny_model_folder}", f"data.train={rows_file}", "--device", "h100", "--devices", "8"]
    words += ["training.precision=fp32", "training.batch_size=4", "training.gradient_accumulation_steps=4"]
    assert run([*words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["strategies"]
    counts = {name: planned[1][name] for name in COUNTS}
    # 16 sequences on 8 devices are 2 for each of them, one micro-batch.
    assert counts["micro_batches"] == 1
    assert [plan["strategy"] for plan in planned] == ["ddp", "fsdp", "zero-1", "zero-2", "zero-3"]
    assert all(plan["sent_bytes"] == traffic_bytes(plan["strategy"], 8, **counts) for plan in planned)
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "a step = 2(N-1)/N x gradients" in said
    assert "a step = (N-1)/N x (2 x blocks + outside + gradients) x micro-batches" in said


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--devices", "8"], "name it, as `--device h100`"), (["--devices", "1", "--device", "h100"], "from 2")],
)
def test_devices_are_several_of_a_named_kind(words, problem, capsys):
    assert run(["plan", *words]) == 2
    assert problem in capsys.readouterr().err


def test_the_table_of_the_page_follows_the_formula():
    rows = re.findall(r"^\| ([\w-]+) \| (\d+) \| ([\d.]+) GB \| ([\d,]+) MB \|$", PAGE.read_text(), re.MULTILINE)
    assert [(name, count) for name, count, *_ in rows] == [(n, c) for c in ("8", "64", "512") for n in FORMULAS]
    sizes = dict(re.findall(r"(gradients|blocks|outside) ([\d,]+) bytes", PAGE.read_text()))
    gradients, blocks, outside = (int(sizes[name].replace(",", "")) for name in ("gradients", "blocks", "outside"))
    for strategy, devices, _, sent in rows:
        counts = {"gradient_bytes": gradients, "block_bytes": blocks, "outside_bytes": outside, "micro_batches": 1}
        assert int(sent.replace(",", "")) == round(traffic_bytes(strategy, int(devices), **counts) / 1e6)


class MainProcess(Devices):
    """The main one of two, which asks nobody."""

    def __init__(self):
        super().__init__(torch.device("cpu"), world_size=2)

    def from_main(self, value):
        return value


def chosen(forecaster):
    """The strategy that `auto` becomes on two processes, with its reason."""
    prepared = resolve_strategy(forecaster, MainProcess())
    (decision,) = [one for one in prepared.decisions if one.key == "distributed.strategy"]
    assert prepared.config.distributed.strategy == decision.value
    return decision.value, decision.reason


def test_auto_is_ddp_where_its_plan_fits_to_the_byte_and_else_fsdp(forecaster_of):
    """By the memory of a micro-batch of one row, which the reason gives with what may be filled."""

    def on(budget, *words):
        target = Target("a card", "cuda", -(-budget * 100 // round(100 * SHARE["cuda"])))
        return chosen(replace(forecaster_of("training.batch_size=2", *words, target=target), world_size=2))

    peak = replace(forecaster_of("training.batch_size=2", target=H100), world_size=2).memory().peak_bytes
    name, reason = on(peak + 100)
    assert (name, readable_bytes(peak) in reason, "may be filled" in reason) == ("ddp", True, True)
    name, reason = on(peak - 100)
    assert (name, readable_bytes(peak) in reason) == ("fsdp", True)
    assert "with ddp, and only" in reason
    # What cannot be sharded keeps whole weights, and the reason says why the plan is passed over.
    name, reason = on(peak // 2, "training.optimizer=lion")
    assert (name, "`training.optimizer` cannot be sharded" in reason) == ("ddp", True)


@pytest.mark.parametrize("total", [H100.total_bytes, 1])
@pytest.mark.parametrize("key", ["zero_stage", "deepspeed_config"])
def test_auto_is_deepspeed_only_where_its_keys_are_set(forecaster_of, tmp_path, key, total):
    """Whatever fits: whoever names a stage or a file wants what they are of."""
    (tmp_path / "ds.json").write_text("{}")
    value = 2 if key == "zero_stage" else tmp_path / "ds.json"
    forecaster = forecaster_of(f"distributed.{key}={value}", target=Target("a card", "cuda", total))
    name, reason = chosen(replace(forecaster, world_size=2))
    assert (name, f"`distributed.{key}` is set" in reason) == ("deepspeed", True)
    assert chosen(replace(forecaster_of(target=H100), world_size=2))[0] == "ddp"
