"""The losses that `preference_cut.py` compares: in llmtune's words and in TRL's, and llmtune's gradient of a window."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from example_list import ExampleList
from llmtune.config.schema import Config, ObjectiveConfig, TrainingConfig
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.packing import examples_together, plan_sequences
from llmtune.data.example import Example
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine, build_engine
from llmtune.engine.precision import Precision
from llmtune.engine.preference import Mismatches, PreferenceObjective, needs_reference, resolve_objective
from llmtune.engine.reference import LiveReference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CPU = torch.device("cpu")
MAX_LENGTH = 64
POLICY, REFERENCE = 2, 1
"""Seeds of the two models: of these two the one has a reference point of KTO above 0, and the other has not."""


@dataclass(frozen=True)
class Loss:
    """One loss, by llmtune and by TRL."""

    objective: ObjectiveConfig | None
    """None: llmtune does not offer it."""
    trainer: str
    """`module:name` of TRL's trainer, without the ending `Trainer`."""
    trl_settings: dict[str, Any] = field(default_factory=dict)
    paired: bool = True
    has_reference: bool = True
    one_token_prompts: bool = False
    reversed: bool = False
    """llmtune gets the rows in the opposite order: TRL gives a prompt the answer of the row before it, llmtune that of
    the row after it."""
    sample_every: int = 388
    """A record for the tests holds every so many numbers of the gradient."""

    def trl(self) -> tuple[Any, Any]:
        """TRL's trainer and its config."""
        module, name = self.trainer.split(":")
        found = importlib.import_module(module)
        return getattr(found, f"{name}Trainer"), getattr(found, f"{name}Config")


def _dpo(objective: ObjectiveConfig, **settings: Any) -> Loss:
    return Loss(objective, "trl:DPO", settings)


def _without_reference(objective: ObjectiveConfig | None, name: str, *, short: bool = False, **settings: Any) -> Loss:
    trainer = f"trl.experimental.{name.lower()}:{name}"
    return Loss(objective, trainer, settings, has_reference=False, one_token_prompts=short)


LOSSES = {
    "dpo": _dpo(ObjectiveConfig("dpo")),
    "dpo and sft": _dpo(ObjectiveConfig("dpo", sft_weight=1.0), loss_type=["sigmoid", "sft"]),
    "dpo, label_smoothing 0.2": _dpo(ObjectiveConfig("dpo", label_smoothing=0.2), label_smoothing=0.2),
    "ipo": _dpo(ObjectiveConfig("dpo", loss="ipo"), loss_type=["ipo"]),
    "hinge": _dpo(ObjectiveConfig("dpo", loss="hinge"), loss_type=["hinge"]),
    "orpo": _without_reference(ObjectiveConfig("orpo"), "ORPO", beta=0.1),
    "orpo, prompts of one token": _without_reference(ObjectiveConfig("orpo"), "ORPO", short=True, beta=0.1),
    "cpo": _without_reference(None, "CPO", beta=0.1),
    "simpo": _without_reference(
        ObjectiveConfig("simpo"), "CPO", loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0
    ),
    "kto": Loss(ObjectiveConfig("kto"), "trl:KTO", {"beta": 0.1}, paired=False, reversed=True),
    "kto, apo_zero": Loss(
        ObjectiveConfig("kto", loss="apo_zero"),
        "trl:KTO",
        {"beta": 0.1, "loss_type": "apo_zero_unpaired"},
        paired=False,
    ),
}


