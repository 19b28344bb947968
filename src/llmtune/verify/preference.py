"""`verify preference`: the laws of losses that compare answers, on the user's model and rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from llmtune.common.text import PrintLine
from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options
from llmtune.config.schema import ObjectiveConfig
from llmtune.data.dataset.make_dataset import rows_of
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.dataset.packing import Indices, examples_together
from llmtune.data.dataset.row_result import conversations_of
from llmtune.data.example import SIDES, Example
from llmtune.data.rows.row_fields import UnusableRowError
from llmtune.engine.devices import open_devices
from llmtune.engine.loop import train_steps
from llmtune.engine.preference import begins_anew, needs_reference, resolve_objective
from llmtune.engine.state import TrainingState
from llmtune.errors import ConfigError, DataError
from llmtune.models.parameters import base_model_of, find_score_head
from llmtune.prepare import Prepared, prepare
from llmtune.training.build import TrainingSetup, build_setup
from llmtune.training.objectives import build_objectives
from llmtune.verify.numbers import WindowResult, compare_windows, in_float32, train_window
from llmtune.verify.result import Verdict

__all__ = ["verify_preference"]

COMPARISON_BOUND = 1e-5
"""Largest relative difference of loss and gradient between two cuts: differences of sums over whole answers lose a
digit of float32.
"""
_MOST_GROUPS = 7
_SMALL_RATE = 1e-3


class _Rows(NamedTuple):
    """One window, as an objective sees it before its first micro-batch."""

    indices: Indices
    all_indices: Indices


class _Trial(NamedTuple):
    """A model before step 1, and the rows of one window: `groups` are pairs, or single answers."""

    setup: TrainingSetup
    objective: ObjectiveConfig
    groups: tuple[tuple[int, ...], ...]

    @property
    def head_is_new(self) -> bool:
        """Whether a head of scores is trained that is still 0."""
        head = find_score_head(base_model_of(self.setup.model))
        # The last one is what is trained, where peft keeps the first weights beside it.
        return head is not None and not bool(list(head.parameters())[-1].any())

    @property
    def is_sigmoid(self) -> bool:
        """Whether the loss is the plain -log sigmoid of a difference."""
        if self.objective.trains_head:
            return not self.setup.prepared.data.train.margins.any()
        objective = self.objective
        return objective.method == "dpo" and objective.loss == "sigmoid" and not objective.sft_weight

    def batch(self, groups: Sequence[tuple[int, ...]], *, swapped: bool = False) -> MicroBatch:
        """One micro-batch; swapped: the chosen answer of each pair is its rejected one."""
        rows = [row for group in groups for row in (group[::-1] if swapped else group)]
        examples = [self.setup.prepared.data.train[row] for row in rows]
        if swapped:
            other = {"chosen": "rejected", "rejected": "chosen"}
            examples = [replace(example, side=other[example.side]) for example in examples]  # type: ignore[index, arg-type]
        pad_id = self.setup.prepared.tokenizer.tokenizer.pad_token_id or 0
        batch = make_micro_batch(examples, self.setup.engine.layout, pad_id)
        return replace(batch, indices=np.array(rows, dtype=np.int64))

    def window(self, batches: Sequence[MicroBatch]) -> tuple[WindowResult, dict[str, float]]:
        """Loss, gradients and metrics of one window of these micro-batches."""
        assert self.setup.objective.begin_window is not None
        assert self.setup.objective.measure is not None
        rows = np.concatenate([batch.indices for batch in batches if batch.indices is not None])
        divisor = self.setup.objective.begin_window(_Rows(rows, rows), self.setup.devices)
        result = train_window(self.setup, self.setup.objective.loss_sum, batches, divisor)
        return result, self.setup.objective.measure(self.setup.devices)


def verify_preference(resolved: ResolvedConfig, options: Options, *, print_line: PrintLine) -> Verdict:
    """Check the masks, the start, the cut, the swap and the reference of the config's own objective.

    Float32, no dropout. Raises ConfigError for a method that compares no given answers, DataError for too few rows.
    """
    trial = _build(resolved, options, print_line)
    verdict, objective = Verdict("preference"), trial.objective
    if not objective.trains_head:
        _check_masks(verdict, trial)
    if not needs_reference(objective):
        _check_no_reference(verdict, trial)
        if trial.head_is_new:
            _check_start(verdict, trial, "before step 1 all scores are equal")
    elif objective.reference == "model" or (
        objective.reference == "base" and not begins_anew(trial.setup.config.adapter)
    ):
        begins = "training begins away from its reference, so its start has no known loss"
        print_line(f"objective.reference: {objective.reference}: {begins}")
    else:
        _check_start(verdict, trial, "before step 1 the loss is that of no difference")
        if trial.is_sigmoid:
            _check_smoothing(verdict, trial)
        _check_reference(verdict, trial)
    _move_weights(trial.setup)
    _check_cuts(verdict, trial)
    if trial.is_sigmoid:
        _check_swap(verdict, trial)
    return verdict


def _build(resolved: ResolvedConfig, options: Options, print_line: PrintLine) -> _Trial:
    config = in_float32(resolved.config)
    if config.objective.method in ("sft", "grpo", "classification"):
        problem = f"{config.objective.method} compares no answers of the rows"
        fix = "set `objective.method` to dpo, simpo, orpo, kto or reward"
        raise ConfigError(problem, where="objective.method", fix=fix)
    objective = resolve_objective(config.objective, new_adapter=begins_anew(config.adapter))
    config = replace(config, objective=objective)
    prepared = prepare(replace(resolved, config=config), options)
    devices, _ = open_devices(config, options)
    setup = build_setup(prepared, options, devices)
    together = examples_together(prepared.data.train)
    units = np.arange(len(prepared.data.train)).reshape(-1, together)
    by_length = np.argsort(prepared.data.train.lengths.reshape(-1, together).max(axis=1), kind="stable")
    # Short and long ones: rows of one length would hide a mean of means.
    ranks = np.unique(np.linspace(0, len(units) - 1, min(_MOST_GROUPS, len(units))).round().astype(int))
    groups = tuple(tuple(int(row) for row in units[by_length[rank]]) for rank in ranks)
    if len(groups) < 3:
        raise DataError("a comparison needs at least three rows", where="data.train", fix="name a file with more rows")
    kind = "pairs" if together == 2 else "answers"
    print_line(f"{len(groups)} {kind}, {objective.method}, engine {setup.engine.layout}")
    return _Trial(setup, objective, groups)


def _check_start(verdict: Verdict, trial: _Trial, claim: str) -> None:
    """At step 0 the policy is its reference: every reward is 0 exactly, and the loss a number known beforehand."""
    result, metrics = trial.window([trial.batch(trial.groups)])
    expected = _loss_of_no_difference(trial, metrics)
    rewards = max(abs(metrics.get(name, 0.0)) for name in ("rewards_chosen", "rewards_rejected"))
    difference = abs(result.loss - expected) / max(abs(expected), 1e-12)
    measured = f"loss {result.loss:.7f}, expected {expected:.7f}, largest reward {rewards:g} (0 exactly)"
    verdict.add(claim, measured, rewards == 0.0 and difference <= COMPARISON_BOUND)


def _loss_of_no_difference(trial: _Trial, metrics: dict[str, float]) -> float:
    """Log 2, 1, 1 / (4 beta^2), or half the mean weight of an answer; with the SFT term of the chosen answers.

    Of `reward` the mean of log(1 + exp(margin)).
    """
    objective, train = trial.objective, trial.setup.prepared.data.train
    assert objective.beta is not None
    rows = [row for group in trial.groups for row in group]
    if objective.trains_head:
        return float(np.logaddexp(0.0, train.margins[rows]).mean())
    chosen = [row for row in rows if SIDES[train.sides[row]] in ("chosen", "desirable")]
    if objective.method == "kto":
        weight = len(chosen) * objective.desirable_weight + (len(rows) - len(chosen)) * objective.undesirable_weight
        return weight / len(rows) / 2
    value = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * objective.beta**2)}[objective.loss]
    tokens = float(np.asarray(train.loss_weights, dtype=np.float64)[chosen].sum())
    return value - objective.sft_weight * metrics["logp_chosen"] * len(chosen) / tokens


def _check_masks(verdict: Verdict, trial: _Trial) -> None:
    """Look at what is trained: the answer with its end, after the prompt that `generate` would be given.

    The log-probability of an answer is then computed once more, from the plain forward's logits: the sum over exactly
    these tokens, so that no token of the prompt has a gradient.
    """
    setup, prompts = trial.setup, _prompts(trial.setup.prepared)
    stops, ended, apart, same = {*setup.prepared.renderer.stop_token_ids}, 0, 0.0, 0
    for group in trial.groups:
        batch = trial.batch([group])
        examples = [setup.prepared.data.train[row] for row in group]
        with torch.no_grad():
            found = setup.engine.log_probs(batch).double().cpu()
            own = [_answer_log_prob(setup, example) for example in examples]
        apart = max(apart, *(abs(float(left) - right) / abs(right) for left, right in zip(found, own, strict=True)))
        trained = [np.flatnonzero(example.weights) for example in examples]
        ended += sum(
            int(example.input_ids[places[-1]]) in stops for example, places in zip(examples, trained, strict=True)
        )
        prompt = prompts[examples[0].source.partition("#")[0]]
        ends = [len(prompt) <= places[0] for places in trained]
        same += all(ends) and all(example.input_ids[: len(prompt)].tolist() == prompt for example in examples)
    rows, answers = len(trial.groups), sum(len(group) for group in trial.groups)
    measured = f"{same} of {rows} rows begin with the tokens that `generate` would be given"
    verdict.add("no token of a prompt is trained", measured, same == rows)
    measured = f"{ended} of {answers} answers end with a trained end-of-turn token"
    verdict.add("the end of an answer is trained", measured, ended == answers)
    claim = "log-probabilities are sums over the tokens of answers, and over none of prompts"
    measured = f"largest relative difference {apart:.1e} (bound {COMPARISON_BOUND:.0e})"
    verdict.add(claim, measured, apart <= COMPARISON_BOUND)


def _prompts(prepared: Prepared) -> dict[str, list[int]]:
    """The tokens that `generate` would be given for each row, by its source."""
    data, renderer = prepared.config.data, prepared.renderer
    detected = [str(decision.value) for decision in prepared.decisions if decision.key == "data.format"]
    prompts: dict[str, list[int]] = {}
    for source, row in rows_of(data).items():
        with suppress(UnusableRowError, DataError):  # of such a row there is no example
            talk = conversations_of(row, detected[0] if detected else data.format)[0]
            turns = enumerate(talk.messages)
            begin = next(at for at, turn in turns if turn.role in ("assistant", "tool") and turn.weight is None)
            prompts[source] = (
                renderer.text_prompt_ids(talk.messages[0].content)
                if talk.prompt_is_text
                else renderer.prompt_ids(talk.messages[:begin], talk.tools, talk.template_args)
            )
    return prompts


def _answer_log_prob(setup: TrainingSetup, example: Example) -> float:
    """Give log p = sum over trained tokens t of log softmax(logits[t - 1])[ids[t]], in nats, by the plain forward."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    logits = setup.model(input_ids=ids[None].to(setup.devices.device), use_cache=False).logits[0].double().cpu()
    places = torch.from_numpy(np.flatnonzero(example.weights))
    return float(logits[places - 1].log_softmax(dim=1)[torch.arange(len(places)), ids[places]].sum())


