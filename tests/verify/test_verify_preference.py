"""`verify preference` passes on each method, and fails on mutants of our own losses and references."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.data.dataset.store import MappedExamples
from llmtune.engine import forward, preference, scoring
from llmtune.engine.preference import PreferenceObjective
from llmtune.engine.reference import FrozenCopy
from llmtune.errors import ConfigError
from llmtune.verify.preference import verify_preference
from training_fixtures import WORDS
from training_helpers import LORA


@pytest.fixture
def failed(tiny_model_folder, tmp_path):
    """The claims that do not hold, and the number of all."""

    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{WORDS[at]} {at}", "chosen": " ".join(WORDS[: at + 1]), "rejected": WORDS[-at] + " no"}
        for at in range(8)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def failed(*overrides):
        basis = [
            f"model.name={tiny_model_folder}",
            f"data.train={pairs}",
            "data.num_workers=1",
            "data.test_size=0",
            f"data.cache_dir={tmp_path}",
            "objective.method=dpo",
        ]
        resolved = load_config(None, overrides=[*basis, *overrides], environ={})
        verdict = verify_preference(resolved, Options(), print_line=lambda _: None)
        return [finding.claim for finding in verdict.findings if not finding.holds], len(verdict.findings)

    return failed


METHODS = {
    "dpo, smoothed": (("objective.label_smoothing=0.2", *LORA), 11),
    "dpo with sft": (("objective.sft_weight=0.5",), 9),
    "dpo precomputed": (("objective.loss=hinge", "objective.reference=precomputed"), 9),
    "orpo": (("objective.method=orpo",), 7),
    "kto": (("objective.method=kto", "objective.desirable_weight=1.5"), 9),
    "reward": (("objective.method=reward", *LORA), 6),
}


@pytest.mark.parametrize(("overrides", "claims"), METHODS.values(), ids=METHODS)
def test_every_claim_holds(failed, overrides, claims):
    assert failed(*overrides) == ([], claims)


def test_a_divisor_of_the_micro_batch_is_found(failed, monkeypatch):
    honest = PreferenceObjective.loss_sum
    monkeypatch.setattr(
        PreferenceObjective, "loss_sum", lambda self, batch: honest(self, batch) * 14 / len(batch.sides)
    )
    claims, _ = failed()
    assert claims == ["7 at once = one a micro-batch", "7 at once = 6 and 1", "7 at once = two a micro-batch"]


def test_chosen_tokens_counted_in_the_micro_batch_are_found(failed, monkeypatch):
    honest = PreferenceObjective._pair_losses

    def by_micro_batch(self, batch, policy, reference):
        self._count = len(batch.sides) / 2
        self._chosen_tokens = float(batch.trained_tokens_per_example[0::2].sum())
        return honest(self, batch, policy, reference)

    monkeypatch.setattr(PreferenceObjective, "_pair_losses", by_micro_batch)
    claims, _ = failed("objective.method=orpo")
    assert len(claims) == 3


def test_a_reference_that_moves_is_found(failed, monkeypatch):
    honest = FrozenCopy.in_place

    @contextmanager
    def drifting(self):
        with honest(self):
            yield
        for copy in self._copies:
            copy.add_(1e-3)

    monkeypatch.setattr(FrozenCopy, "in_place", drifting)
    claims, _ = failed()
    assert "the reference is the same after these steps" in claims


def test_a_reference_that_follows_the_policy_is_found(failed, monkeypatch):
    @contextmanager
    def as_it_is(self):
        yield

    monkeypatch.setattr(FrozenCopy, "in_place", as_it_is)
    assert failed()[0] == ["exchanging the sides changes the loss by beta times the difference"]


def test_smoothing_that_does_nothing_is_found(failed, monkeypatch):
    honest = preference.dpo_losses
    monkeypatch.setattr(
        preference, "dpo_losses", lambda *given, **named: honest(*given, **{**named, "label_smoothing": 0.0})
    )
    claims, _ = failed("objective.label_smoothing=0.2")
    assert claims == [
        "labels smoothed by one half have no gradient before step 1",
        "exchanging the sides changes the loss by beta times the difference",
    ]


MASKS = {
    "prompts that are trained": (
        lambda weights: np.concatenate([np.zeros(1, np.float32), np.ones(len(weights) - 1, np.float32)]),
        "no token of a prompt is trained",
    ),
    "an end that is not trained": (
        lambda weights: np.where(np.arange(len(weights)) == np.flatnonzero(weights)[-1], 0, weights).astype(np.float32),
        "the end of an answer is trained",
    ),
}


@pytest.mark.parametrize(("mutate", "claim"), MASKS.values(), ids=MASKS)
def test_a_mask_that_is_wrong_is_found(failed, monkeypatch, mutate, claim):
    honest = MappedExamples.__getitem__

    def masked(self, index):
        example = honest(self, index)
        return replace(example, weights=mutate(example.weights))

    monkeypatch.setattr(MappedExamples, "__getitem__", masked)
    assert claim in failed()[0]


def test_log_probabilities_of_other_tokens_are_found(failed, monkeypatch):
    """After the probe, which takes the plain forward where the flat one computes other losses."""
    honest = forward.flat_log_probs

    def of_all(model, batch, **named):
        weights = torch.ones_like(batch.weights)
        weights[0, batch.segments[:-1].long()] = 0
        return honest(model, replace(batch, weights=weights), **named)

    monkeypatch.setattr(forward, "flat_log_probs", of_all)
    assert failed()[0] == ["log-probabilities are sums over the tokens of answers, and over none of prompts"]


def test_half_smoothing_that_pulls_is_found(failed, monkeypatch):
    honest = preference.dpo_losses

    def one_sided(*given, **named):
        return honest(*given, **{**named, "label_smoothing": min(named["label_smoothing"], 0.4)})

    monkeypatch.setattr(preference, "dpo_losses", one_sided)
    assert failed()[0] == ["labels smoothed by one half have no gradient before step 1"]


def test_scores_of_a_reward_model_that_see_their_neighbours_are_found(failed, monkeypatch):
    """The token before the one that the head reads, of the whole row: in a flat row that is another document's."""
    honest = scoring.last_tokens
    monkeypatch.setattr(
        scoring, "last_tokens", lambda batch, pad_id: honest(batch, pad_id).roll(1) if batch.segments is not None else 0
    )
    assert len(failed("objective.method=reward")[0]) >= 3


def test_a_method_that_compares_nothing_is_refused(failed):
    with pytest.raises(ConfigError, match="sft compares no answers"):
        failed("objective.method=sft")
