"""Whole runs that compare answers: they start at exactly the loss of no difference, their reference never moves, and a
run that was stopped ends as the run that never was.
"""

import json
from functools import partial

import pytest
import torch

from llmtune.cli.main import run as command
from llmtune.config.dump import config_to_yaml
from llmtune.config.process_options import Options
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from rank_helpers import in_two_ranks
from training_fixtures import WORDS
from training_helpers import FOUR_BIT, LORA, comparing_run, lines_of, stopped_after, weights_of

LN2 = float(-torch.nn.functional.logsigmoid(torch.zeros(())))


@pytest.fixture
def labels_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"{WORDS[at]} {at}", "completion": WORDS[-at], "label": at % 3 > 0} for at in range(1, 13)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def resolve(tiny_model_folder, pairs_file, tmp_path):
    """The config of a short DPO run on the pairs; further KEY=VALUE on top."""
    steps = ("training.gradient_accumulation_steps=2", "training.max_steps=2")
    basis = ("data.test_size=4", "objective.method=dpo", *steps)
    return partial(comparing_run, tiny_model_folder, pairs_file, tmp_path, *basis)


@pytest.fixture
def first_lines(resolve):
    """Train a run; returns its first evaluation and its first step."""

    def first_lines(*overrides, name="run"):
        lines = lines_of(training.train(resolve(*overrides, name=name)).folder)
        assert lines[0].keys() >= {"eval_loss"}
        return lines[0], next(line for line in lines if "train_loss" in line)

    return first_lines


STARTS = {
    "full": (),
    "lora with dropout": LORA,
    "bf16": (*LORA, "training.precision=bf16"),
    "4bit": FOUR_BIT,
    "plain engine": ("training.engine=plain", *LORA),
    "recomputed blocks": ("model.gradient_checkpointing=true",),
    "packed": ("data.packing=best_fit", "data.max_length=128", *LORA),
    "start copy of an adapter": (*LORA, "objective.reference=start"),
}


@pytest.mark.parametrize("overrides", STARTS.values(), ids=STARTS)
def test_a_run_starts_at_ln_2_to_the_last_bit(first_lines, overrides):
    """Policy and reference are the same model: no margin, and no pair is won by a tie."""
    for line, prefix in zip(first_lines(*overrides), ("eval_", ""), strict=True):
        assert line[f"{prefix or 'train_'}loss"] == LN2
        assert line[f"{prefix}rewards_margin"] == line[f"{prefix}rewards_chosen"] == line[f"{prefix}accuracy"] == 0.0


LOSSES = {
    "hinge": ("objective.loss=hinge", 1.0),
    "ipo": ("objective.loss=ipo", 25.0),
    "kto": ("objective.method=kto", 0.5),
    "apo_zero": ("objective.loss=apo_zero objective.method=kto", 0.5),
}


@pytest.mark.parametrize(("objective", "value"), LOSSES.values(), ids=LOSSES)
def test_other_losses_start_at_their_value_of_no_difference(first_lines, objective, value):
    evaluation, step = first_lines(*objective.split(), *LORA)
    assert evaluation["eval_loss"] == step["train_loss"] == pytest.approx(value, rel=1e-6)


def test_dropout_is_off_and_said(resolve):
    said = []
    result = training.train(resolve(*LORA, "training.max_steps=1"), print_line=said.append)
    assert any("adapter.dropout = 0.0" in line and "asked for: 0.1" in line for line in said)
    adapter = json.loads((result.folder / "checkpoints" / "final" / "adapter_config.json").read_text())
    assert adapter["lora_dropout"] == 0.0


def test_kto_learns_from_answers_with_a_label(resolve, labels_file):
    run = training.train(resolve(f"data.train={labels_file}", "objective.method=kto", "training.max_steps=4")).folder
    lines = [line for line in lines_of(run) if "train_loss" in line]
    assert lines[0]["train_loss"] == 0.5
    assert lines[0]["kl"] == 0.0
    assert lines[-1]["train_loss"] < 0.5
    assert "accuracy" not in lines[0]
    assert lines[0]["num_answers"] == 4


def human(text):
    return {"from": "human", "value": text}


def parts(text):
    return [{"type": "text", "text": text}]


