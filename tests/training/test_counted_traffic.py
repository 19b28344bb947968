"""The bytes that processes send in a step, by the counter of a network of their own, are those that `plan` names."""

import importlib.util
import json
import shutil

import peft  # noqa: F401 - once here, not in every child
import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401

from llmtune.cli.main import run as command
from llmtune.engine.devices import Devices
from llmtune.plan.many_devices import exchange_bytes
from rank_helpers import needs_namespaces, ordinary_command, sent_between
from sharded_runs import FULL, LORA
from training_helpers import lines_of, small_run

pytestmark = [pytest.mark.campaign, needs_namespaces]

needs_deepspeed = pytest.mark.skipif(
    not (importlib.util.find_spec("deepspeed") and shutil.which("g++") and shutil.which("ninja")),
    reason="DeepSpeed, g++ and ninja are not here",
)
ZERO = "distributed.strategy=deepspeed"
STRATEGIES = {
    "ddp": ("distributed.strategy=ddp",),
    "fsdp": ("distributed.strategy=fsdp",),
    **{f"zero-{stage}": (ZERO, f"distributed.zero_stage={stage}") for stage in (1, 2, 3)},
}
FEW, MANY = 4, 12


@pytest.fixture(autouse=True)
def _asked_seldom(monkeypatch):
    """Not every second: the two runs that are compared start within different times."""
    monkeypatch.setattr("llmtune.engine.rank_watch.LONGEST_REST_S", 1000.0)


"""Steps of two runs; what both do once (start, evaluation, saving) is not in the difference."""

BLOCKS, WIDTH, HEADS, KEY_HEADS = 4, 128, 4, 2


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    """16 rows, of which each process has two in a step, one after the other."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("traffic")
    config = LlamaConfig.from_pretrained(
        tiny_model_folder,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=WIDTH // HEADS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder / "model")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    seldom = ("evaluation.every_steps=1000", "checkpoint.every_steps=1000", "data.test_size=8")
    return folder, small_run(folder / "model", rows_file, folder, *seldom, "training.batch_size=1", "adapter.r=16")


def sent_in_a_step(words, count, name, *more):
    """Bytes that each process sends in a step, and the tokens of a step; both are means."""
    folder, given = words
    sent = {}
    for steps in (FEW, MANY):
        own = [*given, *more, f"training.max_steps={steps}", f"run.name={name}-{steps}"]
        codes, said, sent[steps] = sent_between(lambda own=own: ordinary_command(["train", *own]), count)
        assert codes == [0] * count, said
    tokens = [line["num_tokens"] for line in lines_of(folder / f"{name}-{MANY}") if "num_tokens" in line][FEW:MANY]
    return (sent[MANY] - sent[FEW]) / (MANY - FEW) / count, sum(tokens) / len(tokens)


def planned(words, count, capsys, *more):
    """What `llmtune plan` names for each strategy."""
    assert command(["plan", *words[1], *more, "--device", "h100", "--devices", str(count), "--json"]) == 0
    return {plan["strategy"]: plan for plan in json.loads(capsys.readouterr().out)["strategies"]}


SCATTERED = {"ddp": 0, "fsdp": 2, "zero-1": 1, "zero-2": 2, "zero-3": 2}
"""How often in a step of two micro-batches the summed gradients are scattered; gloo sends them twice then."""


CASES = [
    pytest.param(count, strategy, kind, id=f"{strategy}-{count}-{'full' if kind == FULL else 'lora'}",
                 marks=needs_deepspeed if "zero" in strategy else [])
    for strategy in STRATEGIES for count in (2, 4) for kind in (FULL, LORA)
    if "zero" not in strategy or (count, kind) == (2, FULL)
]  # fmt: skip


@pytest.mark.parametrize(("count", "strategy", "kind"), CASES)
def test_a_step_sends_what_the_plan_names(words, count, strategy, kind, capsys):
    rows = f"training.gradient_accumulation_steps={2 * count}"
    plan = planned(words, count, capsys, rows, *kind)[strategy]
    assert plan["micro_batches"] == 2
    more = [*STRATEGIES[strategy], rows, *kind]
    if strategy.startswith("zero"):
        more.append(f"distributed.deepspeed_config={words[0] / 'ds.json'}")
    sent, _ = sent_in_a_step(words, count, f"{strategy}-{count}-{len(kind)}", *more)
    formula = plan["sent_bytes"] + SCATTERED[strategy] * plan["gradient_bytes"] * (count - 1) // count
    print(
        f"\n{strategy} {kind[0]} on {count}: {sent:,.0f} counted, {plan['sent_bytes']:,} planned, "
        f"{formula:,} of gloo, {sent / formula:.3f}"
    )
    assert 1 <= sent / formula < 1.02


def test_a_row_that_two_processes_share_sends_what_the_plan_names(words, capsys):
    more = ["training.gradient_accumulation_steps=4", "distributed.sequence_parallel=2", *LORA]
    plan = planned(words, 2, capsys, *more)["ddp"]
    sent, tokens = sent_in_a_step(words, 2, "shared", *more)
    row_bytes = 2 * (HEADS + KEY_HEADS) * (WIDTH // HEADS) * BLOCKS * 4
    exchanged = exchange_bytes(2, tokens=round(tokens), row_bytes=row_bytes, passes=2)
    formula = plan["sent_bytes"] - plan["exchanged_bytes"] + exchanged
    print(f"\nshared rows on 2: {sent:,.0f} counted, {formula:,} by the formula, {sent / formula:.3f}")
    assert 1 <= sent / formula < 1.05


NUMBERS, TIMES = 2**20, 8


def scatter():
    """Sum and scatter 4 MB, eight times."""
    devices = Devices.from_environment(no_cuda=True, timeout_s=60)
    sums, own = torch.ones(NUMBERS), torch.empty(NUMBERS // devices.world_size)
    for _ in range(TIMES):
        dist.reduce_scatter_single(own, sums)
    assert own.unique().tolist() == [devices.world_size]
    devices.close()


@pytest.mark.parametrize("count", [2, 4])
def test_gloo_scatters_a_sum_by_giving_all_of_it_to_every_process(count):
    """Twice what a ring sends, which is why its counts are above the plan's."""
    codes, said, sent = sent_between(scatter, count)
    assert codes == [0] * count, said
    ring = NUMBERS * 4 * (count - 1) / count
    assert sent / count / TIMES / ring == pytest.approx(2, rel=0.01)
