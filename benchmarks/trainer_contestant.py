"""The Trainer of transformers and TRL's SFTTrainer as contestants: padded batches, bf16 autocast."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starting_point import Rows, Step, Training, load_model, zero_first
from workloads import Workload

if TYPE_CHECKING:
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedModel, Trainer, TrainerCallback


def train(
    workload: Workload, rows: Rows, device: str, micro_batch: int, base_dtype: str = "float32", sft: bool = False
) -> Training:
    """Train with the Trainer of transformers and peft's model, or with TRL's SFTTrainer (`sft`)."""
    model = load_model(workload, device, base_dtype)
    return Training(model.config, _steps(workload, model, rows, device, micro_batch, sft))


def _steps(
    workload: Workload, model: PreTrainedModel, rows: Rows, device: str, micro_batch: int, sft: bool
) -> Iterator[Step]:
    import transformers

    results: list[Step] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_args: object, **_kwargs: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_args: object, **_kwargs: object) -> None:
            self.seconds = time.perf_counter() - self.began

        def on_log(self, *_args: object, logs: dict[str, float] | None = None, **_kwargs: object) -> None:
            if logs and "loss" in logs:
                results.append(Step(self.seconds, float(logs["loss"])))

    make_trainer(workload, model, rows, device, micro_batch, sft=sft, callbacks=[Clock()]).train()
    yield from results


def in_order(trainer_class: type[Trainer]) -> type[Trainer]:
    """Make a Trainer class that takes its rows in their order."""
    import torch

    class InOrder(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, *_args: object, **_kwargs: object) -> SequentialSampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def make_trainer(
    workload: Workload,
    model: PreTrainedModel,
    rows: Rows,
    device: str,
    micro_batch: int,
    *,
    sft: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Build the Trainer of transformers, or TRL's, that takes the rows in their order with the workload's settings."""
    import torch
    import transformers

    if sft:
        import trl

        options: dict[str, Any] = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer_class, arguments_class = trl.SFTTrainer, trl.SFTConfig
    else:
        trainer_class, arguments_class, options = transformers.Trainer, transformers.TrainingArguments, {}

    arguments = arguments_class(
        output_dir="unused",
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=workload.rows_a_step // micro_batch,
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=1,
        bf16=True,
        use_cpu=device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_checkpointing=workload.checkpointing,
        prediction_loss_only=True,
        **options,
    )
    data: Any = [
        {"input_ids": ids.tolist(), "labels": np.where(zero_first(w) > 0, ids, -100).tolist()} for ids, w in rows
    ]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        padded = {
            key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in batch])
            for key, fill in FILLS.items()
        }
        padded["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        )
        return padded

    if sft:
        import datasets

        data = datasets.Dataset.from_list(data)
    return in_order(trainer_class)(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=list(callbacks)
    )


FILLS = {"input_ids": 0, "labels": -100}
