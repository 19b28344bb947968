"""The losses that compare answers beside TRL's, on the same ids: its numbers are recorded in `against_trl.json`.

`python benchmarks/preference_cut.py --write tests/engine/against_trl.json` writes them, where TRL is installed.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch

from llmtune.engine import preference

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORD = json.loads(Path(__file__).with_name("against_trl.json").read_text(encoding="utf-8"))
OTHERWISE = {
    "dpo, label_smoothing 0.2": "the default loss of TRL takes no notice of label_smoothing",
    "orpo": "the first term is over the prompt too, not over the chosen answer alone (arXiv:2403.07691, equation 6)",
}
"""Losses that TRL computes otherwise, and what is wrong there."""


@pytest.fixture
def rows(monkeypatch):
    """The module of the benchmark that has the losses and our gradient of a window."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("preference_rows")


def compared(rows, name):
    """Ours and TRL's: loss, norm of the gradient, and every so many of its numbers."""
    loss, record = rows.LOSSES[name], RECORD["losses"][name]
    ours = rows.gradient_of(loss, [rows.Answers.from_json(values) for values in record["answers"]], 4, 1)
    sample = ours.gradient[:: loss.sample_every]
    theirs = torch.tensor(record["sample"])
    apart = float((sample - theirs).norm() / theirs.norm())
    return ours, record, apart


@pytest.mark.parametrize("name", [name for name in RECORD["losses"] if name not in OTHERWISE])
def test_loss_and_gradient_are_those_of_trl(rows, name):
    ours, record, apart = compared(rows, name)
    assert float(ours.gradient.double().norm()) == pytest.approx(record["norm"], rel=1e-5)
    assert ours.loss == pytest.approx(record["loss"], rel=1e-4)  # which it logs with few digits
    assert apart < 1e-5


SCALED = {
    "dpo": "dpo_losses",
    "simpo": "simpo_losses",
    "orpo, prompts of one token": "orpo_losses",
    "kto": "kto_losses",
}


@pytest.mark.parametrize(("name", "function"), SCALED.items())
def test_a_loss_that_is_off_by_a_thousandth_is_found(rows, monkeypatch, name, function):
    honest = getattr(preference, function)
    monkeypatch.setattr(preference, function, lambda *given, **named: 1.001 * honest(*given, **named))
    with pytest.raises(AssertionError):
        test_loss_and_gradient_are_those_of_trl(rows, name)


@pytest.mark.parametrize("name", OTHERWISE)
def test_where_trl_differs_it_is_named(rows, name):
    assert compared(rows, name)[2] > 1e-3


def test_every_loss_of_ours_is_compared(rows):
    assert RECORD["losses"].keys() == {name for name, loss in rows.LOSSES.items() if loss.objective is not None}
    assert OTHERWISE.keys() < RECORD["losses"].keys()
    assert RECORD["trl"] == "1.16.0"
