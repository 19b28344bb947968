"""`llmtune plan` and `llmtune doctor` as commands, and the plan's lines in a training (Q7)."""

import json
import platform
import sys

import pytest

from llmtune.cli import doctor
from llmtune.cli.main import run
from llmtune.config.process_options import Options
from llmtune.engine import allocator
from llmtune.plan.summary import comparison_facts
from llmtune.training import train as training
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401


def test_q7_plan_prints_one_json_object(tiny_model_folder, rows_file, capsys):  # noqa: F811
    arguments = [
        "plan",
        f"model.name={tiny_model_folder}",
        f"data.train={rows_file}",
        "training.precision=fp32",
        "--json",
        "--device",
        "24GB",
    ]
    assert run(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"]["total_steps"] == 9
    assert plan["fits"] is True
    assert plan["memory"]["peak_bytes"] == sum(plan["memory"]["parts"].values())


def test_plan_refuses_to_measure_elsewhere(capsys):
    assert run(["plan", "--measure", "--device", "24GB"]) == 2
    assert "--measure trains here" in capsys.readouterr().err


def test_q7_measured_steps_give_the_plan_its_time(tiny_model_folder, rows_file, capsys):  # noqa: F811
    arguments = ["plan", f"model.name={tiny_model_folder}", f"data.train={rows_file}", "--no-cuda", "--json"]
    assert run([*arguments, "--measure"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["tokens_per_second"] > 0
    assert measured["measured_peak_bytes"] > 0
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_second"] == measured["tokens_per_second"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_q7_a_plan_is_made_and_measured_with_the_allocator_of_a_training(tiny_model_folder, rows_file, monkeypatch):  # noqa: F811
    monkeypatch.setattr(allocator, "_tuned", [])
    assert run(["plan", f"model.name={tiny_model_folder}", f"data.train={rows_file}", "--no-cuda", "--json"]) == 0
    assert allocator._tuned == [allocator.LARGEST_BLOCK]


def test_q7_a_training_says_its_plan_first_and_compares_it_at_the_end(config_of):  # noqa: F811
    lines_printed = []
    resolved = config_of("training.batch_size=auto", "training.gradient_accumulation_steps=1", "training.max_steps=2")
    result = training.train(resolved, Options(no_cuda=True, offline=True), print_line=lines_printed.append)
    talk = "\n".join(lines_printed)
    assert "memory  " in talk
    assert "training.batch_size" in talk
    facts = comparison_facts(result.plan, steps=result.step, seconds=result.seconds, memory_bytes=result.memory_bytes)
    lines = [str(fact) for fact in facts]
    assert lines[0] == "steps   2 planned, 2 made"
    assert "measured" in lines[1]
    assert result.seconds > 0


def test_doctor_is_content_with_a_machine_on_which_the_tests_run(capsys):
    assert run(["doctor", "--json"]) == 0
    findings = {finding["what"]: finding for finding in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {
        "torch",
        "transformers",
        "peft",
        "jinja2",
        "cpu",
        "precision",
        "bitsandbytes",
        "disk",
        "cache",
        "network",
    } <= set(findings)
    assert all(finding["fix"] for finding in findings.values() if finding["state"] != "ok")


def test_doctor_exits_6_where_a_version_is_too_old(monkeypatch, capsys):
    monkeypatch.setitem(doctor.FLOORS, "torch", "99.0")
    assert run(["doctor"]) == 6
    out = capsys.readouterr().out
    assert "pip install 'torch>=99.0'" in out
    assert sys.version.split()[0] in out
