"""Rewards: the rows of the table, and functions of the user's own by the contract that everyone uses."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from llmtune.config.schema import ObjectiveConfig
from llmtune.errors import ConfigError, UsageError
from llmtune.evaluation.rewards import REWARDS, AnswerGroup, find_rewards, total_reward
from llmtune.models.read_config import quiet_libraries


def group(*answers, reference=None, columns=None, ids=None):
    ids = ids if ids is not None else [[1] * len(answer) for answer in answers]
    return AnswerGroup("rows.jsonl:3", "2 + 2?", answers, ids, reference, columns or {})


def judge(name, *answers, reference=None, ids=None, **settings):
    return list(REWARDS[name](ObjectiveConfig("grpo", **settings))(group(*answers, reference=reference, ids=ids)))


RECORD = '{"name": "Ada", "age": 36, "tags": ["a", "b"]}'


@pytest.mark.parametrize(
    ("name", "reference", "answers", "rewards"),
    [
        ("exact", "4", ["4", " 4\n", "5"], [1.0, 1.0, 0.0]),
        ("contains", "Paris", ["It is paris.", "Rome"], [1.0, 0.0]),
        ("number", "so 4", ["4.0", "5", "none"], [1.0, 0.0, 0.0]),
        ("json_fields", RECORD, [RECORD, '{"name": "Ada"}', "Ada", '{"age": 36, "name": "Bob", "tags": ["a", "b"]}'],
         [1.0, 1 / 3, 0.0, 2 / 3]),
        ("json_fields", RECORD, [RECORD[:-1] + ', "more": 1}', f"Here: {RECORD}", "[1]"], [0.75, 0.0, 0.0]),
    ],
)  # fmt: skip
def test_rewards_compare_with_the_row_s_answer(name, reference, answers, rewards):
    assert judge(name, *answers, reference=reference) == pytest.approx(rewards)


@pytest.mark.parametrize("name", ["exact", "contains", "f1", "number", "json_fields"])
def test_a_row_without_an_answer_is_not_judged(name):
    assert judge(name, "4", "5") == [None, None]


def test_a_pattern_is_looked_for_in_the_answer():
    assert judge("regex", "<answer>4</answer>", "4", reward_pattern=r"<answer>.*</answer>") == [1.0, 0.0]
    with pytest.raises(ConfigError, match="is no regular expression"):
        judge("regex", "4", reward_pattern="(")


def test_only_the_last_quarter_of_the_length_is_punished():
    ids = [[0] * length for length in (10, 75, 80, 100)]
    assert judge("length", *"abcd", ids=ids, max_new_tokens=100) == pytest.approx([0.0, 0.0, -0.2, -1.0])


def test_the_sum_leaves_out_rewards_that_do_not_judge(tmp_path):
    rewards = find_rewards(ObjectiveConfig("grpo", rewards={"exact": 2.0, "number": 0.5}))
    assert total_reward(rewards, {"exact": 1.0, "number": 1.0}) == 2.5
    assert total_reward(rewards, {"exact": None, "number": 1.0}) == 0.5
    assert total_reward(rewards, {"exact": None, "number": None}) is None


# --- functions of the user's own


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def by_column(prompts, completions, completion_ids, level, **columns):\n"
        "    assert prompts == ['2 + 2?'] * 2 and columns['answer'] == ['4', '4']\n"
        "    return [len(ids) * step for ids, step in zip(completion_ids, level)]\n"
        "def some(prompts, completions, **columns):\n"
        "    return [None if text == 'skip' else 1 for text in completions]\n"
        "def fails(completions, **columns):\n"
        "    return [1 / 0 for _ in completions]\n"
        "def too_few(**columns):\n    return [1.0]\n"
        "def text(completions, **columns):\n    return ['good'] * len(completions)\n"
        "def nan(completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "def one_for_all(**columns):\n    return 0.5\n"
        "def nothing(**columns):\n    pass\n"
        "def later(completions, **columns):\n    return (1 / 0 for text in completions)\n"
        "def of_a_score(prompt, reference, answer):\n    return 1\n"
        "def by_numpy(completions, **columns):\n"
        "    import numpy\n"
        "    return numpy.array([len(text) for text in completions], dtype=numpy.float32)\n"
        "def by_torch(completions, **columns):\n"
        "    import torch\n"
        "    return torch.tensor([len(text) for text in completions])\n"
    )
    return path


def own(path, name, *answers, **more):
    (reward,) = find_rewards(ObjectiveConfig("grpo"), [f"{path}:{name}"])
    return list(reward.judge(group(*answers, **more)))


def test_a_function_is_given_prompts_completions_ids_and_every_column(reward_file):
    assert own(reward_file, "by_column", "4", "five", reference="4", columns={"level": 2}) == [2.0, 8.0]
    assert own(reward_file, "some", "skip", "go") == [None, 1.0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("fails", "the reward failed on the answers to rows.jsonl:3: ZeroDivisionError"),
        ("too_few", "gave 1 numbers for the 2 answers to rows.jsonl:3"),
        ("text", "of an answer to rows.jsonl:3 is 'good'"),
        ("nan", "of an answer to rows.jsonl:3 is nan"),
        ("one_for_all", "gave 0.5 for the 2 answers to rows.jsonl:3"),
        ("nothing", "gave None for the 2 answers to rows.jsonl:3"),
        ("later", "the reward failed on the answers to rows.jsonl:3: ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_names_the_row(reward_file, name, problem):
    with pytest.raises(UsageError) as refusal:
        own(reward_file, name, "a", "b")
    assert problem in str(refusal.value)


@pytest.mark.parametrize("name", ["by_numpy", "by_torch"])
def test_numbers_of_other_libraries_are_numbers(reward_file, name):
    rewards = own(reward_file, name, "a", "bcd")
    assert rewards == [1.0, 3.0]
    assert {type(reward) for reward in rewards} == {float}


def test_a_field_that_an_argument_would_hide_is_named(reward_file):
    with pytest.raises(UsageError, match=r"the field `completions` of rows\.jsonl:3 has the name"):
        own(reward_file, "some", "a", columns={"completions": 1})


def test_a_weight_stands_behind_the_function(reward_file):
    (reward,) = find_rewards(ObjectiveConfig("grpo"), [f"{reward_file}:some=0.25"])
    assert (reward.name, reward.weight) == ("some", 0.25)


@pytest.mark.parametrize(
    ("functions", "problem"),
    [
        ((), "none is named"),
        (("exact",), "names no function"),
        (("no.py:f",), "there is no file `no.py`"),
        (("{file}:other",), "has no function `other`"),
        (("{file}:some=much",), "the weight `much` is no number"),
        (("{file}:some", "{file}:some"), "two rewards are called `some`"),
        (("{file}:of_a_score",), "`of_a_score` does not take what it is given: "),
    ],
)
def test_rewards_that_cannot_be_used_are_refused_before_anything_is_loaded(reward_file, functions, problem):
    with pytest.raises((ConfigError, UsageError)) as refusal:
        find_rewards(ObjectiveConfig("grpo"), [text.format(file=reward_file) for text in functions])
    assert problem in str(refusal.value)


@pytest.fixture(scope="module")
def reward_model(tiny_model_folder, tiny_tokenizer, tmp_path_factory):
    """A folder with a reward model of random weights."""
    folder = tmp_path_factory.mktemp("scores")
    config = LlamaConfig.from_pretrained(tiny_model_folder, num_labels=1)
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_prompt_and_answer_as_transformers_does(reward_model, tiny_tokenizer):
    settings = ObjectiveConfig("grpo", rewards={"model": 0.5}, reward_model=str(reward_model))
    (reward,) = find_rewards(settings, no_cuda=True)
    answers = ("the words", "a small system of numbers", "")
    found = reward.judge(group(*answers, columns={"question": "2 + 2?"}))
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    expected = []
    for answer in answers:
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]
        ids = tiny_tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        expected.append(model(ids).logits.item())
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(set(found)) == 3
    assert len(reward.code) == 64


def test_a_model_that_gives_no_single_score_is_no_reward(tiny_model_folder):
    with pytest.raises(ConfigError, match="gives text, and a reward is one score"):
        find_rewards(ObjectiveConfig("grpo", rewards={"model": 1.0}, reward_model=str(tiny_model_folder)), no_cuda=True)
