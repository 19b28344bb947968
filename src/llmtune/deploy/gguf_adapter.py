"""Write a LoRA adapter as a GGUF file, which llama.cpp and Ollama add to the GGUF file of its base.

llama.cpp computes W + alpha / r B A with one alpha for the file and r the rows of each A; a scale that is another one
(rsLoRA, patterns) is multiplied into B. What `convert_lora_to_gguf.py` of llama.cpp writes is read in the same way.

Legend: r rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from llmtune import durable
from llmtune.adapters.config_file import read_adapter_config
from llmtune.deploy.gguf_architectures import gguf_name_map, refuse_unwritable
from llmtune.deploy.merge_inputs import find_merge_inputs
from llmtune.deploy.merge_plan import MergePlan, plan_merge
from llmtune.deploy.usage import Result, usage
from llmtune.errors import AdapterError, CheckpointError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["export_adapter"]

Tensors = dict[str, "npt.NDArray[np.float32]"]


def export_adapter(source: Path, output: Path, *, base: str | None = None, offline: bool = False) -> list[str]:
    """Write the adapter in `source` (of a run the final one) as `output`; return the command lines that serve it.

    Raises UsageError for an output that is no new .gguf file, AdapterError or ModelError for an adapter that cannot be
    read or that a GGUF file cannot hold, MachineError when the system refuses to write; `output` then does not exist.
    """
    if output.suffix.lower() != ".gguf" or output.exists():
        problem = f"`{output}` is no file to make" if output.suffix.lower() != ".gguf" else f"`{output}` already exists"
        raise UsageError(problem, where="--output", fix="name a new file that ends in .gguf")
    inputs = find_merge_inputs(source, base, offline=offline)
    if inputs.labels:
        fix = "merge it (`llmtune merge-lora`): transformers loads the folder as sequence classification"
        raise AdapterError("the adapter gives scores, and a GGUF file holds what answers", str(output), fix)
    plan = plan_merge(inputs, dtype=None, dequantize=False)
    architecture = refuse_unwritable(plan.config)
    alpha = float(read_adapter_config(inputs.adapter).get("lora_alpha", 8))
    tensors = dict(_tensors(plan, alpha, where=str(inputs.adapter)))
    with durable.commit_file(output) as path:
        _write(path, architecture.name, output.stem, alpha, tensors)
        _compare(path, tensors)
    return usage(Result("lora", str(output), base=inputs.base_name))


def _tensors(plan: MergePlan, alpha: float, *, where: str) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield name in the file -> A [r, I] or B [O, r]."""
    architecture, names = refuse_unwritable(plan.config), gguf_name_map(plan.config)
    for weight, updates in plan.updates.items():
        for update in updates:
            name = names.get_name(weight, try_suffixes=(".weight", ".bias"))
            is_plain = update.kind == "low_rank" and "magnitude" not in update.tensors and name != "token_embd.weight"
            if not is_plain or name is None:
                fix = "leave --adapter-only out: the merged model holds everything"
                raise AdapterError(f"a GGUF file has no place for what the adapter does to `{weight}`", where, fix)
            a_rI, b_Or = (plan.tensors[update.tensors[role]].to(torch.float32) for role in "AB")
            # GPT-2's matrices are turned on the way to the file, and B A has that order already.
            b_Or = b_Or if update.is_transposed else architecture.layout.write(weight, plan.config, b_Or)
            yield f"{name}.lora_a", a_rI.contiguous().numpy()
            yield f"{name}.lora_b", (b_Or * (update.scaling * len(a_rI) / alpha)).contiguous().numpy()


def _write(path: Path, architecture: str, name: str, alpha: float, tensors: Tensors) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for tensor, values in tensors.items():
        writer.add_tensor(tensor, values)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _compare(path: Path, tensors: Tensors) -> None:
    """Raise CheckpointError where the file does not hold these numbers."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if stored.keys() != tensors.keys() or not all(np.array_equal(stored[name], tensors[name]) for name in tensors):
        raise CheckpointError("what was written is not the adapter", where=str(path), fix="export it again")
