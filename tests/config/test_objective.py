"""What `objective` contradicts is refused by name, and other toolkits' words for it are read."""

import pytest

from llmtune.config.layers import load_config
from llmtune.errors import ConfigError

REFUSED = {
    "beta without a method": ("objective.beta=0.2", "counts only where the method is"),
    "a key of another method": ("objective.method=dpo objective.gamma_beta_ratio=1", "counts only where"),
    "a loss of another method": ("objective.method=dpo objective.loss=apo_zero", "dpo has no such loss"),
    "smoothing of a hinge": (
        "objective.method=dpo objective.loss=hinge objective.label_smoothing=0.1",
        "sigmoid loss only",
    ),
    "no base": ("objective.method=dpo objective.reference=base", "there is no base to compare with"),
    "kto precomputed": ("objective.method=kto objective.reference=precomputed", "cannot be precomputed"),
    "rows of sft": ("objective.method=dpo data.format=alpaca", "not what this method learns from"),
    "single answers": ("objective.method=simpo data.format=unpaired", "not what this method learns from"),
    "pairs in sft": ("data.format=preference", "supervised fine-tuning compares none"),
    "a text column": ("objective.method=dpo data.text_column=body", "field of a text counts in supervised"),
    "splitting": ("objective.method=dpo data.overlong=split", "cannot be split"),
    "another mask": ("objective.method=dpo data.train_on=all_tokens", "their own tokens are trained"),
    "turn by turn": ("objective.method=dpo data.one_example_per_turn=true", "one prompt and its answers"),
    "noise": ("objective.method=dpo training.neftune_alpha=5", "noise on the embeddings is added in supervised"),
    "a weight": ("objective.method=dpo 'data.train=[{path: a.jsonl, weight: 0.5}]'", "weight of a source"),
    "a mixture": ("objective.method=dpo 'data.train=[{path: a.jsonl, repeat: 2}]'", "mixed by `repeat` and `share`"),
}


def resolved(words):
    import shlex

    return load_config(None, environ={}, overrides=shlex.split(words)).config


@pytest.mark.parametrize(("words", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_an_objective_contradicts_is_refused_with_a_fix(words, problem):
    with pytest.raises(ConfigError) as caught:
        resolved(words)
    (found,) = [one for one in caught.value.problems if problem in one.problem]
    assert found.fix


WORDS = {
    "stage: dpo\npref_beta: 0.3": {"method": "dpo", "beta": 0.3},
    "stage: sft": {"method": "sft"},
    "rl: ipo\nrl_beta: 0.2": {"method": "dpo", "loss": "ipo", "beta": 0.2},
    "pref_loss: orpo": {"method": "orpo"},
    "stage: grpo": {"method": "grpo"},
    "loss_type: hinge\nobjective: {method: dpo}": {"method": "dpo", "loss": "hinge"},
    "loss_type: apo_zero_unpaired\nrl: kto": {"loss": "apo_zero"},
    "rl: grpo\nnum_generations: 4\nmax_completion_length: 64\ntemperature: 0.7\nbeta: 0.04\nepsilon: 0.1\n"
    "epsilon_high: 0.3\nloss_type: dr_grpo\nscale_rewards: none\nmask_truncated_completions: true\n"
    "num_iterations: 1": {
        "method": "grpo",
        "num_generations": 4,
        "max_new_tokens": 64,
        "temperature": 0.7,
        "beta": 0.04,
        "clip": 0.1,
        "clip_high": 0.3,
        "loss": "dr_grpo",
        "scale_rewards": False,
        "mask_truncated": True,
    },
    "rl: grpo\nscale_rewards: group": {"scale_rewards": True},
    "rl: kto\nkto_desirable_weight: 1.5": {"method": "kto", "desirable_weight": 1.5},
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_other_toolkits_are_read(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n")
    objective = load_config(str(path), environ={}).config.objective
    assert {name: getattr(objective, name) for name in WORDS[text]} == WORDS[text]


WITHOUT_EQUAL = {
    "stage: ppo": "`dpo`, `kto` or `grpo`",
    "rl: gdpo": "kto or grpo",
    "rl: grpo\nloss_type: bnpo": "a loss of dpo, kto or grpo",
    "rl: grpo\nscale_rewards: batch": "among the answers to one prompt",
    "rl: grpo\nnum_iterations: 2": "learnt from once",
    "rl: grpo\nsteps_per_generation: 4": "counts micro-batches",
    "rl: grpo\nreward_weights: [1.0, 0.5]": "named with their weights",
    "epsilon: 1.0e-8": "counts only where the method is grpo",
}


@pytest.mark.parametrize("text", WITHOUT_EQUAL)
def test_a_word_of_another_toolkit_that_means_something_else_here_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=WITHOUT_EQUAL[text]):
        load_config(str(path), environ={})