def _check_smoothing(verdict: Verdict, trial: _Trial) -> None:
    """At step 0 labels smoothed by one half pull both ways alike: the gradient is 0."""
    setup, settings = trial.setup, replace(trial.objective, label_smoothing=0.5)
    prepared = replace(setup.prepared, config=replace(setup.config, objective=settings))
    made = build_objectives(
        prepared,
        setup.model,
        setup.engine,
        setup.parameters,
        setup.precision,
        setup.devices,
        base_digest=setup.base_digest,
    )
    smoothed = trial._replace(setup=replace(setup, objective=made.training), objective=settings)
    result, _ = smoothed.window([smoothed.batch(trial.groups)])
    largest = max(float(gradient.abs().max()) for gradient in result.gradients.values())
    claim = "labels smoothed by one half have no gradient before step 1"
    verdict.add(claim, f"largest entry {largest:g} (0 exactly)", largest == 0.0)


def _check_reference(verdict: Verdict, trial: _Trial) -> None:
    """Train two steps, put the first weights back, and look for a reward: there is one if the reference has moved."""
    setup = trial.setup
    before = {name: parameter.detach().clone() for name, parameter in setup.parameters.items()}
    steps = train_steps(
        objective=setup.objective,
        update=setup.update,
        windows=itertools.islice(setup.windows(0), 2),
        learning_rate=lambda _: _SMALL_RATE,
        precision=setup.precision,
        state=TrainingState(),
        devices=setup.devices,
        max_skipped_steps=0,
    )
    made = len(list(steps))
    moved = sum(not torch.equal(parameter, before[name]) for name, parameter in setup.parameters.items())
    with torch.no_grad():
        for name, parameter in setup.parameters.items():
            parameter.copy_(before[name])
    verdict.add("training moves weights", f"{moved} of {len(before)} tensors moved in {made} steps", moved > 0)
    _check_start(verdict, trial, "the reference is the same after these steps")