def tiny_model(seed: int) -> PreTrainedModel:
    """A float32 Llama of two layers; its weights come from NumPy's PCG64, so they are the same everywhere."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    random = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.from_numpy(random.random(parameter.shape) * 2 - 1) * 0.3)
    return model


@dataclass(frozen=True)
class Answers:
    """The answers to one prompt: ids with the prompt, and the length of the prompt, of each side."""

    sides: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]

    @classmethod
    def of_batch(cls, batch: dict[str, Any]) -> list[Answers]:
        """Read them from a batch of any of TRL's trainers."""
        if "chosen_input_ids" in batch:
            sides = [
                _sequences(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
                for side in ("chosen", "rejected")
            ]
            return [cls._pair(*both) for both in zip(*sides, strict=True)]
        found = _sequences(batch["input_ids"], batch["attention_mask"], batch["completion_mask"] == 1)
        if "label" not in batch:
            half = len(found) // 2
            return [cls._pair(*both) for both in zip(found[:half], found[half:], strict=True)]
        sides = ["desirable" if label else "undesirable" for label in batch["label"]]
        return [cls((side,), (ids,), (length,)) for side, (ids, length) in zip(sides, found, strict=True)]

    @classmethod
    def of_rows(cls, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[Answers]:
        """Tokenize rows, each answer with the end token."""

        def encode(row: dict[str, Any], key: str) -> tuple[tuple[int, ...], int]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            return (*prompt, *tokenizer(row[key])["input_ids"], tokenizer.eos_token_id), len(prompt)

        if "chosen" in rows[0]:
            return [cls._pair(encode(row, "chosen"), encode(row, "rejected")) for row in rows]
        return [
            cls(("desirable" if row["label"] else "undesirable",), (ids,), (length,))
            for row in rows
            for ids, length in [encode(row, "completion")]
        ]

    @classmethod
    def _pair(cls, chosen: tuple[tuple[int, ...], int], rejected: tuple[tuple[int, ...], int]) -> Answers:
        return cls(("chosen", "rejected"), (chosen[0], rejected[0]), (chosen[1], rejected[1]))

    def as_json(self) -> dict[str, Any]:
        """Plain values; `Answers.from_json` reads them."""
        return {"sides": self.sides, "ids": self.ids, "prompt_lengths": self.prompt_lengths}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Answers:
        """Read what `as_json` gave."""
        return cls(tuple(values["sides"]), tuple(map(tuple, values["ids"])), tuple(values["prompt_lengths"]))

    def examples(self, number: int) -> list[Example]:
        """The same as llmtune's examples."""
        made = []
        for side, ids, length in zip(self.sides, self.ids, self.prompt_lengths, strict=True):
            weights = np.array([0.0] * length + [1.0] * (len(ids) - length), dtype=np.float32)
            made.append(Example(f"rows:{number}#{side}", np.array(ids, dtype=np.int32), weights, side))  # type: ignore[arg-type]
        return made


def _sequences(ids: torch.Tensor, is_real: torch.Tensor, is_answer: torch.Tensor) -> list[tuple[tuple[int, ...], int]]:
    """Ids without padding, and the tokens before the answer, of each row of a batch."""
    found = []
    for row, real, answer in zip(ids, is_real.bool(), is_answer, strict=True):
        kept = answer[real]
        found.append((tuple(row[real].tolist()), int(kept.int().argmax())))
        assert kept[found[-1][1] :].all(), "an answer is the end of its sequence"
    return found


class Gradient(NamedTuple):
    """What llmtune computes of one window."""

    gradient: torch.Tensor
    loss: float


def gradient_of(loss: Loss, answers: list[Answers], micro_batch: int, accumulation: int) -> Gradient:
    """The gradient of one window by llmtune's own engine, windows and objective; nothing is trained."""
    assert loss.objective is not None
    ordered = answers[::-1] if loss.reversed else answers
    examples = ExampleList([one for number, row in enumerate(ordered) for one in row.examples(number)])
    settings = resolve_objective(loss.objective, new_adapter=False)
    model, precision = tiny_model(POLICY), Precision("fp32", CPU)
    engine = _engine(model, precision)
    reference = None
    if needs_reference(settings):
        other = _engine(tiny_model(REFERENCE), precision)
        reference = LiveReference(other.log_probs, torch.no_grad)
    together = examples_together(examples)
    mismatches = None
    if settings.loss == "kto":
        mismatches = Mismatches(
            examples,
            autocast=precision.autocast,
            layout=engine.layout,
            pad_id=0,
            batch_size=micro_batch,
            max_group_tokens=engine.max_group_tokens,
            equal_counts=engine.equal_counts,
            max_length=MAX_LENGTH,
        )
    objective = PreferenceObjective(settings, examples, engine.log_probs, reference, mismatches)
    plan = BatchPlan(
        examples,
        plan_sequences(examples, MAX_LENGTH, "none", None),
        batch_size=micro_batch,
        accumulation=accumulation,
        epochs=1,
        max_steps=None,
        shuffle_seed=None,
        layout=engine.layout,
        max_group_tokens=engine.max_group_tokens,
        together=together,
    )
    (window,) = plan.windows()
    count = objective.begin_window(window, Devices(CPU))
    total = 0.0
    for batch in window.micro_batches:
        part = objective.loss_sum(batch) / count
        part.backward()
        total += part.item()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return Gradient(gradient, total)


def _engine(model: PreTrainedModel, precision: Precision) -> Engine:
    return build_engine(model, config=Config(training=TrainingConfig()), device=CPU, precision=precision)
