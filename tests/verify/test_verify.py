"""The verifications themselves: they pass on what is right and fail on mutants of our own code."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llmtune import durable
from llmtune.cli.main import run as command
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.engine import forward
from llmtune.errors import CheckpointError
from llmtune.training import train as training
from llmtune.verify.file_checks import verify_checkpoint, verify_merge
from llmtune.verify.numbers import verify_batching, verify_packing
from llmtune.verify.result import Verdict
from llmtune.verify.resumed_run import verify_resume
from training_helpers import LORA, in_child


def silent(line):
    pass


@pytest.fixture
def resolved(tiny_model_folder, rows_file):
    return load_config(
        None, overrides=[f"model.name={tiny_model_folder}", f"data.train={rows_file}", *LORA], environ={}
    )


def test_n1_and_n4_verify_batching_passes_on_the_tiny_model(resolved):
    verdict = verify_batching(resolved, Options(), print_line=silent)
    assert verdict.passed, verdict.lines()
    assert len(verdict.findings) == 5


def test_verify_batching_fails_when_a_micro_batch_is_averaged_by_itself(resolved, monkeypatch):
    built = forward.build_engine

    def mean_of_means(*arguments, **named):
        made = built(*arguments, **named)
        return replace(made, nll_sum=lambda batch: made.nll_sum(batch) / batch.loss_weight)

    monkeypatch.setattr("llmtune.training.build.build_engine", mean_of_means)
    verdict = verify_batching(resolved, Options(), print_line=silent)
    assert not verdict.passed


def test_n5_verify_packing_passes_on_the_tiny_model(resolved):
    verdict = verify_packing(resolved, Options(), print_line=silent)
    assert verdict.passed, verdict.lines()


def test_n5_verify_packing_fails_when_packed_rows_see_each_other(resolved, monkeypatch):
    honest = forward.flat_nll_sum
    built = forward.build_engine

    def leaky(model, batch, **others):
        whole = batch.segments[[0, -1]]
        return honest(model, replace(batch, segments=whole), **others)

    def build(*arguments, **named):
        made = built(*arguments, **named)
        monkeypatch.setattr(forward, "flat_nll_sum", leaky)
        return made

    monkeypatch.setattr("llmtune.training.build.build_engine", build)
    verdict = verify_packing(resolved, Options(), print_line=silent)
    assert not verdict.passed


def test_p2_verify_resume_kills_through_the_real_command_line_and_passes(tiny_model_folder, rows_file):
    given = [f"model.name={tiny_model_folder}", f"data.train={rows_file}", *LORA, "training.batch_size=2"]
    assert command(["verify", "resume", "--steps", "6", "--kills", "1", *given]) == 0


def test_n13_verify_resume_asks_for_kernels_that_add_in_a_fixed_order(tmp_path, monkeypatch):
    """Flash attention's backward pass adds in another order each time, and the bytes of two equal runs would differ."""
    asked = []

    def refuse(arguments):
        asked.append(arguments)
        return SimpleNamespace(code=1, error="not here")

    monkeypatch.setattr("llmtune.verify.resumed_run.run_command", refuse)
    with pytest.raises(CheckpointError, match="not here"):
        verify_resume(None, [], tmp_path, steps=4, kills=1, print_line=silent)
    assert "training.deterministic=true" in asked[0]


def test_p5_verify_checkpoint_finds_every_damage_and_a_changed_byte(config_of):
    run = training.train(config_of(*LORA)).folder
    assert verify_checkpoint(run, print_line=silent).passed
    state = run / "checkpoints" / "final" / "README.md"
    state.write_text(state.read_text().replace("LoRA", "LORA", 1))
    assert not verify_checkpoint(run, print_line=silent).passed


def test_n8_verify_merge_passes_on_a_lora_run(config_of):
    run = training.train(config_of(*LORA)).folder
    assert verify_merge(run, offline=True, print_line=silent).passed


def test_a_verdict_without_findings_is_no_pass():
    assert not Verdict("nothing").passed


def test_a_run_that_lost_its_random_generators_is_told_from_the_unbroken_one(config_of, tmp_path, monkeypatch):
    """Tester's test: without the generators in the checkpoint, dropout differs after a resume and the comparison must
    say so.
    """
    from llmtune.verify.compare_runs import compare_runs

    whole = training.train(config_of(*LORA, name="whole")).folder
    stopped = tmp_path / "runs" / "stopped"
    in_child(
        lambda: training.train(config_of(*LORA, name="stopped")),
        kill_when=lambda: (stopped / "checkpoints" / "step-000003").is_dir(),
    )
    monkeypatch.setattr("llmtune.engine.state.restore_rng", lambda *given: None)
    training.resume(str(stopped))
    verdict = Verdict("resume")
    compare_runs(whole, stopped, verdict)
    assert not verdict.passed


def test_faults_are_counted_where_they_happen(tmp_path):
    from disk_faults import Counting

    with durable.use_backend(Counting()) as backend:
        durable.write_json(tmp_path / "a.json", {"a": 1})
    assert backend.count > 3
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
