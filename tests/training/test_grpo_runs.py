"""Whole runs of GRPO: they earn more, and a run that was stopped ends as the run that never was."""

import json
from functools import partial

import pytest

from llmtune.cli.main import run as command
from llmtune.config.dump import config_to_yaml
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.errors import CheckpointError, ConfigError, UsageError
from llmtune.evaluation.rewards import AnswerGroup
from llmtune.training import rollouts
from llmtune.training import train as training
from llmtune.training.training_run import TrainingRun
from llmtune.verify.numbers import verify_batching, verify_packing
from rank_helpers import in_two_ranks
from training_fixtures import WORDS
from training_helpers import LORA, comparing_run, lines_of, stopped_after, weights_of


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{WORDS[at]} {at}"}], "answer": WORDS[-at]} for at in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def resolve(tiny_model_folder, prompts_file, tmp_path):
    """The config of a short GRPO run on the prompts; further KEY=VALUE on top."""
    basis = (
        "data.test_size=2",
        "data.max_length=128",
        "objective.method=grpo",
        "objective.num_generations=4",
        "objective.max_new_tokens=6",
        "objective.rewards={regex: 1.0, length: 0.2}",
        "objective.reward_pattern='[aeiou]'",
        "training.max_steps=4",
    )
    return partial(comparing_run, tiny_model_folder, prompts_file, tmp_path, *basis)


@pytest.fixture
def stopped(resolve):
    """Run so many steps and leave the run; returns its folder."""

    def stopped(count, *settings, options=None, name="stopped"):
        return stopped_after(count, resolve(*settings, name=name), options)

    return stopped


def test_a_run_earns_more_than_before(resolve):
    settings = ("training.max_steps=12", "training.lr_schedule=constant", "objective.num_generations=12")
    result = training.train(resolve(*settings))
    lines = lines_of(result.folder)
    steps = [line for line in lines if "reward" in line]
    assert sum(line["reward"] for line in steps[-3:]) > sum(line["reward"] for line in steps[:3]) + 0.3
    first, last = lines[0], lines[-1]
    assert last["eval_reward"] > first["eval_reward"]
    assert result.eval_state.best_by == "eval_reward"
    assert {"entropy", "reward_std", "answer_tokens", "truncated", "reward_regex", "reward_length"} <= steps[0].keys()
    assert steps[0]["num_sequences"] == steps[0]["num_answers"] == 24
    assert steps[0]["clipped"] == 0.0  # one step a round: every step is made by the policy that drew


def test_drawn_answers_and_their_rewards_are_recorded(resolve):
    run = training.train(resolve("training.max_steps=2")).folder
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2]
    questions = [f"\n{WORDS[at]} {at}<|im_end|>" for at in range(1, 9)]
    for best, worst in zip(samples[::2], samples[1::2], strict=True):
        assert best["prompt"] == worst["prompt"]
        assert sum(question in best["prompt"] for question in questions) == 1
        assert best["reward"] >= worst["reward"]
        for sample in (best, worst):
            rewards = sample["rewards"]
            assert rewards["regex"] == float(any(vowel in sample["text"] for vowel in "aeiou"))
            assert sample["reward"] == pytest.approx(rewards["regex"] + 0.2 * rewards["length"])


