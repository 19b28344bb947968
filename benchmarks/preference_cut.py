"""How the cut of a window moves the gradient of losses that compare answers: TRL beside llmtune, on the same ids.

    python benchmarks/preference_cut.py                # needs TRL: pip install --no-deps trl==1.16.0
    python benchmarks/preference_cut.py --ours         # llmtune alone
    python benchmarks/preference_cut.py --write FILE   # TRL's losses and gradients, as tests/engine compares with them

One window of four rows, a float32 Llama of two layers, another one as the reference. The window is cut into one
micro-batch of four (4x1), four of one (1x4), and one of three and one of one (3+1: every epoch may end so). A number is
the norm of the difference to the gradient of 4x1, divided by its norm. "Same ids": llmtune's gradient of 4x1 beside
TRL's. Nothing is trained: gradients are read before each update, at the first weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import starting_point  # noqa: F401 - the environment of the libraries, before they are imported
import torch
from preference_rows import LOSSES, POLICY, REFERENCE, Answers, Loss, gradient_of, tiny_model
from trainer_contestant import in_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTALL = "TRL is not installed: pip install --no-deps trl==1.16.0 (what it needs comes with llmtune); or --ours"
CUTS = {"4x1": (4, 1), "1x4": (1, 4), "3+1": (3, 2)}
"""Rows of a micro-batch, and micro-batches, of the one window of four rows."""

WORDS = 60
PROMPTS = ("w1 w2 w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12 w13", "w14 w15 w16 w17 w18")
ANSWERS = (
    (" w20 w21 w22", " w23 w24 w25 w26 w27 w28 w29 w30"),
    (" w31 w32 w33 w34 w35 w36 w37 w38 w39", " w40"),
    (" w41", " w42 w43 w44 w45"),
    (" w46 w47 w48 w49 w50 w51", " w52 w53 w54 w55 w56"),
)


@dataclass
class Measured:
    """What TRL did in one window."""

    gradient: torch.Tensor
    """All gradients in one row."""
    loss: float
    answers: list[Answers] = field(default_factory=list)
    """The ids and masks that its loss was given, row by row."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, so that the text of a row decides its ids wherever a toolkit cuts it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{number}": number + 1 for number in range(1, WORDS + 1)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def rows(loss: Loss) -> list[dict[str, Any]]:
    """The four rows as TRL takes them; prompts of `short` losses have one token."""
    prompts = [prompt.split()[0] if loss.one_token_prompts else prompt for prompt in PROMPTS]
    if loss.paired:
        return [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt, (chosen, rejected) in zip(prompts, ANSWERS, strict=True)
        ]
    return [
        {"prompt": prompt, "completion": answers[number % 2], "label": number % 2 == 0}
        for number, (prompt, answers) in enumerate(zip(prompts, ANSWERS, strict=True))
    ]


def trl_gradient(loss: Loss, micro_batch: int, accumulation: int) -> Measured:
    """Let TRL's trainer make one window, and read its gradient before the update.

    Raises ValueError where TRL refuses the cut.
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    trainer_class, config_class = loss.trl()
    measured = Measured(torch.zeros(0), 0.0)

    class Watching(in_order(trainer_class)):  # type: ignore[misc]
        def compute_loss(self, model: object, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            measured.answers += Answers.of_batch(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    class BeforeTheUpdate(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_args: object, model: torch.nn.Module, **_kwargs: object) -> None:
            measured.gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])

        def on_log(self, *_args: object, logs: dict[str, float], **_kwargs: object) -> None:
            measured.loss = float(logs.get("loss", measured.loss))

    with tempfile.TemporaryDirectory() as folder:
        arguments = config_class(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
            max_grad_norm=0.0,
            optim="sgd",
            num_train_epochs=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **loss.trl_settings,
        )
        further = {"ref_model": tiny_model(REFERENCE)} if loss.has_reference else {}
        trainer = Watching(
            model=tiny_model(POLICY),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows(loss)),
            processing_class=tokenizer(),
            callbacks=[BeforeTheUpdate()],
            **further,
        )
        trainer.remove_callback(transformers.PrinterCallback)  # the table is all that is printed
        trainer.train()
    return measured


def apart(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    """||g - e|| / ||e||, computed in float64."""
    return float((gradient.double() - expected.double()).norm() / expected.double().norm())


def percent(value: float) -> str:
    """A relative difference as a table shows it."""
    return f"{value:.0%}" if value > 1e-3 else f"{value:.0e}"


def compare(name: str, loss: Loss, *, with_trl: bool) -> tuple[list[str], dict[str, Any]]:
    """One row of the table, and TRL's numbers of it for a test."""
    of_trl, record, same_ids, answers = ["", ""], {}, "", []
    if with_trl:
        whole = trl_gradient(loss, *CUTS["4x1"])
        answers = whole.answers
        of_trl = []
        for cut in ("1x4", "3+1"):
            try:
                of_trl.append(percent(apart(trl_gradient(loss, *CUTS[cut]).gradient, whole.gradient)))
            except ValueError as refusal:
                print(f"{name}, {cut}: TRL refuses: {refusal}", file=sys.stderr)
                of_trl.append("refused")
    if loss.objective is None:
        return [name, *of_trl, "not offered", "", ""], {}
    answers = answers or Answers.of_rows(rows(loss), tokenizer())
    ours = {cut: gradient_of(loss, answers, *CUTS[cut]) for cut in CUTS}
    if with_trl:
        difference = apart(ours["4x1"].gradient, whole.gradient)
        same_ids = percent(difference)
        record = {
            "answers": [answer.as_json() for answer in answers],
            "loss": whole.loss,
            "norm": float(whole.gradient.double().norm()),
            "sample": whole.gradient[:: loss.sample_every].tolist(),
        }
    of_ours = [percent(apart(ours[cut].gradient, ours["4x1"].gradient)) for cut in ("1x4", "3+1")]
    return [name, *of_trl, *of_ours, same_ids], record


def main() -> int:
    """Measure each loss, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="store_true", help="without TRL")
    parser.add_argument("--write", type=Path, help="write TRL's numbers there")
    options = parser.parse_args()
    with_trl = not options.ours
    if with_trl and importlib.util.find_spec("trl") is None:
        print(INSTALL, file=sys.stderr)
        return 2
    names = ("torch", "transformers", *(("trl",) if with_trl else ()), "llmtune")
    print(", ".join(f"{name} {version(name)}" for name in names))
    columns = ["loss", "TRL 1x4", "TRL 3+1", "llmtune 1x4", "llmtune 3+1", "same ids"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
    records = {}
    for name, loss in LOSSES.items():
        row, record = compare(name, loss, with_trl=with_trl)
        print(f"| {' | '.join(row)} |", flush=True)
        records.update({name: record} if record else {})
    if options.write:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in records.items())
        options.write.write_text(f'{{"trl": "{version("trl")}", "losses": {{\n{lines}\n}}}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
