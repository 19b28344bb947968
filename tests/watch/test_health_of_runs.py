"""Every health check is provoked by a run of the command that is crafted for it, none by a thousand quiet steps."""

import json
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from llmtune.cli.main import main
from llmtune.durable import read_lines
from llmtune.engine import loop
from llmtune.tracking.health import CHECKS
from llmtune.tracking.machine import GPU, Machine
from llmtune.tracking.system import SystemTracker
from llmtune.training import build, training_run
from report_helpers import write_lines
from training_fixtures import WORDS


def usual(count):
    """Rows of different lengths, no two alike."""
    for index in range(count):
        question = " ".join(WORDS[(index * 3 + place) % len(WORDS)] for place in range(2 + index % 7))
        yield f"{question} {index}", " ".join(WORDS[(index * 5 + place) % len(WORDS)] for place in range(1 + index % 9))


def alike(count):
    """Rows with one answer, and after them one row that is unlike them."""
    rows = [(f"the user asks {index}", "the assistant answers") for index in range(count)]
    return [*rows, ("zq", "9 8 7 6 5 4 3 2 1 0 zz xx 9 8 7 6")]


@pytest.fixture(autouse=True)
def even_clock(monkeypatch):
    """Steps of equal time: other programs may have the processors of a test, and a run would rightly say so."""
    with monkeypatch.context() as patch:
        now = iter(range(10**9))
        patch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(now) / 100))
        yield patch


@pytest.fixture
def train(tiny_model_folder, tmp_path, capsys):
    """Run `llmtune train`; returns the exit code, the kinds of its events and what it said."""

    def run(*words, rows=None, model=tiny_model_folder, lines=None):
        data = tmp_path / "rows.jsonl"
        pairs = ({"prompt": q, "response": a, "system": ""} for q, a in rows or usual(60))
        write_lines(data, lines or list(pairs))
        basis = [f"model.name={model}", f"data.train=[{data}]", f"run.output_dir={tmp_path / 'runs'}", "run.name=run"]
        basis += ["data.max_length=256", "training.precision=fp32", "training.batch_size=1", "data.num_workers=1"]
        basis += ["evaluation.before_training=false", "checkpoint.every_steps=100000"]
        with pytest.raises(SystemExit) as ended:
            main(["train", *basis, *words])
        events = read_lines(tmp_path / "runs" / "run" / "events.jsonl")
        said = capsys.readouterr().err
        assert all(str(event["message"])[:40] in said for event in events), "an event that nobody was told"
        return ended.value.code or 0, [event["kind"] for event in events]

    return run


@pytest.fixture
def scaled(tiny_model_folder, tmp_path):
    """Save the tiny model with another last norm and head, each multiplied."""

    def save(norm, head):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach() * head)
        model.model.norm.weight.data *= norm
        model.save_pretrained(tmp_path / "scaled")
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "scaled")
        return tmp_path / "scaled"

    return save


RISING = ("training.learning_rate={}", "training.max_grad_norm=null", "training.warmup_ratio=1.0")
CONSTANT = "training.lr_schedule=constant"


def test_a_loss_that_is_no_number(train, scaled):
    code, kinds = train("training.max_steps=5", "training.max_skipped_steps=2", model=scaled(1e38, 1e3))
    assert (code, kinds) == (7, ["non_finite_loss"])


def test_gradients_that_are_no_numbers(train, scaled):
    code, kinds = train("training.max_steps=4", "training.max_skipped_steps=9", model=scaled(1e25, 1e-25))
    assert (code, kinds) == (0, ["non_finite_gradients"])


def test_one_row_unlike_the_others(train):
    words = ("training.learning_rate=0.01", "training.epochs=1", CONSTANT, "data.shuffle_seed=null")
    assert train(*words, rows=alike(60)) == (0, ["loss_spike"])


def test_a_rate_that_rises_far_too_high_makes_the_loss_rise(train):
    assert "rising_loss" in train(*(word.format(3.0) for word in RISING), "training.max_steps=80")[1]


def test_a_rate_that_rises_without_clipping_makes_the_gradients_explode(train):
    words = ("training.max_steps=200", "training.optimizer=sgd")
    code, kinds = train(*(word.format(10.0) for word in RISING), *words)
    assert code == 7
    assert "exploding_gradients" in kinds


def test_a_rate_that_moves_nothing(train):
    words = ("training.learning_rate=1e-30", "training.max_steps=210")
    assert train(*words) == (0, ["zero_learning_rate", "plateau"])


def test_an_answer_that_is_the_same_in_every_row(train):
    rows = [(f"the user asks {index}", "yes") for index in range(200)]
    assert "too_low_too_soon" in train("training.learning_rate=0.01", CONSTANT, "training.max_steps=200", rows=rows)[1]