ROUND = ("objective.steps_per_generation=3", "objective.clip=0.01", "objective.clip_high=0.01")
KINDS = {
    "one step a round": (),
    "rounds of three steps": ROUND,
    "with kl": ("objective.beta=0.1", "objective.steps_per_generation=2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_p2_a_stopped_run_resumes_to_the_same_bytes(resolve, stopped, kind):
    """Also in the middle of a round, whose answers were drawn by weights that are gone."""
    whole = whole_run_equal_to_a_stopped_one(resolve, stopped, KINDS[kind])
    if kind == "rounds of three steps":
        ratios = [line["clipped"] for line in lines_of(whole) if "clipped" in line]
        assert ratios[0] == ratios[3] == 0.0
        assert max(ratios) > 0.0  # from the second step of a round on, the policy has moved


def whole_run_equal_to_a_stopped_one(resolve, stopped, settings):
    settings = (*settings, "training.max_steps=5", "checkpoint.every_steps=1")
    whole = training.train(resolve(*settings, name="whole")).folder
    result = training.resume(stopped(2, *settings))
    assert result.state == "finished"
    assert lines_of(result.folder) == lines_of(whole)
    assert weights_of(result.folder) == weights_of(whole)
    assert (result.folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    return whole


def draws_counted(monkeypatch):
    """Seeds in the order of the draws: a resumed run begins to count anew."""
    numbers = iter(range(10**6))
    monkeypatch.setattr(rollouts, "answer_seed", lambda *_: next(numbers))


def answers_not_kept(monkeypatch):
    monkeypatch.setattr(rollouts.Rollouts, "state", lambda _: {})


@pytest.mark.parametrize("break_it", [draws_counted, answers_not_kept])
def test_a_round_that_is_drawn_otherwise_after_a_stop_is_found(resolve, stopped, monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        whole_run_equal_to_a_stopped_one(resolve, stopped, ROUND)


@pytest.mark.campaign
def test_p9_two_processes_give_the_numbers_of_one_and_go_on_to_the_same_bytes(resolve, tmp_path):
    """Both stop after two steps, inside of a round of three whose answers both had drawn."""
    settings = ("objective.steps_per_generation=3", "checkpoint.every_steps=1", "objective.beta=0.1", *LORA)
    settings += ("training.max_steps=5", "training.batch_size=3")
    alone = training.train(resolve(*settings, name="alone")).folder
    path = tmp_path / "shared.yaml"
    path.write_text(config_to_yaml(resolve(*settings, name="shared").config))
    shared, stopped = tmp_path / "runs" / "shared", tmp_path / "runs" / "stopped"

    def two_steps():
        stopped_after(2, load_config(str(path), overrides=["run.name=stopped"]))

    for work in (
        lambda: command(["train", "--config", str(path)]),
        two_steps,
        lambda: command(["resume", str(stopped)]),
    ):
        codes, said = in_two_ranks(work)
        assert codes == [0, 0], said
    assert weights_of(stopped) == weights_of(shared)
    assert lines_of(stopped) == lines_of(shared)
    assert len(lines_of(shared)) == len(lines_of(alone))
    for line, other in zip(lines_of(shared), lines_of(alone), strict=True):
        numbers = [key for key, value in other.items() if isinstance(value, int | float) and key in line]
        assert {"train_loss", "eval_reward"} & set(numbers)
        for key in numbers:
            assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


def test_with_a_beta_the_divergence_is_0_before_step_1_and_grows(resolve):
    lines = lines_of(training.train(resolve("objective.beta=0.1", *LORA)).folder)
    steps = [line["kl"] for line in lines if "kl" in line]
    assert steps[0] == 0.0
    assert steps[-1] > 0.0


def test_rewards_that_are_all_equal_change_no_weight(resolve):
    settings = ("objective.rewards={regex: 1.0}", "objective.reward_pattern=.*", "training.weight_decay=0")
    lines = lines_of(training.train(resolve(*settings)).folder)
    assert {line["grad_norm"] for line in lines if "grad_norm" in line} == {0.0}


# --- rewards of the user's own


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "calls = 0\n"
        "def vowels(prompts, completions, answer, **columns):\n"
        "    return [sum(letter in 'aeiou' for letter in text) / 10 for text in completions]\n"
        "def fails_later(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > 6: raise ValueError('no more')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    return path


def test_a_reward_of_ones_own_trains_and_is_needed_to_go_on(resolve, stopped, reward_file):
    options = Options(rewards=(f"{reward_file}:vowels",))
    run = stopped(2, options=options)
    with pytest.raises(CheckpointError, match=r"digests\.rewards"):
        training.resume(run)
    reward_file.write_text(reward_file.read_text().replace("/ 10", "/ 20"))
    with pytest.raises(CheckpointError, match=r"digests\.rewards"):
        training.resume(run, options=options)
    reward_file.write_text(reward_file.read_text().replace("/ 20", "/ 10"))
    assert training.resume(run, options=options).state == "finished"


def test_a_reward_that_fails_names_the_row_and_leaves_a_run_that_goes_on(resolve, reward_file, prompts_file):
    a_failing_reward_leaves_a_run_that_goes_on(resolve, reward_file, prompts_file)


def without_the_row(monkeypatch):
    monkeypatch.setattr(rollouts, "AnswerGroup", lambda _, *rest: AnswerGroup("some row", *rest))


def nothing_saved(monkeypatch):
    monkeypatch.setattr(TrainingRun, "_save_before_leaving", lambda *_: None)


@pytest.mark.parametrize("break_it", [without_the_row, nothing_saved])
def test_a_failing_reward_that_costs_the_run_is_found(resolve, reward_file, prompts_file, monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises((AssertionError, CheckpointError)):
        a_failing_reward_leaves_a_run_that_goes_on(resolve, reward_file, prompts_file)


def a_failing_reward_leaves_a_run_that_goes_on(resolve, reward_file, prompts_file):
    settings = ("evaluation.before_training=false", "data.test_size=0", "checkpoint.every_steps=100")
    whole = training.train(resolve(*settings, name="whole"), Options(rewards=(f"{reward_file}:vowels",))).folder
    options = Options(rewards=(f"{reward_file}:fails_later",))
    with pytest.raises(UsageError, match=rf"answers to .*{prompts_file.name}:\d+: ValueError: no more"):
        training.train(resolve(*settings, name="fails"), options)
    run = whole.parent / "fails"
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    result = training.resume(str(run), options=Options(rewards=(f"{reward_file}:vowels",)), allow_changes=True)
    assert (result.state, result.step) == ("finished", 4)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("objective.rewards={}", "objective.reward_pattern=null"), "none is named"),
        (("objective.rewards={best: 1.0}", "objective.reward_pattern=null"), "no reward of that name"),
        (("objective.rewards={exact: 1.0}",), "need each other"),
        (("data.packing=greedy",), "nothing can be packed"),
        (("objective.reference=precomputed",), "nothing about them can be precomputed"),
        (("evaluation.exact_match=true",), "judges held-out answers by its rewards"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(resolve, settings, problem):
    with pytest.raises(ConfigError) as refusal:
        training.train(resolve(*settings))
    assert problem in str(refusal.value)


@pytest.mark.parametrize("verify", [verify_batching, verify_packing])
def test_what_compares_rows_says_that_prompts_have_no_answers(resolve, verify):
    with pytest.raises(ConfigError, match="no answers before they are drawn"):
        verify(resolve(), Options(no_cuda=True), print_line=lambda _: None)


def test_a_reward_without_grpo_is_refused(reward_file):
    resolved = load_config(None, overrides=["data.train=x.jsonl"], environ={})
    with pytest.raises(UsageError, match="counts only with grpo"):
        training.train(resolved, Options(rewards=(f"{reward_file}:vowels",)))