PUBLIC = {
    "dpo_en_demo.json of LLaMA-Factory": (
        "dpo",
        lambda at, right, wrong: {
            "conversations": [{"from": "system", "value": "Be brief."}, human("and?"), {"from": "gpt", "value": "so"},
                              human(f"words {at}")],
            "chosen": {"from": "gpt", "value": right},
            "rejected": {"from": "gpt", "value": wrong},
        },
    ),
    "kto_en_demo.json of LLaMA-Factory": (
        "kto",
        lambda at, right, wrong: {
            "messages": [{"content": f"words {at}", "role": "user"},
                         {"content": wrong if at % 2 else right, "role": "assistant"}],
            "label": at % 2 == 0,
        },
    ),
    "a prompt of text beside lists of messages": (
        "dpo",
        lambda at, right, wrong: {
            "prompt": f"words {at}",
            "chosen": [{"role": "user", "content": f"words {at}"}, {"role": "assistant", "content": right}],
            "rejected": [{"role": "user", "content": f"words {at}"}, {"role": "assistant", "content": wrong}],
        },
    ),
    "content as lists of parts": (
        "dpo",
        lambda at, right, wrong: {
            "prompt": [{"role": "user", "content": parts(f"words {at}")}],
            "chosen": [{"role": "assistant", "content": parts(right)}],
            "rejected": [{"role": "assistant", "content": parts(wrong)}],
        },
    ),
}  # fmt: skip
"""Method, and a row of the shape of a public file, with a right and a wrong answer."""


@pytest.mark.parametrize(("method", "row"), PUBLIC.values(), ids=PUBLIC)
def test_files_of_public_shapes_are_loaded_shown_and_trained(resolve, tmp_path, capsys, method, row):
    path = tmp_path / "demo.json"
    path.write_text(json.dumps([row(at, f"the system {at}", f"numbers {at}") for at in range(8)]))
    config = resolve(f"data.train={path}", f"objective.method={method}", "data.test_size=0")
    (tmp_path / "demo.yaml").write_text(config_to_yaml(config.config))
    assert command(["data", "preview", "--config", str(tmp_path / "demo.yaml"), "--all", "--json"]) in (0, None)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == (16 if method == "dpo" else 8)
    answers = [f"numbers {at}" if method == "kto" and at % 2 else f"the system {at}" for at in range(8)]
    for answer, line in zip(answers, shown[::2] if method == "dpo" else shown, strict=True):
        assert answer in line["text"]
        assert 0 < sum(line["weights"]) < len(line["weights"])
    steps = [line for line in lines_of(training.train(config).folder) if "train_loss" in line]
    assert steps[0]["train_loss"] == (LN2 if method == "dpo" else 0.5)
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]


def test_labels_of_one_kind_are_named_and_the_last_loss_has_its_unit(resolve, labels_file):
    labels_file.write_text(labels_file.read_text().replace("false", "true"))
    settings = (f"data.train={labels_file}", "objective.method=kto", "training.max_steps=1", "data.test_size=0")
    said = []
    result = training.train(resolve(*settings), print_line=said.append)
    assert any("all desirable" in line and "add the other one" in line for line in said)
    assert result.eval_state.loss_unit == "per answer"


def test_a_run_from_a_trained_adapter_is_compared_with_that_adapter(resolve, first_lines):
    """And not with the bare base: then training would begin with margins that nobody learned."""
    start = training.train(resolve("adapter.method=lora", "adapter.r=4", "training.max_steps=6", name="first")).folder
    evaluation, step = first_lines(f"adapter.start_from={start}", "adapter.method=lora", name="second")
    assert evaluation["eval_loss"] == step["train_loss"] == LN2
    assert evaluation["eval_accuracy"] == 0.0
    base, _ = first_lines(
        f"adapter.start_from={start}", "adapter.method=lora", "objective.reference=base", name="third"
    )
    assert base["eval_rewards_margin"] != 0.0


def test_the_plan_counts_a_frozen_copy_and_the_reference_never_moves(resolve):
    with StopRequest() as stop:
        run = training.open_run(resolve(), Options(), stop, print_line=lambda _: None)
        weights = sum(parameter.nbytes for parameter in run.setup.parameters.values())
        assert run.plan.memory.parts["reference"] == weights
        window = run.setup.batches.window(1)
        run.setup.objective.begin_window(window, run.devices)
        before = [run.setup.objective.loss_sum(batch).item() for batch in window.micro_batches]
        at_start = run.setup.objective.measure(run.devices)
        assert sum(before) == pytest.approx(4 * LN2)
        moved = {name: parameter.detach().clone() for name, parameter in run.setup.parameters.items()}
        assert list(run.steps())
        run.setup.objective.begin_window(window, run.devices)
        for batch in window.micro_batches:
            run.setup.objective.loss_sum(batch)
        assert (
            abs(run.setup.objective.measure(run.devices)["rewards_margin"]) > 1e-3
        )  # the trained model has moved away
        with torch.no_grad():
            assert any(not torch.equal(moved[name], weight) for name, weight in run.setup.parameters.items())
            for name, parameter in run.setup.parameters.items():
                parameter.copy_(moved[name])
        run.setup.objective.begin_window(window, run.devices)
        again = [run.setup.objective.loss_sum(batch).item() for batch in window.micro_batches]
        assert run.setup.objective.measure(run.devices) == at_start
        assert again == before