def _check_no_reference(verdict: Verdict, trial: _Trial) -> None:
    """Count the passes of the model: a method without a reference makes one for each micro-batch."""
    passes: list[int] = []
    embeddings = trial.setup.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda *_: passes.append(1))
    trial.window([trial.batch([group]) for group in trial.groups])
    handle.remove()
    measured = f"{len(passes)} passes for {len(trial.groups)} micro-batches"
    verdict.add("no reference is computed", measured, len(passes) == len(trial.groups))


def _move_weights(setup: TrainingSetup) -> None:
    """Move the policy away from its reference: where both are one, many faults would cancel."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in setup.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            parameter.add_(noise * 0.02)


def _check_cuts(verdict: Verdict, trial: _Trial) -> None:
    """Compare one window at once with the same cut in several ways, the last one as uneven as the end of an epoch."""
    whole, _ = trial.window([trial.batch(trial.groups)])
    groups, count = trial.groups, len(trial.groups)
    sizes = {"one a micro-batch": [1] * count, f"{count - 1} and 1": [count - 1, 1]}
    if count > 3:
        sizes["two a micro-batch"] = [2] * (count // 2) + [1] * (count % 2)
    for name, cut in sizes.items():
        ends = list(itertools.accumulate(cut))
        parts = [groups[end - size : end] for end, size in zip(ends, cut, strict=True)]
        result, _ = trial.window([trial.batch(part) for part in parts])
        compare_windows(verdict, f"{count} at once = {name}", whole, result, COMPARISON_BOUND, COMPARISON_BOUND)


def _check_swap(verdict: Verdict, trial: _Trial) -> None:
    """L(d) - L(-d) = -(1 - 2 label_smoothing) beta d (arXiv:2305.18290), d the difference of the log-ratios."""
    result, metrics = trial.window([trial.batch(trial.groups)])
    swapped, _ = trial.window([trial.batch(trial.groups, swapped=True)])
    expected = -(1 - 2 * trial.objective.label_smoothing) * metrics["rewards_margin"]
    found = result.loss - swapped.loss
    bound = COMPARISON_BOUND * max(result.loss, swapped.loss)
    measured = f"{found:.7f}, expected {expected:.7f} (bound {bound:.0e})"
    claim = "exchanging the sides changes the loss by beta times the difference"
    verdict.add(claim, measured, expected != 0.0 and abs(found - expected) <= bound)
