"""`verify preference` passes on each method, and fails on mutants of our own losses and references."""

import json
from contextlib import contextmanager

import pytest

from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.engine import preference
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
    "dpo, smoothed": (("objective.label_smoothing=0.2", *LORA), 7),
    "dpo with sft": (("objective.sft_weight=0.5",), 6),
    "dpo precomputed": (("objective.loss=hinge", "objective.reference=precomputed"), 6),
    "orpo": (("objective.method=orpo",), 4),
    "kto": (("objective.method=kto", "objective.desirable_weight=1.5"), 6),
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
    assert claims == ["exchanging the sides changes the loss by beta times the difference"]


def test_a_method_that_compares_nothing_is_refused(failed):
    with pytest.raises(ConfigError, match="sft compares no answers"):
        failed("objective.method=sft")
