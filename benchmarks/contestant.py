"""One contestant's training in a process of its own: `python benchmarks/contestant.py NAME FOLDER DEVICE`.

Prints one JSON object.

Every contestant trains the same rows in the same order, with AdamW, a constant rate, clipping at 1 and no decay.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from workloads import SCRATCH_VOCABULARY, SHAPES, Workload, needed_operations, read

if TYPE_CHECKING:
    from llmtune.config.schema import AdapterConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for `example_list`

Rows = list[tuple[np.ndarray, np.ndarray]]
Step = tuple[float, float]
"""Seconds and mean loss (nats per trained token) of one step."""


def ours(
    workload: Workload,
    rows: Rows,
    device: str,
    engine: str = "auto",
    group_tokens: int | None = None,
    optimizer: Any = "adamw",
    max_grad_norm: float | None = 1.0,
    in_backward: bool = False,
) -> Iterator[Step | dict[str, Any]]:
    """Drive the rooms that the pipeline drives: load, attach, engine, windows, loop."""
    from llmtune.cli.process import prepare_process

    prepare_process(trains=True)  # before torch, as the commands do
    import torch

    from example_list import ExampleList
    from llmtune.config.schema import Config, ModelConfig, TrainingConfig
    from llmtune.data.dataset.batches import BatchPlan
    from llmtune.data.dataset.packing import plan_packs
    from llmtune.data.example import Example
    from llmtune.engine.devices import Devices
    from llmtune.engine.forward import build_engine
    from llmtune.engine.loop import train_steps
    from llmtune.engine.optim import build_optimizer
    from llmtune.engine.precision import Precision
    from llmtune.engine.state import TrainingState
    from llmtune.engine.step_in_backward import StepInBackward
    from llmtune.engine.update import AfterBackward
    from llmtune.models.parameters import trained_parameters

    place = torch.device(device)
    precision = Precision("bf16", place)
    model = load(workload, device)
    parameters = trained_parameters(model)
    wanted = ModelConfig(gradient_checkpointing=workload.checkpointing)  # type: ignore[arg-type]
    config = Config(model=wanted, adapter=adapter_of(workload), training=TrainingConfig(engine=engine))  # type: ignore[arg-type]
    built = build_engine(model, config=config, device=place, precision=precision)
    yield {"decisions": [str(one) for one in built.decisions], "config": model.config}
    model.train()
    rate = workload.learning_rate
    moves, _ = build_optimizer(
        optimizer, parameters, learning_rate=rate, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, device=place
    )
    examples = ExampleList(
        [Example(str(number), ids, zero_first(weights)) for number, (ids, weights) in enumerate(rows)]
    )
    lengths = np.array([len(ids) for ids, _ in rows])
    packs = plan_packs(
        lengths, workload.pack or int(lengths.max()), "none" if workload.pack is None else "best_fit", None
    )
    windows = BatchPlan(
        examples,
        packs,
        batch_size=workload.rows_a_step,
        accumulation=1,
        epochs=1,
        max_steps=None,
        shuffle_seed=None,
        layout=built.layout,
        max_group_tokens=group_tokens or built.max_group_tokens,
    )
    devices, weights = Devices(place), list(parameters.values())
    early = StepInBackward(weights, moves) if in_backward else None
    steps = train_steps(
        nll_sum=built.nll_sum,
        update=early or AfterBackward(weights, moves, precision, devices, max_grad_norm=max_grad_norm),
        windows=watched(windows.windows()),
        learning_rate=lambda _step: rate,
        precision=precision,
        state=TrainingState(),
        devices=devices,
        max_skipped_steps=0,
    )
    for result in steps:
        yield result.step_seconds, result.train_mean_nll


class Watched:
    """Micro-batches whose making is counted: `seconds` waited for data in all, and a part of its own in a profile."""

    seconds = 0.0

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Any]:
        import torch

        for number in range(len(self.parts)):
            began = time.perf_counter()
            with torch.profiler.record_function("part: data"):
                part = self.parts[number]
            Watched.seconds += time.perf_counter() - began
            yield part


def watched(windows: Iterator[Any]) -> Iterator[Any]:
    """Count the making of windows and of their micro-batches as data."""
    import torch

    while True:
        began = time.perf_counter()
        with torch.profiler.record_function("part: data"):
            window = next(windows, None)
        Watched.seconds += time.perf_counter() - began
        if window is None:
            return
        yield replace(window, micro_batches=Watched(window.micro_batches))


def trainer(
    workload: Workload, rows: Rows, device: str, micro_batch: int, base_dtype: str = "float32", sft: bool = False
) -> Iterator[Any]:
    """Train with the Trainer of transformers and peft's model, or with TRL's SFTTrainer: bf16 autocast, padded batches."""
    import transformers

    model = load(workload, device, base_dtype)
    yield {"decisions": [], "config": model.config}
    results: list[Step] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.took = time.perf_counter() - self.began

        def on_log(self, *_args: Any, logs: dict[str, float] | None = None, **_kwargs: Any) -> None:
            if logs and "loss" in logs:
                results.append((self.took, float(logs["loss"])))

    make_trainer(workload, model, rows, device, micro_batch, sft=sft, callbacks=[Clock()]).train()
    yield from results


def in_order(family: Any) -> Any:
    """Make a Trainer class that takes its rows in their order."""
    import torch

    class InOrder(family):  # type: ignore[misc]
        def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def make_trainer(
    workload: Workload,
    model: Any,
    rows: Rows,
    device: str,
    micro_batch: int,
    *,
    sft: bool,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Build the Trainer of transformers, or TRL's, that takes the rows in their order with the workload's settings."""
    import torch
    import transformers

    if sft:
        import trl

        more: dict[str, Any] = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        family, arguments_class = trl.SFTTrainer, trl.SFTConfig
    else:
        family, arguments_class, more = transformers.Trainer, transformers.TrainingArguments, {}

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
        **more,
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
    return in_order(family)(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=list(callbacks)
    )