def test_attention_that_is_driven_to_where_nothing_moves_it(train):
    words = ("model.train_only=['.*(q|k)_proj.*']", "training.learning_rate=10")
    warm = ("training.lr_schedule=constant_with_warmup", "training.warmup_steps=40", "training.max_steps=60")
    assert "vanishing_gradients" in train(*words, *warm)[1]


def test_few_rows_learned_by_heart(train):
    words = ("training.learning_rate=0.02", CONSTANT, "training.epochs=14", "data.test_size=4", "data.max_samples=12")
    more = ("evaluation.every_steps=3", "training.batch_size=2", "training.gradient_accumulation_steps=2")
    assert "over_fitting" in train(*words, *more, rows=list(usual(24)))[1]


def test_answers_that_all_earn_nothing(train):
    words = ("objective.method=grpo", "objective.rewards={exact: 1.0}", "objective.num_generations=2")
    lines = [{"prompt": f"number {number}", "answer": "words"} for number in range(30)]
    assert train(*words, "objective.max_new_tokens=2", "training.max_steps=24", lines=lines)[1] == ["equal_rewards"]


def slowly(windows, since):
    """A reader of rows that is slow from one window on: each then takes eight times what those before took."""
    taken, before = [], time.perf_counter()
    for number, window in enumerate(windows):
        taken.append(time.perf_counter() - before)
        if number >= since:
            time.sleep(8 * median(taken[:since]))
        before = time.perf_counter()
        yield window


def test_a_reader_that_becomes_slow_and_a_device_that_has_little_to_do(train, monkeypatch, even_clock):
    even_clock.undo()
    steps = training_run.train_steps
    monkeypatch.setattr(
        training_run, "train_steps", lambda **parts: steps(**parts | {"windows": slowly(parts["windows"], 60)})
    )
    monkeypatch.setattr(build, "utilization", lambda *a, **k: lambda tokens_per_second: tokens_per_second * 1e-9)
    code, kinds = train("training.max_steps=100")
    assert (code, set(kinds)) == (0, {"low_device_use", "slower"})


class Sensor(Machine):
    """A machine whose processors or GPU are as busy as a test says; everything else is measured."""

    gpu, everyone, own = None, 1.0, 0.5

    def figures(self):
        figures = super().figures()
        gpus = () if self.gpu is None else (GPU(0, "a GPU", self.gpu, None, None, None, None, None),)
        changed = {"cpu_use": self.everyone, "process_cpus": self.own, "cpu_count": 8, "gpus": gpus}
        return figures.__class__(**{**vars(figures), **changed})


@pytest.mark.parametrize(
    ("gpu", "everyone", "own", "seen"),
    [
        (None, 1.0, 0.5, "this run had 0.5 of 8 processors while all were busy"),
        (0.1, 1.0, 0.5, "other programs keep the processors busy"),
        (0.1, 0.3, 1.0, "the processor's work between the kernels keeps it waiting"),
        (0.1, 0.1, 0.2, "the steps are small"),
        (0.9, 0.3, 1.0, None),
        (None, 1.0, 7.5, None),
    ],
)
def test_a_machine_that_is_busy_with_others_or_with_nothing(
    train, monkeypatch, tmp_path, capsys, gpu, everyone, own, seen
):
    monkeypatch.setattr(Sensor, "gpu", gpu)
    monkeypatch.setattr(Sensor, "everyone", everyone)
    monkeypatch.setattr(Sensor, "own", own)
    start = SystemTracker.__init__
    monkeypatch.setattr(SystemTracker, "__init__", lambda self: start(self, Sensor(), seconds=0.01))
    train("training.max_steps=25", "tracking.trackers=[jsonl, system]")
    with pytest.raises(SystemExit):
        main(["health", str(tmp_path / "runs" / "run"), "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["kind"] for event in found] == (["low_device_use"] if seen else [])
    assert all(seen in event["message"] for event in found)


KINDS = {check.kind for check in CHECKS}


def test_there_is_a_run_for_every_check():
    source = Path(__file__).read_text(encoding="utf-8")
    assert {kind for kind in KINDS if f'"{kind}"' in source} == KINDS


@pytest.mark.campaign
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("adapter.method=lora", "adapter.r=4"),
        ("data.packing=best_fit", "training.batch_size=1"),
        ("training.precision=bf16",),
    ],
)
def test_a_thousand_quiet_steps_give_no_event(train, more):
    words = ("training.learning_rate=0.003", "training.max_steps=1000", "data.test_size=40", "training.batch_size=4")
    assert train(*words, "evaluation.every_steps=100", *more, rows=list(usual(800))) == (0, [])
