"""Every health check is provoked by a crafted record, none by a thousand quiet steps; runs write what they see."""

import json
import math
import random
from statistics import fmean

import pytest

from llmtune.cli.main import main
from llmtune.durable import read_lines
from llmtune.errors import DivergedError
from llmtune.tracking.health import CHECKS, HealthMonitor
from llmtune.tracking.jsonl import RunRecord
from llmtune.training import train as training
from llmtune.watch.health import health_of
from report_helpers import write_lines


def record(count=1000, *, total=1000, seed=0, **changes):
    """Lines of a quiet run: a falling loss with the noise of small batches; each change is a function of the step."""
    draw = random.Random(seed)
    lines = [{"step": 0, "eval_mean_nll": 4.0}]
    for step in range(1, count + 1):
        line = {
            "step": step,
            "progress": step / total,
            "train_mean_nll": (1.2 + 2.8 * math.exp(-step / 250)) * math.exp(draw.gauss(0, 0.15)),
            "grad_norm": 2 * math.exp(draw.gauss(0, 0.4)) * (0.4 + 0.6 * math.exp(-step / 200)),
            "learning_rate": 1e-3 * min(step / 20, (total - step + 1) / total),
            "num_tokens": 8000,
            "tokens_per_second": 9000 * math.exp(draw.gauss(0, 0.2)),
            "mfu": 0.35 + draw.gauss(0, 0.03),
        }
        lines.append({**line, **{name: change(step, line[name]) for name, change in changes.items()}})
        if step % 100 == 0:
            lines.append({"step": step, "eval_mean_nll": 1.3 + 2.8 * math.exp(-step / 250)})
    return lines


def kinds(lines):
    return [event["kind"] for event in HealthMonitor().see_all(lines)]


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_quiet_steps_give_no_event(seed):
    assert kinds(record(seed=seed)) == []


def test_the_loss_of_a_run_that_learns_from_rewards_gives_no_event():
    lines = rewarded()
    assert kinds(lines) == []
    assert "plateau" in kinds([{name: value for name, value in line.items() if name != "reward"} for line in lines])


def test_a_task_that_is_learned_fast_is_no_leak():
    """The losses of the README's own job, 80 steps."""
    losses = [1.67, 1.1, 0.64, 0.37, 0.2, 0.11, 0.053, 0.047, 0.1, 0.035, 0.05, 0.022, 0.0077, 0.012, 0.017, 0.013]
    assert kinds(record(16, total=80, train_mean_nll=lambda step, _usual: losses[step - 1])) == []


def after(step, value):
    """A change from one step on."""
    return lambda now, usual: value(now, usual) if now >= step else usual


def over_fitted():
    lines = record()
    for line in lines:
        if "eval_mean_nll" in line and line["step"] > 400:
            line["eval_mean_nll"] = 1.8 + line["step"] / 1000
    return lines


def skipped(reason):
    window = {"step": 500, "progress": 0.5, "learning_rate": 1e-3, "skipped": True, "reason": reason}
    return [*record(500), {**window, "sources": ["a.jsonl:7"]}, *record()[506:]]


def rewarded(**changes):
    """Lines of a quiet run that learns from rewards: the loss hovers around a value, and says nothing."""
    draw = random.Random(0)
    lines = [line for line in record() if "train_mean_nll" in line]
    for line in lines:
        del line["train_mean_nll"]
        line |= {"train_loss": 0.02 + draw.gauss(0, 0.001), "reward": line["step"] / 1000, "with_advantage": 0.6}
        line |= {name: change(line["step"], line[name]) for name, change in changes.items()}
    return lines


CRAFTED = {
    "non_finite_loss": lambda: skipped("train_mean_nll is nan"),
    "non_finite_gradients": lambda: skipped("grad_norm is inf"),
    "loss_spike": lambda: record(train_mean_nll=lambda step, usual: 12.0 if step == 600 else usual),
    "rising_loss": lambda: record(train_mean_nll=after(600, lambda step, usual: usual + (step - 600) / 200)),
    "plateau": lambda: record(train_mean_nll=lambda step, usual: 4.0 + 0.01 * math.sin(step)),
    "too_low_too_soon": lambda: record(train_mean_nll=lambda step, usual: usual * math.exp(-step / 20) + 0.001),
    "zero_learning_rate": lambda: record(learning_rate=after(300, lambda step, usual: 0.0)),
    "vanishing_gradients": lambda: record(grad_norm=after(300, lambda step, usual: usual * 1e-6)),
    "exploding_gradients": lambda: record(grad_norm=after(300, lambda step, usual: usual * 1.2 ** min(step - 300, 99))),
    "over_fitting": over_fitted,
    "slower": lambda: record(tokens_per_second=after(500, lambda step, usual: usual / 4)),
    "equal_rewards": lambda: rewarded(with_advantage=after(300, lambda step, usual: 0.0)),
    "low_device_use": lambda: record(mfu=lambda step, usual: 0.01, num_tokens=lambda step, usual: 300),
}


def test_there_is_a_crafted_record_for_every_check():
    assert list(CRAFTED) == [check.kind for check in CHECKS]


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_record_gives_its_event_and_no_other(kind):
    events = HealthMonitor().see_all(CRAFTED[kind]())
    assert {event["kind"] for event in events} == {kind}
    assert len(events) <= 2
    assert all(event["message"] and event["advice"] for event in events)


