"""Issue 6: a run from Python is the command line's run, with the loop in the caller's hands."""

import random

import numpy as np
import pytest
import torch

import llmtune
from llmtune import Curve, Stop, Trainer, load_config, train, train_single_model
from llmtune.errors import ConfigError, UsageError
from llmtune.runs.folder import RunFolder
from training_helpers import lines_of, weights_of


def quiet(line):
    """Say nothing."""


def test_a_result_has_the_model_the_tokenizer_the_metrics_and_the_folder(whole):
    assert whole.state == "finished"
    assert whole.folder.is_dir()
    assert whole.metrics["step"] == whole.step == 10
    assert {"train_mean_nll", "eval_mean_nll"} <= whole.metrics.keys()
    ids = whole.tokenizer("the user asks", return_tensors="pt").input_ids
    assert whole.model(input_ids=ids).logits.shape[:2] == ids.shape


def test_a_config_may_be_given_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("extends: production\nrun:\n  seed: 7\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", tmp_path / "mine.yaml"):
        assert Trainer(name, print_line=quiet).config.config == load_config("mine.yaml").config
    with pytest.raises(ConfigError, match="no preset or file `tset`\n  fix: did you mean `test`"):
        train("tset")


def test_the_users_loop_trains_the_very_same_model(config_of, whole):
    trainer = Trainer(config_of(name="loop"), print_line=quiet)
    steps = [step.step for step in trainer.steps()]
    assert steps == list(range(1, 11))
    assert weights_of(trainer.result().folder) == weights_of(whole.folder)
    assert lines_of(trainer.result().folder) == lines_of(whole.folder)


def test_leaving_the_loop_saves_the_run_and_it_goes_on_to_the_same_weights(config_of, whole):
    trainer = Trainer(config_of(name="left"), print_line=quiet)
    for step in trainer.steps():
        if step.step == 4:
            break
    result = trainer.result()
    assert (result.state, result.step) == ("stopped", 4)
    assert (result.folder / "checkpoints" / "step-000004").is_dir()
    again = Trainer.resume(result.folder, print_line=quiet)
    assert [step.step for step in again.steps()] == [5, 6, 7, 8, 9, 10]
    assert weights_of(result.folder) == weights_of(whole.folder)
    assert lines_of(result.folder) == lines_of(whole.folder)
    drawn, record = again.curve, Curve.of_run(whole.folder)
    assert (drawn.train, drawn.heldout) == (
        record.train,
        record.heldout,
    )  # the picture of a resumed run shows the whole run


def test_looking_saving_and_generating_between_steps_change_nothing_n12(config_of, whole):
    trainer = Trainer(config_of(name="looked"), print_line=quiet)
    for step in trainer.steps():
        assert not (trainer.session.run.checkpoints / f"step-{step.step:06}").is_dir() or step.step in (3, 6, 9, 10)
        assert trainer.evaluate()["eval_mean_nll"] > 0
        (answer,) = trainer.generate("the user asks", max_new_tokens=4, temperature=1.0)
        assert answer.num_tokens <= 4
        trainer.save()
        assert (trainer.session.run.checkpoints / f"step-{step.step:06}").is_dir()
    assert weights_of(trainer.result().folder) == weights_of(whole.folder)


def test_the_rate_may_be_replaced_between_two_steps(config_of):
    trainer = Trainer(config_of(name="rate"), print_line=quiet)
    seen = []
    for step in trainer.steps():
        seen.append(step.learning_rate)
        trainer.learning_rate = 0.001 if step.step == 1 else lambda done: done / 1000
        if step.step == 3:
            assert trainer.learning_rate == 0.003
            break
    assert seen == [0.01, 0.001, 0.002]


def test_an_error_in_the_users_loop_leaves_a_saved_run_when_the_block_ends(config_of):
    trainer = Trainer(config_of(name="broken"), print_line=quiet)

    def loop():
        with trainer:
            for step in trainer.steps():
                step.step // (step.step - 2)

    with pytest.raises(ZeroDivisionError):
        loop()
    assert (trainer.result().state, trainer.result().step) == ("stopped", 2)
    with RunFolder.open(trainer.result().folder) as run:  # the lock is free
        assert run.info["state"] == "stopped"


def test_a_run_none_of_whose_steps_was_asked_for_is_let_go_and_can_begin_later(config_of, whole):
    with Trainer(config_of(name="waiting"), print_line=quiet) as trainer:
        assert trainer.model is not None
        trainer.steps()
    assert trainer.result().state == "stopped"
    again = Trainer.resume(trainer.result().folder, print_line=quiet)
    assert weights_of(again.train().folder) == weights_of(whole.folder)


def test_a_run_has_one_loop(config_of):
    trainer = Trainer(config_of(name="once"), print_line=quiet)
    steps = trainer.steps()
    next(steps)
    with pytest.raises(UsageError, match="under way"):
        trainer.steps()
    trainer.close()
    with pytest.raises(UsageError, match="has ended"):
        trainer.steps()
    assert trainer.evaluate()["eval_mean_nll"] > 0  # the model is still here
    assert next(steps, None) is None


