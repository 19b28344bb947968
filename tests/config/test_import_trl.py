"""What an import trains with is what TRL itself makes of the same config: 20 configs, and the masks of 20 rows each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

import record_trl
from import_samples import imported, values
from llmtune.cli.main import run
from llmtune.config.layers import parse_config
from llmtune.engine.schedule import schedule_of

CONFIGS = yaml.safe_load(record_trl.CONFIGS.read_text(encoding="utf-8"))
RECORDED = json.loads(record_trl.CONFIGS.with_name("trl_resolved.json").read_text(encoding="utf-8"))
END = 2
"""The id of the token that ends an answer."""
LOSSES = {"nll": "auto", "apo_zero_unpaired": "apo_zero"}
BOTH = tuple(zip(CONFIGS, RECORDED["configs"], strict=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    record_trl.make_model(folder)
    return folder


def import_of(folder, text, model="m", rows="rows"):
    text = text.replace("MODEL", str(model)).replace("ROWS", str(rows))
    return imported(folder, text, "run.sh" if text.startswith("trl") else "config.yaml", "trl")


def ours(result):
    """The same values as `record_trl.values_of`, from an import."""
    config, of = parse_config(result.yaml).config, values(result)
    rate = schedule_of(config.training, record_trl.STEPS)
    found = {
        "method": of("objective.method"),
        "rates": [pytest.approx(rate(step), rel=1e-6, abs=1e-15) for step in record_trl.POINTS],
        "weight_decay": of("training.weight_decay"),
        "max_grad_norm": of("training.max_grad_norm"),
        "rows_per_step": of("training.batch_size") * of("training.gradient_accumulation_steps"),
        "epochs": of("training.epochs") if of("training.max_steps") is None else None,
        "max_steps": of("training.max_steps"),
        "seed": of("run.seed"),
        "precision": of("training.precision"),
        "gradient_checkpointing": of("model.gradient_checkpointing"),
        "packing": of("data.packing") != "none",
        "logging_steps": of("tracking.every_steps"),
        "save_steps": of("checkpoint.every_steps"),
        "neftune_alpha": of("training.neftune_alpha"),
        "adapter": adapter_of(config.adapter),
    }
    if of("training.optimizer") == "adamw":
        found |= {"betas": list(of("training.betas")), "eps": of("training.eps")}
    if of("objective.method") != "grpo":  # nothing is cut there
        found["max_length"] = of("data.max_length")
    return found | objective_of(of)


def adapter_of(adapter):
    if adapter.method == "none":
        return None
    everywhere = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    layers = everywhere if adapter.target_modules == "all-linear" else sorted(adapter.target_modules)
    return {
        "r": adapter.r,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "scaling": pytest.approx(adapter.alpha / (adapter.r**0.5 if adapter.rslora else adapter.r)),
        "layers": list(layers),
        "dora": adapter.dora,
        "modules_to_save": sorted(adapter.modules_to_save),
    }


def objective_of(of):
    """The keys of TRL's comparisons, by method."""
    names = {
        "dpo": {"beta": "beta", "label_smoothing": "label_smoothing"},
        "kto": {"beta": "beta", "desirable_weight": "desirable_weight", "undesirable_weight": "undesirable_weight"},
        "grpo": {
            "beta": "beta",
            "num_generations": "num_generations",
            "temperature": "temperature",
            "max_completion_length": "max_new_tokens",
            "epsilon": "clip",
            "epsilon_high": "clip_high",
            "mask_truncated_completions": "mask_truncated",
        },
    }
    return {theirs: of(f"objective.{mine}") for theirs, mine in names.get(of("objective.method"), {}).items()}


@pytest.mark.parametrize("place", range(20))
def test_the_effective_values_are_those_of_trl(tmp_path, place):
    config, theirs = BOTH[place]
    result = import_of(tmp_path, config["text"])
    mine = ours(result)
    assert len(mine) >= 14
    assert {key: theirs[key] for key in mine} == mine
    of = values(result)
    losses = theirs.get("loss_type", "nll")
    loss = losses[0] if isinstance(losses, list) else losses
    assert of("objective.loss") in (LOSSES.get(loss, loss), "auto")
    if theirs["method"] == "grpo":
        assert of("objective.loss") == loss
        assert of("objective.scale_rewards") == (theirs["scale_rewards"] == "group")


@pytest.mark.parametrize("place", [place for place, (config, _) in enumerate(BOTH) if "rows" in config])
def test_the_trained_tokens_of_20_rows_are_those_of_trl(tmp_path, monkeypatch, capsys, model, place):
    monkeypatch.chdir(tmp_path)
    config, theirs = BOTH[place]
    rows = record_trl.ROWS[config["rows"]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ours.yaml").write_text(import_of(tmp_path, config["text"], model, "rows.jsonl").yaml)
    assert run(["data", "preview", "--config", "ours.yaml", "--all", "--json", "data.shuffle_seed=null"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == len(theirs["masks"]) == 20
    length, cut = theirs["max_length"], 0
    for row, (ids, last, marks) in zip(shown, theirs["masks"], strict=True):
        mine = "." + "".join(".x"[weight > 0] for weight in row["weights"][1:])
        assert (record_trl.digest(row["input_ids"][:-1]), mine) == (ids, marks)
        if len(row["input_ids"]) == length and row["input_ids"][-1] != last:
            cut += 1  # the one difference: an answer that is cut keeps its end token here
            assert row["input_ids"][-1] == END
        else:
            assert row["input_ids"][-1] == last
    assert (cut > 0) == (length < 64)


@pytest.mark.campaign
def test_what_is_recorded_is_what_trl_resolves_today():
    pytest.importorskip("trl", minversion="1.16", reason="pip install trl==1.16.0 --no-deps")
    # A process of its own: the libraries that TRL loads warn, and here warnings are errors.
    found = subprocess.run([sys.executable, record_trl.__file__], check=True, capture_output=True, text=True).stdout
    assert json.loads(found) == RECORDED
