"""Issue 6, must show 6: every shipped and example config resolves, and plans: rows to examples to packs to exact steps.

The data of most situations lives on a hub. What is planned here is each config as it is written, on stand-in rows with
the fields of its data set and on the tiny model's tokenizer: everything but the numbers of rows and tokens is the
config's own.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from case_helpers import few_of
from llmtune.cli.main import run as command
from llmtune.config.layers import load_config
from llmtune.config.paths import shipped_path
from llmtune.config.process_options import Options
from llmtune.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SHIPPED = sorted(one for one in shipped_path("configs").glob("*.yaml"))
LOCAL = {"laptop-without-gpu", "from-scratch-stories"}

TEXT = "the user asks and the assistant answers a small system of words and numbers"
ROWS = {
    "auto": {
        "messages": [
            {"role": "user", "content": "the user asks {n}"},
            {"role": "assistant", "content": "a small system {n}"},
        ]
    },
    "alpaca": {"instruction": "the user asks {n}", "input": "", "output": "a small system {n}", "prompt": "not used"},
    "sharegpt": {
        "system": "a small system",
        "conversations": [
            {"from": "user", "value": "the user asks {n}"},
            {"from": "assistant", "value": "<think>words</think> numbers {n}"},
        ],
    },
    "text": {"text": TEXT + " {n} " + TEXT},
}


def rows_like(folder, row_format, count=40):
    """Write `count` different rows with the fields of that format."""
    path = folder / f"{row_format}.jsonl"
    path.write_text("".join(json.dumps(ROWS[row_format]).replace("{n}", str(n)) + "\n" for n in range(count)))
    return path


def test_all_configs_are_here():
    assert len(EXAMPLES) == 13
    assert len(SHIPPED) == 5
    assert len([*EXAMPLES, *SHIPPED]) >= 16


@pytest.mark.parametrize("path", [*SHIPPED, *EXAMPLES], ids=lambda path: path.stem)
def test_a_config_resolves_without_a_name_of_another_toolkit(path):
    resolved = load_config(str(path), environ={})
    assert resolved.notes == ()
    assert resolved.name == path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_situation_plans_as_it_is_written(path, tmp_path, tiny_model_folder):
    config = load_config(str(path), environ={}).config
    rows = rows_like(tmp_path, config.data.format)
    scratch = config.model.name.startswith("custom-")
    overrides = {
        "data.train": [str(rows)],
        "data.eval": [],
        "data.test_size": 4,
        "data.cache_dir": str(tmp_path),
        "data.num_workers": 1,
        **({"model.architecture.vocab_size": 400} if scratch else {"model.name": str(tiny_model_folder)}),
    }
    prepared = prepare(load_config(str(path), overrides=overrides, environ={}), Options(no_cuda=True, offline=True))
    used = prepared.data.ledger.summary()["train"]
    assert used["used"] == 36
    assert len(prepared.packs) < 36  # every situation packs
    assert len(prepared.data.eval) == 4
    plan = prepared.batch_plan()
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    assert plan.steps_per_epoch == -(-len(prepared.packs) // per_step)
    assert plan.total_steps == plan.steps_per_epoch * training.epochs


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory, tiny_tokenizer):
    """Random models of 1 layer x 32 in the architectures that the configs name, with a context that holds their
    longest rows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    folders = {}
    for kind in ("llama", "qwen3"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = AutoConfig.for_model(
            kind, **shape, vocab_size=len(tiny_tokenizer), max_position_embeddings=8192, bos_token_id=None
        )
        with torch.random.fork_rng():
            AutoModelForCausalLM.from_config(config).save_pretrained(folders[kind])
        tiny_tokenizer.save_pretrained(folders[kind])
    return folders


def stand_ins(path, tmp_path, tiny_models):
    """Overrides for what does not lie on this machine: the model, by one of its architecture, and rows, by some with
    the same fields.
    """
    config = load_config(str(path), environ={}).config
    small = [f"data.cache_dir={tmp_path}", "data.num_workers=1"]
    if config.model.name.startswith("custom-"):
        small += ["model.architecture.vocab_size=400", "model.architecture.n_layers=1"]
    else:
        small.append(f"model.name={tiny_models['qwen3' if config.model.name.startswith('qwen3') else 'llama']}")
    if not config.data.train or not config.data.train[0].path.startswith("example:"):
        small += [f"data.train=[{rows_like(tmp_path, config.data.format)}]", "data.eval=[]", "data.test_size=4"]
        small.append("training.max_steps=100")  # so few rows are one step, and a warm-up of one step trains nothing
    return [*small, "data.max_samples=20"]


OFTEN = [path for path in EXAMPLES if path.stem in LOCAL | {"eight-gpus-deepspeed"}]


@pytest.mark.parametrize("path", few_of([*SHIPPED, *EXAMPLES], [*SHIPPED, *OFTEN]), ids=lambda path: path.stem)
def test_every_config_dry_runs_as_a_user_types_it(path, tmp_path, tiny_models, capsys, monkeypatch):
    """All of the config is its own, but for the model's size and, where its data is on a hub, the rows."""
    monkeypatch.chdir(tmp_path)
    small = stand_ins(path, tmp_path, tiny_models)
    code = command(["train", "--config", str(path), "--dry-run", "--no-cuda", "--offline", *small])
    out, err = capsys.readouterr()
    if path.stem == "eight-gpus-deepspeed" and importlib.util.find_spec("deepspeed") is None:
        assert code == 2
        assert "deepspeed" in err
        return
    assert any(line.startswith("plan ") and "steps" in line for line in out.splitlines()), err
    assert not (tmp_path / "runs").exists()
    assert (code, err) == (0, "")


def test_the_laptops_rows_are_shipped(tmp_path, tiny_model_folder):
    path = next(one for one in EXAMPLES if one.stem == "laptop-without-gpu")
    small = {
        "model.name": str(tiny_model_folder),
        "data.cache_dir": str(tmp_path),
        "data.max_samples": 50,
        "data.max_length": 2048,
    }
    prepared = prepare(load_config(str(path), overrides=small, environ={}), Options(no_cuda=True, offline=True))
    assert prepared.data.ledger.summary()["train"]["used"] == 50
    assert len(prepared.data.eval) > 0
