"""Everything that training is at a step boundary, as tensors and plain numbers, and back: no pickle, no bit lost.

A `Snapshot` holds named tensors (for safetensors) and a JSON-able tree. Floats survive JSON: Python writes the shortest text that reads
back to the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch

from llmtune.errors import CheckpointError
from llmtune.training.optim import Optimizer
from llmtune.training.precision import Precision

__all__ = ["Snapshot", "TrainingState", "capture", "capture_rng", "restore", "restore_rng"]


@dataclass
class TrainingState:
    """What has been done so far, counted over all devices. `step` counts updates applied, `windows` also those skipped."""

    step: int = 0
    windows: int = 0
    epoch: float = 0.0
    num_tokens: int = 0
    num_loss_tokens: float = 0.0
    num_sequences: int = 0
    skipped_steps: int = 0
    """Windows not applied because a loss or gradient was not finite."""
    overflow_steps: int = 0
    """Windows not applied because the fp16 loss scale was too large; the scale was halved."""

    def advance(
        self, epoch: float, num_tokens: float, num_loss_tokens: float, num_sequences: float, *, applied: bool, overflow: bool
    ) -> None:
        """Count one consumed window; `epoch` is where it ends, the numbers are those of the window over all devices."""
        self.windows += 1
        self.epoch = epoch
        self.num_tokens += int(num_tokens)
        self.num_loss_tokens += num_loss_tokens
        self.num_sequences += int(num_sequences)
        self.step += applied
        self.overflow_steps += overflow
        self.skipped_steps += not applied and not overflow


@dataclass(frozen=True)
class Snapshot:
    """A step boundary. `tensors`: by group (`optimizer`, `rng`), then name, on the CPU, none sharing memory. `state`: JSON-able."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def capture(*, parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer, precision: Precision, state: TrainingState) -> Snapshot:
    """Copy optimizer, loss scale, random generators and counters. `parameters`: the trained ones by name."""
    tensors, scalars = _capture_optimizer(parameters, optimizer)
    rng_tensors, rng_scalars = capture_rng(precision.device)
    return Snapshot(
        tensors={"optimizer": tensors, "rng": rng_tensors},
        state={"training": asdict(state), "precision": precision.state_dict(), "optimizer": scalars, "rng": rng_scalars},
    )


def restore(
    snapshot: Snapshot,
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: Optimizer,
    precision: Precision,
    state: TrainingState,
) -> None:
    """Put a snapshot back, bit for bit, into objects built as those it was taken from.

    Raises CheckpointError when it belongs to another optimizer or to other parameters; nothing has been changed then.
    """
    _restore_optimizer(snapshot.tensors["optimizer"], snapshot.state["optimizer"], parameters, optimizer)
    precision.load_state_dict(snapshot.state["precision"])
    for one in fields(TrainingState):
        setattr(state, one.name, snapshot.state["training"][one.name])
    restore_rng(snapshot.tensors["rng"], snapshot.state["rng"], precision.device)


def _capture_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Give the optimizer's tensors as `parameter//key`, and by parameter its rule, its other values and where each tensor lived."""
    parts = dict(optimizer.part_of())
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        entry: dict[str, Any] = {"rule": type(parts[parameter]).__name__, "values": {}, "places": {}}
        for key, value in parts[parameter].state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                entry["places"][key] = _place_of(value, parameter)
                tensors[f"{name}//{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                assert value is None or isinstance(value, bool | int | float | str), f"optimizer state {name}//{key} is a {type(value)}"
                entry["values"][key] = value
        entries[name] = entry
    return tensors, entries


def _place_of(value: torch.Tensor, parameter: torch.nn.Parameter) -> str:
    """Say where an optimizer tensor lives: paged by bitsandbytes, beside its parameter, or (step counters) on the CPU."""
    if vars(value).get("is_paged"):
        return "paged"
    return "parameter" if value.device == parameter.device else "cpu"


def _restore_optimizer(
    tensors: Mapping[str, torch.Tensor],
    entries: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: Optimizer,
) -> None:
    """Put tensors back with the type and place they had; torch's own `load_state_dict` would cast them to the parameter's type."""
    absent = sorted(parameters.keys() - entries.keys())
    foreign = sorted(entries.keys() - parameters.keys())
    if absent or foreign:
        raise CheckpointError(
            f"the checkpoint's optimizer knows other parameters: {len(absent)} of the model's are absent ({', '.join(absent[:3])}), "
            f"{len(foreign)} are not in the model ({', '.join(foreign[:3])})",
            fix="resume with the model, adapter and optimizer the run was started with",
        )
    expected = {f"{name}//{key}" for name, entry in entries.items() for key in entry["places"]}
    if expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())
        raise CheckpointError(f"optimizer tensors and their list disagree on {len(odd)}: {', '.join(odd[:3])}")
    parts = dict(optimizer.part_of())
    for name, parameter in parameters.items():
        before, now = entries[name]["rule"], type(parts[parameter]).__name__
        if before != now:
            raise CheckpointError(
                f"the checkpoint's optimizer moved `{name}` by {before}, this run's by {now}",
                where="training.optimizer",
                fix="resume with the optimizer the run was started with",
            )
    for name, parameter in parameters.items():
        part = parts[parameter]
        state: dict[str, Any] = dict(entries[name]["values"])
        for key, place in entries[name]["places"].items():
            saved = tensors[f"{name}//{key}"]
            if place == "paged":
                state[key] = part.get_state_buffer(parameter, dtype=saved.dtype)  # type: ignore[attr-defined]
                state[key].copy_(saved)
            else:
                state[key] = saved.to(parameter.device if place == "parameter" else "cpu", copy=True)
        part.state.pop(parameter, None)
        if state:
            part.state[parameter] = state


def capture_rng(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Copy the state of every global random generator: Python's, NumPy's, torch's on the CPU and on `device`."""
    version, words, python_gauss = random.getstate()
    kind, keys, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    scalars = {
        "python": {"version": version, "gauss": python_gauss},
        "numpy": {"kind": str(kind), "position": int(position), "has_gauss": int(has_gauss), "gauss": float(numpy_gauss)},
    }
    return tensors, scalars


def restore_rng(tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any], device: torch.device) -> None:
    """Set every global random generator to a captured state; a GPU's only where one was captured."""
    python, numpy = scalars["python"], scalars["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].to(torch.uint8), device)
