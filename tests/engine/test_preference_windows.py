"""The window law of objectives that compare answers: how a window is cut decides nothing, not a digit.

The policy here is a table of logits in float64, so that equal means equal to 1e-12; whole models are in
`tests/training/test_preference_runs.py`.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from example_list import ExampleList, windows_of
from llmtune.config.schema import ObjectiveConfig
from llmtune.data.example import Example
from llmtune.engine import preference
from llmtune.engine.devices import Devices
from llmtune.engine.preference import Mismatches, mismatched_example, resolve_objective
from rank_helpers import in_two_ranks

CPU = torch.device("cpu")
VOCABULARY = 12
OBJECTIVES = {
    "dpo": ObjectiveConfig("dpo"),
    "dpo smoothed": ObjectiveConfig("dpo", label_smoothing=0.1),
    "dpo with sft": ObjectiveConfig("dpo", sft_weight=0.7),
    "ipo": ObjectiveConfig("dpo", loss="ipo"),
    "hinge": ObjectiveConfig("dpo", loss="hinge"),
    "simpo": ObjectiveConfig("simpo"),
    "orpo": ObjectiveConfig("orpo"),
    "kto": ObjectiveConfig("kto", desirable_weight=1.3),
    "apo_zero": ObjectiveConfig("kto", loss="apo_zero"),
}
UNPAIRED = ("kto", "apo_zero")
SEED_OF_A_POINT_ABOVE_0 = 5


def make_answers(count, *, paired, seed=0):
    """Ragged prompts and answers; an answer is trained with the token before its last left out, as a template may."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 9)))
        for side in ("chosen", "rejected") if paired else (("desirable", "undesirable")[number % 3 == 0],):
            answer = rng.integers(0, VOCABULARY, int(rng.integers(2, 12)))
            weights = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.float32)
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            examples.append(Example(f"rows.jsonl:{number + 1}#{side}", ids, weights, side))
    return ExampleList(examples)


