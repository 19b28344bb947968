"""`evaluate --tasks`: the loaded model is handed to lm-eval as it is, and its numbers come back.

lm-eval is an extra, so a stand-in keeps what it is asked for.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from llmtune.cli.tasks import print_tasks, run_tasks
from llmtune.errors import MachineError, UsageError
from llmtune.models.save import PromptDefaults


@pytest.fixture
def asked(monkeypatch):
    """What the stand-in was asked for."""
    calls = {}

    class Manager:
        def __init__(self, **options):
            calls["manager"] = options
            folders = options["include_path"] or []
            entry = (
                SimpleNamespace(yaml_path=f"{folders[0]}/facts.yaml") if folders else SimpleNamespace(yaml_path=None)
            )
            self.task_index = {"local_facts": entry}

    def evaluate(**options):
        calls["evaluate"] = options
        if "unknown" in options["tasks"]:
            raise KeyError("unknown")
        return {"results": {"local_facts": {"alias": "local_facts", "acc,none": 0.5, "acc_stderr,none": "N/A"}}}

    package, models, huggingface, tasks = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    package.simple_evaluate, tasks.TaskManager = evaluate, Manager
    huggingface.HFLM = lambda **options: SimpleNamespace(**options)
    for module in (package, models, huggingface, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


LOADED = SimpleNamespace(
    model=object(), tokenizer=object(), defaults=PromptDefaults("Be kind.", {"enable_thinking": False})
)


def run(*tasks, chat_template=False):
    return run_tasks(LOADED, tasks, chat_template=chat_template, batch_size=4, limit=7)


def test_the_model_in_memory_runs_the_task_of_a_file(asked, tmp_path):
    (tmp_path / "facts.yaml").write_text("task: local_facts\n")
    assert run(str(tmp_path / "facts.yaml")) == {"local_facts": {"acc": 0.5}}
    given = asked["evaluate"]
    assert (given["model"].pretrained, given["model"].tokenizer) == (LOADED.model, LOADED.tokenizer)
    assert (given["tasks"], given["limit"], given["model"].batch_size) == (["local_facts"], 7, 4)
    assert asked["manager"] == {"include_path": [str(tmp_path)], "include_defaults": False}


def test_a_name_is_looked_up_among_its_own_tasks(asked):
    run("hellaswag,arc_easy")
    assert asked["evaluate"]["tasks"] == ["hellaswag", "arc_easy"]
    assert asked["manager"] == {"include_path": None, "include_defaults": True}


@pytest.mark.parametrize(
    ("chats", "expected"), [(True, ("Be kind.", {"enable_thinking": False})), (False, (None, None))]
)
def test_chats_are_written_as_in_training_where_that_is_asked_for(asked, chats, expected):
    run("x", chat_template=chats)
    given = asked["evaluate"]
    assert given["apply_chat_template"] is chats
    assert (given["system_instruction"], given["model"].chat_template_args) == expected


def test_what_cannot_be_run_is_refused_with_a_fix(asked, monkeypatch):
    with pytest.raises(UsageError, match=r"there is no file `no.yaml`"):
        run("no.yaml")
    with pytest.raises(UsageError, match=r"(?s)lm-eval does not run this: .*unknown.*lm-eval ls tasks"):
        run("unknown")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MachineError, match=r'(?s)--tasks needs lm-eval.*pip install "llmtune\[tasks\]"'):
        run("x")


def test_results_are_a_table_or_json(capsys):
    print_tasks({"facts": {"acc": 0.5}}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"facts": {"acc": 0.5}}
    print_tasks({"facts": {"acc": 0.5}}, as_json=False)
    assert capsys.readouterr().out == "facts  acc                  0.5\n"