def test_precomputed_equals_live_and_a_damaged_cache_is_measured_again(resolve, tmp_path):
    live = lines_of(training.train(resolve(name="live")).folder)
    settings = "objective.reference=precomputed"
    cached = tmp_path / "cache" / "reference"
    found = lines_of(training.train(resolve(settings, name="measured")).folder)
    for line, other in zip(found, live, strict=True):
        assert line.keys() == other.keys()
        numbers = [key for key, value in line.items() if isinstance(value, float)]
        assert [line[key] for key in numbers] == pytest.approx([other[key] for key in numbers], rel=1e-4, abs=1e-5)
    files = {path: path.read_bytes() for path in cached.iterdir()}
    assert len(files) == 2  # training and held-out rows
    assert lines_of(training.train(resolve(settings, name="read")).folder) == found
    assert {path: path.read_bytes() for path in cached.iterdir()} == files
    for path, content in files.items():  # a damaged file is measured again
        path.write_bytes(content[:-4] + b"\0\0\0\0")
    assert lines_of(training.train(resolve(settings, name="damaged")).folder) == found
    assert {path: path.read_bytes() for path in cached.iterdir()} == files


KINDS = {
    "full": ("training.epochs=2", "training.max_steps=null"),
    "lora": ("training.epochs=2", "training.max_steps=null", *LORA),
    "kto": ("objective.method=kto", "training.max_steps=4", *LORA),
}


@pytest.mark.parametrize("kind", KINDS)
def test_p2_a_stopped_run_resumes_to_the_same_bytes(resolve, kind):
    """The reference of the resumed run is the model as it was before step 1, not as it was at the stop."""
    settings = (*KINDS[kind], "checkpoint.every_steps=1", "evaluation.every_steps=2")
    whole = training.train(resolve(*settings, name="whole")).folder
    result = training.resume(stopped_after(2, resolve(*settings, name="stopped")))
    assert result.state == "finished"
    assert lines_of(result.folder) == lines_of(whole)
    assert weights_of(result.folder) == weights_of(whole)


def test_early_stopping_and_the_best_model_go_by_the_held_out_loss(resolve):
    settings = ("evaluation.every_steps=1", "evaluation.early_stopping_patience=1", "training.max_steps=6")
    result = training.train(resolve(*settings, "training.learning_rate=1e-9", "adapter.method=lora"))
    assert result.step < 6
    assert result.eval_state.best_by == "eval_loss"
    by_accuracy = training.train(resolve("evaluation.best_by=eval_accuracy", "training.max_steps=3", name="accuracy"))
    assert by_accuracy.eval_state.best_value == by_accuracy.metrics["eval_accuracy"]


def test_the_rows_of_pairs_can_be_verified_as_others(resolve):
    from llmtune.verify.numbers import verify_batching, verify_packing

    said = []
    for verify in (verify_batching, verify_packing):
        verdict = verify(resolve("adapter.method=lora"), Options(no_cuda=True), print_line=said.append)
        assert verdict.findings
        assert all(finding.holds for finding in verdict.findings)
    assert any("rows of dpo" in line for line in said)


def test_exact_answers_are_counted_over_chosen_ones(resolve):
    result = training.train(resolve("evaluation.exact_match=true"))
    assert result.metrics["eval_num_answers"] == 4


def test_two_processes_give_the_numbers_of_one(resolve, tmp_path):
    """Counts, KTO's reference point and metrics are those of the whole window, over both processes."""
    settings = ("objective.method=kto", "adapter.method=lora", "training.optimizer=sgd")
    alone = lines_of(training.train(resolve(*settings, name="alone")).folder)
    path = tmp_path / "shared.yaml"
    path.write_text(config_to_yaml(resolve(*settings, name="shared").config))
    codes, said = in_two_ranks(lambda: command(["train", "--config", str(path)]))
    assert codes == [0, 0], said
    shared = lines_of(tmp_path / "runs" / "shared")
    assert len(shared) == len(alone)
    for line, other in zip(shared, alone, strict=True):
        numbers = [key for key, value in other.items() if isinstance(value, float) and key in line]
        assert {"train_loss", "eval_loss"} & set(numbers)
        for key in numbers:
            assert line[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), key
