"""Draw answers to the prompts of the steps to come, and judge them: the data of a step of GRPO.

A *round* is `objective.steps_per_generation` steps whose answers are drawn at once, when the first of them begins. Each
answer is drawn from its own seed (run, step, number), so a resumed run draws what the run that was never stopped drew.
Where a round is cut by a checkpoint, the checkpoint holds the answers of the steps that are left.

Shapes: G answers to a prompt; answer g of prompt p has number p G + g (see `PlannedAnswers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from llmtune.config.schema import ObjectiveConfig
from llmtune.data.dataset.batches import BatchPlan, Window
from llmtune.data.dataset.make_dataset import rows_of
from llmtune.data.dataset.micro_batch import MicroBatch, MicroBatches, make_micro_batch
from llmtune.data.dataset.packing import Indices
from llmtune.data.example import Example, ExampleSet
from llmtune.data.rows.preferences import right_answer
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine
from llmtune.engine.loop import gather_values
from llmtune.engine.policy_gradient import DrawnAnswer, count_answers, group_advantages
from llmtune.engine.precision import Precision
from llmtune.errors import UsageError
from llmtune.evaluation.draw import answer_seed, draw_answers
from llmtune.evaluation.rewards import AnswerGroup, Reward, rewards_digest, total_reward
from llmtune.models.parameters import eval_mode
from llmtune.prepare import Prepared

__all__ = ["Rollouts"]

DRAWN_AT_ONCE = 64
"""Answers of a batch that is drawn: more gain little on a CPU, and their keys and values take memory."""


@dataclass
class _Judged:
    """The answers to one prompt."""

    prompt: str
    texts: list[str]
    answers: list[DrawnAnswer]


class Rollouts:
    """The drawn answers of a training, step by step."""

    def __init__(
        self,
        prepared: Prepared,
        model: torch.nn.Module,
        engine: Engine,
        precision: Precision,
        devices: Devices,
        rewards: Sequence[Reward],
    ) -> None:
        """`prepared.config` is resolved; reads the rows once more, because rewards are given their fields."""
        self._prepared, self._model, self._engine = prepared, model, engine
        self._precision, self._devices, self._rewards = precision, devices, rewards
        self._objective: ObjectiveConfig = prepared.config.objective
        tokenizer = prepared.tokenizer.tokenizer
        self._tokenizer, self._pad_id = tokenizer, tokenizer.pad_token_id or 0
        self._stops = prepared.renderer.stop_token_ids
        self._prompts = prepared.data.train
        self._rows = rows_of(prepared.config.data)
        self._drawn: dict[int, dict[int, DrawnAnswer]] = {}
        self._current: Mapping[int, DrawnAnswer] = {}
        self._samples: list[dict[str, object]] = []

    @property
    def reward_names(self) -> list[str]:
        """Names of the rewards, in their order."""
        return [reward.name for reward in self._rewards]

    @property
    def rewards_digest(self) -> str | None:
        """sha256 over names, weights and code of the rewards."""
        return rewards_digest(self._rewards)

    def __getitem__(self, number: int) -> DrawnAnswer:
        """The answer of that number in the present step."""
        return self._current[number]

    def windows(self, plan: BatchPlan, start_step: int) -> Iterator[Window]:
        """Give the windows after the first `start_step` with drawn answers in the place of the planned ones.

        Answers are drawn when their round's first window is asked for: by then the steps before it are applied. Raises
        UsageError for a reward that fails; the step before is complete then.
        """
        every = self._objective.steps_per_generation
        for step in range(start_step + 1, plan.total_steps + 1):
            if step not in self._drawn:
                # Rounds begin where they would in a run that nobody stopped.
                last = min(((step - 1) // every + 1) * every, plan.total_steps)
                with self._devices.busy():  # one process may have more prompts than others, or a slower reward
                    self._draw_round(plan, range(step, last + 1))
            self._current = self._drawn.pop(step)
            yield self._window(plan, step)

    def samples(self) -> list[dict[str, object]]:
        """The best and the worst answer to the first prompt of a round, with their rewards; once for each round."""
        samples, self._samples = self._samples, []
        return samples

    # --- a round

    def _draw_round(self, plan: BatchPlan, steps: range) -> None:
        per_prompt, seed = self._objective.num_generations, self._prepared.config.run.seed
        prompts_of = {
            step: [int(number) // per_prompt for number in plan.window(step).indices[::per_prompt]] for step in steps
        }
        places = [(step, prompt) for step in steps for prompt in prompts_of[step]]
        seeds = [
            # A seed for each answer, so that neither the number of processes nor their batches change what is drawn.
            [answer_seed(seed, step, prompt * per_prompt + generation) for generation in range(per_prompt)]
            for step, prompt in places
        ]
        examples = [self._prompts[prompt] for _, prompt in places]
        judged = self._answer(examples, seeds, temperature=self._objective.temperature)
        for (step, prompt), group in zip(places, judged, strict=True):
            answers = self._drawn.setdefault(step, {})
            answers.update({prompt * per_prompt + place: answer for place, answer in enumerate(group.answers)})
        for step in steps:
            self._drawn.setdefault(step, {})  # a process may have no prompt in a step
        if judged:
            self._samples = [_sample(judged[0], place) for place in _best_and_worst(judged[0])]
        # The first step of a round is made by the very policy that drew.
        for step in steps[1:]:
            self._measure(plan, step)

    def _answer(
        self, prompts: Sequence[Example], seeds: Sequence[Sequence[int]], *, temperature: float
    ) -> list[_Judged]:
        """Draw answers to this process's prompts, and judge them.

        Raises UsageError, in all processes, for a reward that fails in one of them.
        """
        judged, error = [], None
        drawn = self._draw(prompts, seeds, temperature)
        try:
            judged = [self._judge(prompt, ids) for prompt, ids in zip(prompts, drawn, strict=True)]
        except UsageError as caught:
            error = caught
        self._devices.agree_on_error(error)
        return judged

    def _draw(
        self, prompts: Sequence[Example], seeds: Sequence[Sequence[int]], temperature: float
    ) -> list[list[list[int]]]:
        with self._precision.autocast():
            return draw_answers(
                self._model,  # type: ignore[arg-type]
                [prompt.input_ids.tolist() for prompt in prompts],
                seeds,
                stop_token_ids=self._stops,
                pad_id=self._pad_id,
                max_new_tokens=self._objective.max_new_tokens,
                temperature=temperature,
                batch_size=max(DRAWN_AT_ONCE, self._objective.num_generations),
            )

    def _judge(self, prompt: Example, ids_of: Sequence[Sequence[int]]) -> _Judged:
        stops, row = set(self._stops), self._rows[prompt.source]
        texts = [
            str(self._tokenizer.decode([token for token in ids if token not in stops], skip_special_tokens=False))
            for ids in ids_of
        ]
        # As the model sees it, template included.
        text = str(self._tokenizer.decode(prompt.input_ids.tolist()))
        group = AnswerGroup(prompt.source, text, texts, ids_of, right_answer(row), row.fields)
        by_name = {reward.name: reward.judge(group) for reward in self._rewards}
        judged = [{name: values[place] for name, values in by_name.items()} for place in range(len(texts))]
        totals = [total_reward(self._rewards, rewards) for rewards in judged]
        advantages = group_advantages(totals, scale=self._objective.scale_rewards)
        answers = [
            DrawnAnswer(tuple(ids), total, advantage, rewards, is_truncated=ids[-1] not in stops)
            for ids, total, advantage, rewards in zip(ids_of, totals, advantages, judged, strict=True)
        ]
        return _Judged(text, texts, answers)

    def _measure(self, plan: BatchPlan, step: int) -> None:
        """Note the log-probabilities of a step's answers by the policy that drew them."""
        answers = self._drawn[step]
        with eval_mode(self._model), self._precision.autocast():
            for batch in self._micro_batches(plan, step, answers):
                # By the engine that trains and not as it was drawn: roundings differ, and a ratio must begin at 1.
                values = self._engine.token_log_probs(batch, self._objective.temperature).float().cpu()
                assert batch.indices is not None
                parts = values.split(batch.trained_tokens_per_example.tolist())
                for number, part in zip(batch.indices.tolist(), parts, strict=True):
                    answers[number] = replace(answers[number], log_probs=tuple(part.tolist()))

    # --- windows

    def _window(self, plan: BatchPlan, step: int) -> Window:
        window = plan.window(step)
        answers = [self._current[int(number)] for number in window.indices]
        tokens = [len(answer.ids) for answer in answers]
        prompts = [len(self._example(int(number), ())) for number in window.indices]
        return replace(
            window,
            micro_batches=self._micro_batches(plan, step, self._current),
            loss_weight=float(sum(tokens)),
            num_tokens=sum(tokens) + sum(prompts),
        )

    def _micro_batches(self, plan: BatchPlan, step: int, answers: Mapping[int, DrawnAnswer]) -> MicroBatches:
        def build(numbers: Indices) -> MicroBatch:
            examples = [self._example(int(number), answers[int(number)].ids) for number in numbers]
            return replace(make_micro_batch(examples, self._engine.layout, self._pad_id), indices=numbers)

        # Divided as planned for the longest answers: shorter ones never take more memory.
        return MicroBatches(plan.groups(step), build)

    def _example(self, number: int, ids: Sequence[int]) -> Example:
        prompt = self._prompts[number // self._objective.num_generations]
        weights = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(ids), np.float32)])
        return Example(prompt.source, np.concatenate([prompt.input_ids, np.array(ids, np.int32)]), weights)

    # --- held-out prompts

    def evaluate(self, prompts: ExampleSet) -> dict[str, float]:
        """Mean reward of the most likely answer to each prompt, over all devices; nothing of the model changes.

        `eval_reward`, each reward by its name where there are several, `eval_answer_tokens` and `eval_num_answers`.
        """
        mine = range(self._devices.rank, len(prompts), self._devices.world_size)
        # Every n-th, so that long prompts that stand together are shared.
        examples = [prompts[index] for index in mine]
        judged = self._answer(examples, [[0]] * len(examples), temperature=0.0)
        answers = [group.answers[0] for group in judged]
        seen = count_answers(answers, self.reward_names, self._devices)
        return {
            "eval_reward": seen.reward,
            "eval_answer_tokens": seen.tokens_per_answer,
            "eval_num_answers": int(seen.answers),
            **{f"eval_{name}": mean for name, mean in seen.means_by_name.items()},
        }

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """The answers that are drawn and not yet trained, of all processes, as plain values; every process calls it."""
        if self._objective.steps_per_generation == 1:
            return {}
        own = {
            step: {number: asdict(answer) for number, answer in group.items()} for step, group in self._drawn.items()
        }
        joined: dict[str, Any] = {}
        for part in gather_values(own, self._devices):
            for step, group in part.items():
                joined.setdefault(step, {}).update(group)
        return joined

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the drawn answers to what `state()` returned, on any number of processes."""
        self._drawn = {
            int(step): {int(number): _drawn_answer(values) for number, values in group.items()}
            for step, group in state.items()
        }


def _drawn_answer(values: Mapping[str, Any]) -> DrawnAnswer:
    log_probs = values["log_probs"]
    known = {**values, "ids": tuple(values["ids"]), "log_probs": None if log_probs is None else tuple(log_probs)}
    return DrawnAnswer(**known)


def _best_and_worst(group: _Judged) -> list[int]:
    order = sorted(range(len(group.answers)), key=lambda place: -(group.answers[place].reward or 0.0))
    return [order[0], order[-1]]


def _sample(group: _Judged, place: int) -> dict[str, object]:
    answer = group.answers[place]
    return {
        "prompt": group.prompt,
        "text": group.texts[place],
        "reward": answer.reward,
        "rewards": dict(answer.rewards),
    }