FILLS = {"input_ids": 0, "labels": -100}


def load(workload: Workload, device: str, base_dtype: str = "auto") -> Any:
    """Load the workload's model, with its adapter attached, exactly as a run would.

    Every contestant starts from these weights.
    """
    import torch
    import transformers

    from llmtune.adapters import attach as adapters
    from llmtune.config.schema import ArchitectureConfig, ModelConfig
    from llmtune.models import scratch
    from llmtune.models.catalog import resolve
    from llmtune.models.load import load_model
    from llmtune.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    if workload.shape is not None:
        model = random_model(workload, device)
    elif workload.method == "scratch":
        words = {str(number): number for number in range(SCRATCH_VOCABULARY)}
        tokenizer = SimpleNamespace(get_vocab=lambda: words, pad_token_id=0, eos_token_id=1, bos_token_id=None)
        model = scratch.build_model(scratch.build_config(workload.model, ArchitectureConfig(), tokenizer), seed=0)
    else:
        quantization = "4bit" if workload.method == "qlora" else "none"
        wanted = ModelConfig(name=workload.model, quantization=quantization, dtype=base_dtype)  # type: ignore[arg-type]
        source = resolve(workload.model, offline=True)
        tokenizer = load_tokenizer(source, wanted).tokenizer
        trained = "adapter" if workload.has_adapter else "full"
        place = torch.device(device)
        model = load_model(
            source, wanted, tokenizer=tokenizer, device=place, trained=trained, precision="bf16", seed=0
        ).model  # type: ignore[arg-type]
    model.config.use_cache = False
    if workload.has_adapter:
        model, _ = adapters.attach_adapter(model, adapter_of(workload), seed=0)
    assert isinstance(model, torch.nn.Module)
    transformers.set_seed(0)
    return model.to(device)


def adapter_of(workload: Workload) -> AdapterConfig:
    """The adapter as a config of llmtune names it."""
    from llmtune.config.schema import AdapterConfig

    return (
        AdapterConfig(method="lora", r=workload.rank, alpha=2.0 * workload.rank)
        if workload.has_adapter
        else AdapterConfig()
    )