class Table:
    """A bigram model: logits of the next token by the one before it, float64 [V, V]."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)

    def log_probs(self, batch):
        table = self.logits.log_softmax(dim=1)
        if batch.segments is None:
            rows = list(zip(batch.input_ids, batch.weights, strict=True))
        else:
            ends = batch.segments.tolist()
            spans = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
            rows = [(batch.input_ids[0, span], batch.weights[0, span]) for span in spans]
        return torch.stack([(table[ids[:-1], ids[1:]] * weights[1:].double()).sum() for ids, weights in rows])


def objective_of(module, settings, examples, *, batch_size=4, layout="padded"):
    policy, reference = Table(1), Table(2)
    policy.logits.requires_grad_()
    settings = resolve_objective(settings, new_adapter=False)
    mismatches = None
    if settings.loss == "kto":
        mismatches = Mismatches(
            examples,
            autocast=torch.inference_mode,
            layout=layout,
            pad_id=0,
            batch_size=batch_size,
            max_group_tokens=None,
            max_length=14,
            equal_counts=False,
        )
    needs = settings.method in ("dpo", "kto")
    objective = module.PreferenceObjective(
        settings, examples, policy.log_probs, reference if needs else None, mismatches
    )
    return objective, policy


def results(name, windows, examples, module=preference, devices=None, **options):
    """Loss, gradient and metrics of every window, over all devices."""
    devices = devices or Devices(CPU)
    found = []
    for window in windows:
        objective, policy = objective_of(module, OBJECTIVES[name], examples, **options)
        count = objective.begin_window(window, devices)
        loss = 0.0
        for batch in window.micro_batches:
            part = objective.loss_sum(batch)
            (part / count).backward()
            loss += part.item()
        gradient = policy.logits.grad if policy.logits.grad is not None else torch.zeros_like(policy.logits)
        (loss,) = devices.sum(loss)
        found.append((loss / count, devices.sum_tensor(gradient), objective.measure(devices)))
    return found


def assert_equal(found, expected):
    assert len(found) == len(expected) > 1
    for (loss, gradient, metrics), (other_loss, other_gradient, other_metrics) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-12)
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-12, atol=1e-14)
        assert metrics == pytest.approx(other_metrics, rel=1e-12, abs=1e-12)
        assert gradient.abs().max() > 1e-6


CUTS = {
    "4x1": {"batch_size": 4, "accumulation": 1},
    "2x2": {"batch_size": 2, "accumulation": 2},
    "1x4": {"batch_size": 1, "accumulation": 4},
    "flat": {"batch_size": 4, "accumulation": 1, "layout": "flat"},
    "flat groups": {"batch_size": 4, "accumulation": 1, "layout": "flat", "group": 30},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_how_a_window_is_cut_decides_nothing(name):
    """11 rows in windows of 4: the last one is ragged."""
    examples = make_answers(11, paired=name not in UNPAIRED)
    expected = results(name, windows_of(examples, batch_size=4, accumulation=1), examples)
    assert len(expected) == 3
    for cut in CUTS.values():
        layout = cut.get("layout", "padded")
        found = results(name, windows_of(examples, **cut), examples, batch_size=cut["batch_size"], layout=layout)
        assert_equal(found, expected)


def on_two_ranks(name, module=preference):
    """What two processes find that share the windows of 9 rows; in the last window the second one has no row."""
    examples = make_answers(9, paired=name not in UNPAIRED)
    expected = results(name, windows_of(examples, batch_size=4, accumulation=1), examples)

    def compare():
        devices = Devices.from_environment(no_cuda=True, timeout_s=60)
        for size, accumulation in ((4, 1), (2, 2)):
            windows = windows_of(
                examples, batch_size=size, accumulation=accumulation, rank=devices.rank, ranks=devices.world_size
            )
            assert bool(len(windows[-1].indices)) == devices.is_main
            assert_equal(results(name, windows, examples, module, devices, batch_size=size), expected)
        devices.close()

    return in_two_ranks(compare)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_are_one(name):
    codes, said = on_two_ranks(name)
    assert codes == [0, 0], said


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
@pytest.mark.parametrize("name", ["dpo with sft", "orpo", "kto"])
def test_packs_cut_otherwise_give_the_same(name, packing):
    examples = make_answers(17, paired=name not in UNPAIRED)
    cuts = [
        windows_of(examples, batch_size=size, accumulation=4 // size, packing=packing, layout="flat")
        for size in (1, 2, 4)
    ]
    expected, *others = (results(name, cut, examples, layout="flat") for cut in cuts)
    for found in others:
        assert_equal(found, expected)


@pytest.mark.parametrize("name", ["kto"])
def test_pairs_can_be_learned_from_as_single_answers(name):
    examples = make_answers(9, paired=True)
    expected = results(name, windows_of(examples, batch_size=4, accumulation=1), examples)
    assert_equal(results(name, windows_of(examples, batch_size=1, accumulation=4), examples), expected)
    assert all(metrics["num_answers"] % 2 == 0 for _, _, metrics in expected)


def test_the_reference_point_is_the_mean_over_the_window_in_its_own_order():
    """z0 = max(0, mean of log p - log p_ref), each prompt with the answer of the next row, the last with the first."""
    examples = make_answers(6, paired=False, seed=SEED_OF_A_POINT_ABOVE_0)
    (window, *_) = windows_of(examples, batch_size=6, accumulation=1)
    objective, policy = objective_of(preference, OBJECTIVES["kto"], examples)
    reference = Table(2)
    order = window.all_indices.tolist()
    ratios = []
    for row, partner in zip(order, [*order[1:], order[0]], strict=True):
        made = mismatched_example(examples[row], examples[partner], 14)
        ids = torch.from_numpy(made.input_ids.astype(np.int64))
        weights = torch.from_numpy(made.weights[1:].astype(np.float64))
        ours, theirs = (table.logits.detach().log_softmax(1)[ids[:-1], ids[1:]] for table in (policy, reference))
        ratios.append(float(((ours - theirs) * weights).sum()))
    assert np.mean(ratios) > 0
    objective.begin_window(window, Devices(CPU))
    for batch in window.micro_batches:
        objective.loss_sum(batch)
    assert objective.measure(Devices(CPU))["kl"] == pytest.approx(max(0.0, np.mean(ratios)), rel=1e-12)


def test_a_window_of_one_answer_has_no_reference_point():
    examples = make_answers(3, paired=False)
    found = results("kto", windows_of(examples, batch_size=1, accumulation=1), examples)
    assert [metrics["kl"] for *_, metrics in found] == [0.0] * 3


def test_a_mismatched_pair_is_a_prompt_and_the_answer_of_another_row_within_the_limit():
    first, second = make_answers(2, paired=False)
    made = mismatched_example(first, second, 100)
    prompt, answer = int(np.argmax(first.weights)), int(np.argmax(second.weights))
    assert made.input_ids.tolist() == [*first.input_ids[:prompt].tolist(), *second.input_ids[answer:].tolist()]
    assert np.flatnonzero(made.weights).tolist() == list(range(prompt, len(made)))
    assert len(mismatched_example(first, second, prompt + 1)) == prompt + 1


def test_metrics_are_means_over_the_window_and_ties_are_not_wins():
    examples = make_answers(4, paired=True)
    (window,) = windows_of(examples, batch_size=4, accumulation=1)
    objective, policy = objective_of(preference, OBJECTIVES["dpo"], examples)
    objective._reference = SimpleNamespace(log_probs=lambda batch: policy.log_probs(batch).detach())
    objective.begin_window(window, Devices(CPU))
    losses = [objective.loss_sum(batch).item() for batch in window.micro_batches]
    metrics = objective.measure(Devices(CPU))
    assert sum(losses) / 4 == pytest.approx(np.log(2), rel=1e-15)
    assert metrics["accuracy"] == metrics["rewards_margin"] == metrics["rewards_chosen"] == 0.0
    assert metrics["num_pairs"] == 4
    logp = policy.log_probs(window.micro_batches[0]).detach()
    assert metrics["logp_chosen"] == pytest.approx(float(logp[0::2].mean()))
    assert metrics["logp_rejected"] == pytest.approx(float(logp[1::2].mean()))


MUTANTS = {
    "tokens of the micro-batch": (
        "nll_weight * self._count / self._chosen_tokens * pairs.chosen.sum()",
        "nll_weight * len(losses) / pairs.chosen_tokens.sum() * pairs.chosen.sum()",
        "dpo with sft",
    ),
    "a mean of means": ("return losses.sum()", "return losses.mean()", "kto"),
    "another order": ("order, shift = window.all_indices", "order, shift = np.sort(window.all_indices)", None),
    "ties are wins": ("(chosen > rejected)", "(chosen >= rejected)", None),
}


@pytest.mark.parametrize(("before", "after", "name"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_copy_is_found(mutant, monkeypatch, before, after, name):
    broken = mutant(preference, before, after)
    monkeypatch.setitem(globals(), "preference", broken)
    monkeypatch.setitem(globals(), "Mismatches", broken.Mismatches)
    if name is None:
        with pytest.raises(AssertionError):  # noqa: PT012 - either of the two
            test_metrics_are_means_over_the_window_and_ties_are_not_wins()
            test_the_reference_point_is_the_mean_over_the_window_in_its_own_order()
        return
    examples = make_answers(11, paired=name not in UNPAIRED)
    expected = results(name, windows_of(examples, batch_size=4, accumulation=1), examples)
    found = results(name, windows_of(examples, batch_size=2, accumulation=2), examples, module=broken)
    with pytest.raises(AssertionError):
        assert_equal(found, expected)


OF_ONE_PROCESS = {
    "pairs of one process": (
        "devices.sum(answers, float(self._loss_weights[chosen].sum()))",
        "(answers or 1, float(self._loss_weights[chosen].sum()))",
        "dpo",
    ),
    "a reference point of one process": (
        "float(devices.sum_tensor(torch.stack(ratios).sum()))",
        "float(torch.stack(ratios).sum())",
        "kto",
    ),
    "metrics of one process": ("devices.sum_tensor(torch.stack([zero", "(torch.stack([zero", "simpo"),
}


@pytest.mark.parametrize(("before", "after", "name"), OF_ONE_PROCESS.values(), ids=OF_ONE_PROCESS)
def test_a_copy_that_counts_its_own_process_alone_is_found(mutant, monkeypatch, before, after, name):
    broken = mutant(preference, before, after)
    monkeypatch.setitem(globals(), "Mismatches", broken.Mismatches)
    codes, said = on_two_ranks(name, broken)
    assert codes != [0, 0]
    assert "AssertionError" in "".join(said)
