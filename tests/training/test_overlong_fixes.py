"""What the error for an over-long row proposes is what the config of that method takes, and nothing else."""

import json

import pytest

from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.errors import ConfigError, DataError
from llmtune.prepare import prepare

LONG = "word " * 60
ROWS = {
    "sft": {"prompt": "a", "completion": LONG},
    "dpo": {"prompt": "a", "chosen": LONG, "rejected": "c"},
    "kto": {"prompt": "a", "completion": LONG, "label": True},
    "orpo": {"prompt": LONG, "chosen": "b", "rejected": "c"},
    "reward": {"prompt": "a", "chosen": "b", "rejected": LONG},
    "classification": {"text": LONG, "label": "good"},
    "grpo": {"prompt": LONG},
}
POLICIES = ("drop", "truncate_right", "truncate_left", "split")
NEEDED = {"grpo": ("objective.rewards={length: 1.0}", "objective.max_new_tokens=8")}


@pytest.fixture
def settings(tiny_model_folder, tmp_path):
    """The settings of a method whose second row is too long."""

    def settings(method, *more):
        path = tmp_path / "rows.jsonl"
        short = {key: value if value != LONG else "b d" for key, value in ROWS[method].items()}
        short |= {"label": "bad"} if method == "classification" else {}
        path.write_text("".join(json.dumps(row) + "\n" for row in (short, ROWS[method])))
        return [f"model.name={tiny_model_folder}", f"data.train={path}", f"data.cache_dir={tmp_path}",
                "data.test_size=0", f"objective.method={method}", *NEEDED.get(method, ()), *more]  # fmt: skip

    return settings


def accepted(words):
    """The policies that a config with these settings takes."""
    taken = set()
    for policy in POLICIES:
        try:
            load_config(None, overrides=[*words, f"data.overlong={policy}"], environ={})
        except ConfigError:
            continue
        taken.add(policy)
    return taken


@pytest.mark.parametrize("method", ROWS)
def test_the_policies_that_are_proposed_are_those_that_serve(settings, method):
    words = settings(method, "data.max_length=32")
    with pytest.raises(DataError) as refusal:
        prepare(load_config(None, overrides=words, environ={}), Options())
    (problem,) = refusal.value.problems
    assert {policy for policy in POLICIES if policy in problem.fix} == accepted(words)
    for policy in accepted(words) - {"drop"}:
        made = prepare(load_config(None, overrides=[*words, f"data.overlong={policy}"], environ={}), Options())
        assert max(made.data.train.lengths) <= 32