def random_model(workload: Workload, device: str) -> Any:
    """Build a model of a published shape with random weights: in float32 where all are trained, else in bf16, in NF4
    for QLoRA.
    """
    import torch
    import transformers

    assert workload.shape is not None
    config = transformers.LlamaConfig(**SHAPES[workload.shape], max_position_embeddings=131072, rope_theta=500000.0)
    with torch.device(device):
        torch.set_default_dtype(torch.float32 if workload.method == "full" else torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    if workload.method == "qlora":
        from llmtune.models.quantization import import_bitsandbytes

        nn4 = import_bitsandbytes().nn
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear) and name != "lm_head":
                    made = nn4.Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                    made.weight = nn4.Params4bit(
                        child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                    )
                    setattr(parent, name, made.to(device))
    return model


def zero_first(weights: np.ndarray) -> np.ndarray:
    """The same weights with none on the first token, which nothing predicts."""
    return np.concatenate([np.zeros(1, dtype=np.float32), weights[1:]])


def step_tokens(workload: Workload, lengths: np.ndarray, steps: int) -> list[int]:
    """Real tokens of each step; an even share where rows are packed first."""
    if workload.pack is not None:
        return [int(lengths.sum() / steps)] * steps
    return [
        int(part.sum()) for part in np.split(lengths, range(workload.rows_a_step, len(lengths), workload.rows_a_step))
    ]


def matrix_rate(device: str) -> float:
    """Best rate of a bf16 product of the model's size, in operations a second."""
    import torch

    size = (2048, 576, 1536) if device == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(*shape, dtype=torch.bfloat16, device=device) for shape in (size[:2], (size[2], size[1])))
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size[0] * size[1] * size[2] / best


def main() -> None:
    """Run one contestant and print its figures."""
    name, folder, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    workload, rows = read(folder)
    run = CONTESTANTS[name](workload, rows, device)
    about: dict[str, Any] = next(run)
    first = 0.0
    steps: list[Step] = []
    for step in run:
        first = first or time.time() - psutil.Process().create_time()
        steps.append(step)
    import torch

    lengths = np.array([len(ids) for ids, _ in rows])
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device == "cpu"
        else torch.cuda.max_memory_allocated()
    )
    trained = float(sum((zero_first(weights) > 0).sum() for _, weights in rows))
    print(
        json.dumps(
            {
                "name": name,
                "seconds": [seconds for seconds, _ in steps],
                "losses": [loss for _, loss in steps],
                "step_tokens": step_tokens(workload, lengths, len(steps)),
                "tokens": int(lengths.sum()),
                "trained_tokens": trained,
                "needed_operations": needed_operations(workload, about["config"], lengths, trained).total,
                "matrix_rate": matrix_rate(device),
                "first_step_s": first,
                "data_seconds": Watched.seconds,
                "peak_bytes": peak,
                "decisions": about["decisions"],
                "threads": torch.get_num_threads(),
            }
        )
    )


def litgpt(workload: Workload, rows: Rows, device: str, micro_batch: int) -> Iterator[Any]:
    """Train with litgpt, which has a module of its own."""
    from litgpt_contestant import litgpt as train

    return train(workload, rows, device, micro_batch)


CONTESTANTS: dict[str, Callable[[Workload, Rows, str], Iterator[Any]]] = {
    "llmtune": ours,
    "llmtune-plain": lambda w, r, d: ours(w, r, d, engine="plain"),
    "llmtune-4096": lambda w, r, d: ours(w, r, d, group_tokens=4096),
    "trainer": lambda w, r, d: trainer(w, r, d, w.rows_a_step),
    "trainer-best": lambda w, r, d: trainer(w, r, d, 1),
    "trainer-best-bf16": lambda w, r, d: trainer(w, r, d, 1, base_dtype="bfloat16"),
    "trl": lambda w, r, d: trainer(w, r, d, w.rows_a_step, sft=True),
    "trl-best": lambda w, r, d: trainer(w, r, d, 1, sft=True),
    "litgpt": lambda w, r, d: litgpt(w, r, d, w.rows_a_step),
    "litgpt-best": lambda w, r, d: litgpt(w, r, d, 1),
}
"""`-best` is a micro-batch of one row, accumulated: the setting that wastes nothing on padding, which few users find.
"""

if __name__ == "__main__":
    main()