def test_metrics_stand_beside_ours_in_the_same_line(config_of, whole):
    class Perplexity:
        def on_step(self, step):
            return {"train_perplexity": np.exp(step.train_mean_nll), "nothing": float("nan")}

    class Mine(Trainer):
        def on_step(self, step):
            return {"twice": torch.tensor(2.0) * step.step}

    trainer = Mine(
        config_of(name="measured"), metrics=[Perplexity(), lambda step: {"square": step.step**2}], print_line=quiet
    )
    folder = trainer.train().folder
    lines = [line for line in lines_of(folder) if "square" in line]
    assert [line["square"] for line in lines] == [n * n for n in range(1, 11)]
    assert all(line["twice"] == 2 * line["step"] and line["nothing"] is None for line in lines)
    assert all(line["train_perplexity"] == pytest.approx(np.exp(line["train_mean_nll"])) for line in lines)
    assert trainer.result().metrics["square"] == 100


def test_a_metric_that_fails_draws_lies_or_exits_changes_nothing_and_is_said_once(config_of, whole):
    said = []

    def broken(step):
        raise ValueError("no such luck")

    def leaving(step):
        raise SystemExit(3)

    def drawing(step):
        random.random(), np.random.rand(), torch.rand(1)

    def lying(step):
        return {"train_mean_nll": 0.0, "listed": [1]}

    trainer = Trainer(config_of(name="hostile"), metrics=[broken, leaving, drawing, lying], print_line=said.append)
    assert trainer.train().state == "finished"
    assert weights_of(trainer.result().folder) == weights_of(whole.folder)
    assert lines_of(trainer.result().folder) == lines_of(whole.folder)
    warnings = [line for line in said if line.startswith("warning: metric")]
    assert len(warnings) == 4
    assert warnings[0] == "warning: metric broken failed at step 1: ValueError: no such luck"


def test_a_metric_ends_the_run_only_by_saying_so_and_leaves_it_resumable(config_of, whole):
    said = []
    trainer = Trainer(
        config_of(name="enough"),
        metrics=[lambda step: Stop("enough") if step.step == 3 else None],
        print_line=said.append,
    )
    assert [step.step for step in trainer.steps()] == [1, 2, 3]
    assert trainer.result().state == "stopped"
    assert "stopped: enough; `llmtune resume` goes on" in said
    assert weights_of(Trainer.resume(trainer.result().folder, print_line=quiet).train().folder) == weights_of(
        whole.folder
    )


@pytest.mark.parametrize("returned", [None, True, False, {}, "Stop", {"stop": True}, StopIteration, Stop])
def test_a_metric_that_does_not_return_stop_itself_does_not_end_the_run(config_of, returned):
    """Issue 6: "never able to change or stop the run unless it returns so".

    Words, truths and the class itself do not say so.
    """
    trainer = Trainer(
        config_of("training.max_steps=2", name="unmoved"), metrics=[lambda step: returned], print_line=quiet
    )
    assert [step.step for step in trainer.steps()] == [1, 2]
    assert trainer.result().state == "finished"


def test_a_rate_that_is_set_is_the_rate_the_next_update_takes(config_of):
    """A rate of 0 leaves every weight as it is; the config's own rate does not."""

    def moved(name, rate):
        trainer = Trainer(config_of("training.max_steps=2", name=name), print_line=quiet)
        steps = trainer.steps()
        next(steps)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        if rate is not None:
            trainer.learning_rate = rate
        step = next(steps)
        trainer.close()
        assert rate is None or step.learning_rate == rate
        return any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())

    assert moved("given", None)
    assert not moved("nothing", 0.0)


def test_what_is_no_metric_is_refused(config_of):
    with pytest.raises(UsageError, match="7 is no metric"):
        Trainer(config_of(name="seven"), metrics=[7], print_line=quiet).steps()


def test_a_trainer_and_a_folder_show_the_curve(config_of, whole):
    trainer = Trainer(config_of("run.name=a<b"), print_line=quiet)
    assert "not begun" in trainer._repr_html_()
    trainer = Trainer(config_of(name="shown"), print_line=quiet)
    trainer.train()
    page = trainer._repr_html_()
    assert "finished, step 10 of 10" in page
    assert page.count("<svg") == page.count("</svg>") >= 5
    assert "clipped above" in page
    assert "<script" not in page
    read = Curve.of_run(trainer.result().folder)
    assert (read.train, read.heldout) == (trainer.curve.train, trainer.curve.heldout)
    assert [step for step, _ in read.heldout] == [0, 4, 8, 10]


def test_the_issues_own_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = {"model.architecture.d_model": 32, "model.architecture.n_layers": 1, "model.architecture.vocab_size": 400}
    monkeypatch.setattr(
        "llmtune.api.trainer.load_config", lambda name, overrides: load_config(name, overrides=overrides | tiny)
    )
    trainer, metrics = train_single_model(
        model_name="custom-tiny",
        config_type="test",
        max_samples=4,
        project_name="notebook-experiment",
        print_line=quiet,
    )
    assert trainer.config.config.tracking.project == "notebook-experiment"
    assert metrics["step"] == trainer.result().step
    config = load_config("production", overrides={"model.name": "custom-small"})
    assert (config.config.model.name, config.config.training.epochs) == ("custom-small", 3)


def test_overrides_are_a_mapping_or_key_value_texts_and_problems_name_them():
    one = load_config("test", overrides={"training.batch_size": 4, "data.train": ["a.jsonl"], "run": {"seed": 8}})
    two = load_config("test", overrides=["training.batch_size=4", "data.train=[a.jsonl]", "run.seed=8"])
    assert one.config == two.config
    with pytest.raises(ConfigError, match=r"(?s)overrides.*lerning_rate"):
        load_config("test", overrides={"training.lerning_rate": 1})


def test_the_package_names_what_it_exports():
    assert set(llmtune.__all__) <= set(dir(llmtune))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        llmtune.trian  # noqa: B018
