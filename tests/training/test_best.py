"""The best model: how it is chosen, when it becomes the result, and how every command takes it by name."""

import json

import pytest

from llmtune.cli.main import main
from llmtune.common.records import is_better
from llmtune.config.process_options import Options
from llmtune.errors import ConfigError
from llmtune.evaluation.scores import SCORES
from llmtune.runs.checkpoint import save_folder
from llmtune.training import train as training
from llmtune.training.evaluator import EvalState
from llmtune.training.progress import final_facts
from training_helpers import LORA

EVERY = ("evaluation.every_steps=1", "training.lr_schedule=constant")
RISING = (*EVERY, "training.learning_rate=0.1", "training.max_steps=2")
"""After the second step the held-out loss is worse than after the first."""
EARLY = (*RISING, "training.max_steps=3", "evaluation.early_stopping_patience=1")
EARLY_LORA = (*EARLY, *LORA, "training.learning_rate=0.02", "training.max_steps=5")


def weights(run, name):
    (file,) = (run / "checkpoints" / name).glob("*model.safetensors")
    return file.read_bytes()


def best_step(run):
    return json.loads((run / "checkpoints" / "best" / "manifest.json").read_text())["step"]


def values(run, metric="eval_mean_nll"):
    """Value of the metric by step, of evaluations after at least one step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[metric] for line in lines if metric in line and line["step"]}


@pytest.mark.parametrize("settings", [EARLY, EARLY_LORA], ids=["full", "lora"])
def test_after_early_stopping_the_result_is_the_best_model(config_of, settings):
    result = training.train(config_of(*settings))
    losses = values(result.folder)
    chosen = min(losses, key=losses.get)
    assert chosen < result.step, "the last model must not be the best one, or nothing is shown"
    assert best_step(result.folder) == result.final_step == chosen
    assert weights(result.folder, "final") == weights(result.folder, "best")
    assert f"after {chosen} of" in (result.folder / "final" / "README.md").read_text()


def test_the_result_is_the_last_model_unless_the_best_is_asked_for(config_of):
    last = training.train(config_of(*RISING, name="last"))
    best = training.train(config_of(*RISING, "checkpoint.final=best", name="best"))
    newest = max((last.folder / "checkpoints").glob("step-*")).name
    assert weights(last.folder, "final") == weights(last.folder, newest) != weights(last.folder, "best")
    assert weights(best.folder, "final") == weights(best.folder, "best") == weights(last.folder, "best")


def test_a_best_model_of_another_step_is_not_taken(config_of):
    run = training.train(config_of(*RISING, "checkpoint.final=best", "training.max_steps=1")).folder
    best = run / "checkpoints" / "best"
    files = {path.name: path.read_bytes() for path in best.iterdir() if path.name != "manifest.json"}
    write = lambda folder: [(folder / name).write_bytes(content) for name, content in files.items()]  # noqa: E731
    save_folder(best, write, {"step": 9})
    result = training.resume(str(run), overrides=["training.max_steps=2"], allow_changes=True)
    losses = values(run)
    assert min(losses, key=losses.get) == 1
    assert result.final_step == 2
    assert weights(run, "final") == weights(run, "step-000002") != weights(run, "best")


def test_a_result_asked_to_be_the_last_model_is_that_after_early_stopping_too(config_of):
    result = training.train(config_of(*EARLY, "checkpoint.final=last"))
    assert result.final_step == result.step != best_step(result.folder)


def test_the_best_model_is_one_that_was_trained_also_where_training_only_harms(config_of):
    result = training.train(config_of("training.learning_rate=5", "evaluation.every_steps=2", "training.epochs=1"))
    assert result.eval_state.best_step == 0
    losses = values(result.folder)
    assert best_step(result.folder) == min(losses, key=losses.get)


def test_the_best_model_is_chosen_by_the_metric_that_is_named(config_of):
    result = training.train(
        config_of(
            *RISING, "training.max_steps=3", "evaluation.best_by=eval_exact_answers", "evaluation.exact_match=true"
        )
    )
    counts = values(result.folder, "eval_exact_answers")
    assert len(counts) > 2, "counted at every evaluation, because the choice needs it"
    assert counts[best_step(result.folder)] == max(counts.values())
    assert best_step(result.folder) == min(counts), "of equal ones the first"


def test_a_metric_that_no_evaluation_gives_ends_the_run_with_those_there_are(config_of):
    with pytest.raises(ConfigError, match="gives the metric `eval_words_mean_nll`; there are eval_mean_nll"):
        training.train(config_of("evaluation.best_by=eval_words_mean_nll"))


def test_a_run_of_a_version_without_these_keys_goes_on(config_of):
    """A key that came later keeps its default for a run that does not have it."""
    run = training.train(config_of("training.max_steps=2", "checkpoint.every_steps=1")).folder
    info = json.loads((run / "run.json").read_text())
    del info["identity"]["config"]["evaluation"]["best_by"], info["identity"]["config"]["checkpoint"]["final"]
    (run / "run.json").write_text(json.dumps(info))
    assert training.resume(str(run)).state == "finished"


@pytest.mark.parametrize(
    ("metric", "value", "than", "by", "better"),
    [
        ("eval_mean_nll", 1.0, 1.1, 0.0, True),
        ("eval_perplexity", 3.0, 3.0, 0.0, False),
        ("eval_bits_per_byte", 1.0, 1.1, 0.2, False),
        ("eval_exact_answers", 3, 2, 0.0, True),
        ("eval_score", 0.4, 0.5, 0.0, False),
        ("eval_dialogs_score", 0.9, 0.5, 0.3, True),
    ],
)
def test_whether_a_value_is_better(metric, value, than, by, better):
    assert is_better(metric, value, than, by=by) is better


def test_the_end_of_a_run_says_how_much_worse_the_result_is_and_the_command(tmp_path):
    state = EvalState(
        best_value=2.0, best_step=4, best_trained_value=2.0, best_trained_step=4, last_value=2.5, last_step=8
    )
    (fact,) = final_facts(state, final_step=8, run=tmp_path, has_best=True)
    assert str(fact) == (
        "final is worse than the best model by 0.5000 (eval_mean_nll, step 4); "
        f"use it with `llmtune generate {tmp_path} --checkpoint best`"
    )
    (fact,) = final_facts(state, final_step=4, run=tmp_path, has_best=True)
    assert str(fact) == "final is the model after step 4, the best by eval_mean_nll (2.0000)"
    state.best_value, state.best_step = 1.9, 0
    warning = final_facts(state, final_step=4, run=tmp_path, has_best=True)[-1]
    assert "warning: the model before training was better than final by 0.1000" in str(warning)


@pytest.fixture
def program(capsys):
    """Run one command line; return (exit code, stdout, stderr)."""

    def run_one(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run_one


def test_every_command_takes_a_checkpoint_by_its_name(config_of, program, rows_file, tmp_path):
    run = training.train(config_of(*EARLY_LORA, "checkpoint.keep_last=0", "checkpoint.every_steps=1")).folder
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    folders = {"best": "best", "last": steps[-1], "step-1": "step-000001", "step-000002": "step-000002"}
    for name, folder in folders.items():
        commands = [
            ("generate", run, "hello", "--max-new-tokens", "2"),
            ("evaluate", run, "--data", rows_file, "--json"),
        ]
        if name in ("best", "step-1"):
            commands.append(("merge-lora", run, "--output", tmp_path / f"merged-{name}"))
            commands.append(("export", run, "--output", tmp_path / f"exported-{name}"))
        for command in commands:
            code, _, err = program(*command, "--checkpoint", name, "--offline")
            assert code == 0, err
            assert f"{run}/checkpoints/{folder}" in err
    for made in ("merged", "exported"):
        one, other = ((tmp_path / f"{made}-{name}" / "model.safetensors").read_bytes() for name in ("best", "step-1"))
        assert one != other


def test_a_checkpoint_of_a_full_run_is_exported_with_the_tokenizer_of_the_run(config_of, program, tmp_path):
    run = training.train(config_of("training.max_steps=2", "checkpoint.every_steps=1")).folder
    code, _, err = program("export", run, "--checkpoint", "step-1", "--output", tmp_path / "one", "--offline")
    assert code == 0, err
    assert (tmp_path / "one" / "chat_template.jinja").is_file()


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(config_of, program, tiny_model_folder):
    run = training.train(config_of("training.max_steps=2", "checkpoint.every_steps=1")).folder
    code, _, err = program("generate", run, "hello", "--checkpoint", "step-7")
    assert code == 2
    assert "has no checkpoint `step-7`" in err
    assert "choose one of: last, final, best, step-000002, step-000001" in err
    code, _, err = program("generate", tiny_model_folder, "hello", "--checkpoint", "best")
    assert code == 2
    assert "is no run, so it has no checkpoints" in err


def test_answers_are_judged_at_every_evaluation_and_can_choose_the_best_model(config_of, tmp_path):
    seen = tmp_path / "seen.jsonl"
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def few(prompt, reference, answer):\n"
        f"    with open({str(seen)!r}, 'a') as file:\n"
        "        file.write(json.dumps([prompt, reference, answer]) + '\\n')\n"
        "    return -len(answer)\n"
    )
    options = Options(score=f"{tmp_path / 'mine.py'}:few")
    settings = (*RISING, "evaluation.best_by=eval_score", "evaluation.max_new_tokens=8")
    with pytest.raises(ConfigError, match="nothing judges them"):
        training.train(config_of(*settings), Options())
    assert not (tmp_path / "runs").exists()
    scores = values(training.train(config_of(*settings), options).folder, "eval_score")
    assert set(scores) == {1, 2}
    judged = [json.loads(line) for line in seen.read_text().splitlines()]
    rounds = [judged[at : at + 4] for at in range(0, len(judged), 4)][-2:]  # four held-out rows
    assert list(scores.values()) == pytest.approx([-sum(len(row[2]) for row in rows) / 4 for rows in rounds])
    built_in = values(training.train(config_of(*RISING, "evaluation.score=f1"), Options()).folder, "eval_score")
    expected = [sum(SCORES["f1"](*row) for row in rows) / 4 for rows in rounds]
    assert list(built_in.values()) == pytest.approx(expected)
    assert best_step(tmp_path / "runs" / "run") == max(scores, key=lambda step: (scores[step], -step))