def test_the_message_holds_the_numbers_and_the_rows():
    (spike,) = HealthMonitor().see_all(CRAFTED["loss_spike"]())
    assert spike["step"] == 600
    assert "jumped to 12;" in spike["message"]
    (skip,) = HealthMonitor().see_all(CRAFTED["non_finite_loss"]())
    assert "rows: a.jsonl:7" in skip["message"]


def test_the_loss_of_a_step_with_few_trained_tokens_may_be_far_off():
    """As that of the smallest pack of each epoch is."""
    lines = [line for line in record() if "train_mean_nll" in line]
    usual = fmean(line["train_mean_nll"] for line in lines[549:599])
    for few, seen in ((20, []), (60, ["loss_spike"])):
        for line in lines:
            line["num_loss_tokens"] = few if line["step"] == 600 else 60
        lines[599]["train_mean_nll"] = 3.5 * usual
        assert kinds(lines) == seen


def test_what_lasts_is_reported_once_and_again_after_a_quiet_stretch():
    def jumps(step, usual):
        return {300: 12.0, 302: 14.0, 700: 12.0, 702: 14.0}.get(step, usual)

    events = HealthMonitor().see_all(record(train_mean_nll=jumps))
    assert [event["step"] for event in events] == [300, 700]


def run_command(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["health", *map(str, words)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_a_run_that_over_fits_says_so_in_its_lines_its_events_and_afterwards(config_of, capsys):
    printed = []
    options = ("training.epochs=14", "training.learning_rate=0.02", "data.max_samples=12", "evaluation.every_steps=3")
    result = training.train(config_of(*options, "training.lr_schedule=constant"), print_line=printed.append)
    events = read_lines(result.folder / "events.jsonl")
    assert "over_fitting" in [event["kind"] for event in events]
    line = next(line for line in printed if line.startswith("warning: step") and "held-out loss rose" in line)
    assert "checkpoints/best" in line
    code, out, _ = run_command(capsys, result.folder, "--json")
    assert (code, [json.loads(line) for line in out.splitlines()]) == (0, events)


@pytest.mark.parametrize("kind", ["loss_spike", "over_fitting"])
def test_a_resumed_record_has_the_events_of_the_one_never_stopped(tmp_path, kind):
    """P2: the checks go on as if nothing had happened, whatever was seen in lines that are made again."""
    lines, files = CRAFTED[kind](), {}
    for name, stop in (("whole", None), ("stopped", 640)):
        (tmp_path / name).mkdir()
        first = RunRecord(tmp_path / name)
        for line in lines[:stop]:
            first.log(line["step"], line)
        position = first.position()
        if stop is not None:
            for step in range(700, 800):
                first.log(step, {**lines[stop - 1], "train_mean_nll": 99.0})
        first.close()
        record = RunRecord(tmp_path / name)
        record.rewind(position)
        for line in lines[len(lines) if stop is None else stop :]:
            record.log(line["step"], line)
        record.close()
        files[name] = (tmp_path / name / "events.jsonl").read_bytes()
    assert files["whole"] == files["stopped"]
    assert kind.encode() in files["whole"]


def test_a_diverged_run_ends_the_command_with_its_exit_code(config_of, capsys):
    options = ("training.learning_rate=1e30", "training.max_grad_norm=null", "training.max_skipped_steps=2")
    with pytest.raises(DivergedError):
        training.train(config_of(*options, name="wild"))
    code, out, _ = run_command(capsys, "wild", "--runs", config_of().config.run.output_dir)
    assert code == 7
    assert "error" in out
    assert "diverged" in out


def figures(*, gpu=None, own=1.0, everyone=0.4):
    """A minute of system.jsonl on a machine of eight processors."""
    gpus = [] if gpu is None else [{"use": gpu}]
    line = {"cpu_use": everyone, "cpu_count": 8, "process_cpus": own, "gpus": gpus}
    return [{"time": 100.0 + 5 * number, **line} for number in range(12)]


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        (figures(gpu=0.95), None),
        (figures(gpu=0.2, own=1.0), "computed in 20% of the time: the processor's work"),
        (figures(gpu=0.2, own=0.3), "the steps are small"),
        (figures(gpu=0.2, own=1.0, everyone=0.97), "other programs keep the processors busy"),
        (figures(own=7.5, everyone=0.97), None),
        (figures(own=2.0, everyone=0.97), "this run had 2.0 of 8 processors while all were busy"),
        (figures(gpu=0.1)[:3], None),
        ([], None),
    ],
)
def test_low_use_of_the_device_is_said_with_its_likely_cause(tmp_path, lines, seen):
    write_lines(tmp_path / "system.jsonl", lines)
    (tmp_path / "run.json").write_text('{"run_id": "0", "state": "finished"}')
    messages = [event["message"] for event in health_of(tmp_path)]
    assert len(messages) == (seen is not None)
    assert all(seen in message for message in messages)


def test_a_quiet_run_is_said_to_be_quiet(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"run_id": "0", "state": "finished"}')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record()))
    code, out, err = run_command(capsys, tmp_path)
    assert (code, out) == (0, "")
    assert "nothing looked wrong" in err
