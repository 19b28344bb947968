"""The state of a training at a step boundary, captured as tensors and plain numbers, and restored bit for bit.

A `Snapshot` holds named tensors (for safetensors) and a JSON-able tree. Floats survive JSON: Python writes the shortest
text that reads back to the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypedDict

import numpy as np
import torch

from llmtune.engine.devices import Devices
from llmtune.engine.optim import AnyOptimizer
from llmtune.engine.precision import Precision
from llmtune.engine.sharded_tensors import is_in_parts
from llmtune.errors import CheckpointError

__all__ = ["Snapshot", "TrainingState", "capture", "capture_rng", "restore", "restore_rng"]


@dataclass
class TrainingState:
    """The progress of a training, counted over all devices.

    `step` counts updates applied, `windows` also those skipped.
    """

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
        self,
        epoch: float,
        num_loss_tokens: float,
        num_tokens: float,
        num_sequences: float,
        *,
        applied: bool,
        overflow: bool,
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


Scalar = bool | int | float | str | None


class _ParameterState(TypedDict):
    """The optimizer's state of one parameter, but for its tensors. The keys are those of checkpoint files."""

    rule: str
    """Class of the optimizer that moves the parameter."""
    values: dict[str, Scalar]
    """State that is no tensor."""
    places: dict[str, str]
    """Device of each state tensor, as `_device_of` names it."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a training at a step boundary."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By group (`optimizer`, `rng`), then name; on the CPU, none sharing memory with another.

    Those that processes hold in parts (DTensors) are the optimizer's own, good until its next step.
    """
    state: dict[str, Any] = field(default_factory=dict)
    """A tree of plain values that JSON can hold."""


def capture(
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: AnyOptimizer,
    precision: Precision,
    state: TrainingState,
    devices: Devices | None = None,
    keep: bool = True,
) -> Snapshot:
    """Copy optimizer, loss scale, counters, and the random generators of every process (one row each).

    `parameters`: the trained ones by name. With several processes each must call it: the generators are gathered, the
    rest is the same on all. `keep`: whether this process gets those of the optimizer's tensors that are whole, twice
    the size of the trained weights with AdamW; without it, it takes part only.
    """
    devices = devices or Devices(precision.device)
    tensors, scalars = _capture_optimizer(parameters, optimizer, keep=keep)
    return Snapshot(
        tensors={
            "optimizer": tensors,
            "rng": {name: devices.gather_rows(value) for name, value in capture_rng(precision.device).items()},
        },
        state={"training": asdict(state), "precision": precision.state_dict(), "optimizer": scalars},
    )


def restore(
    snapshot: Snapshot,
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: AnyOptimizer,
    precision: Precision,
    state: TrainingState,
    devices: Devices | None = None,
) -> None:
    """Put a snapshot back, bit for bit, into objects built as those it was taken from.

    Each process restores its own random generators. A process that was not there before starts from the first one's,
    reseeded by its rank. Raises CheckpointError when it belongs to another optimizer or to other parameters; nothing
    has been changed then.
    """
    rank = devices.rank if devices else 0
    _restore_optimizer(snapshot.tensors["optimizer"], snapshot.state["optimizer"], parameters, optimizer)
    precision.load_state_dict(snapshot.state["precision"])
    for counter in fields(TrainingState):
        setattr(state, counter.name, snapshot.state["training"][counter.name])
    rows = snapshot.tensors["rng"]
    is_saved = rank < len(rows["torch"])
    restore_rng({name: row[rank if is_saved else 0] for name, row in rows.items()}, precision.device)
    if not is_saved:  # more processes than before: no two may draw the same numbers
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)


def _capture_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: AnyOptimizer, *, keep: bool
) -> tuple[dict[str, torch.Tensor], dict[str, _ParameterState]]:
    """Give the optimizer's tensors as `parameter//key`, and the rest of its state by parameter.

    Without `keep` they are those alone that processes hold in parts.
    """
    parts = dict(optimizer.part_of())
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, _ParameterState] = {}
    for name, parameter in parameters.items():
        entry: _ParameterState = {"rule": type(parts[parameter]).__name__, "values": {}, "places": {}}
        for key, value in optimizer.state_of(parameter).items():
            if isinstance(value, torch.Tensor):
                entry["places"][key] = _device_of(value, parameter)
                if is_in_parts(value):
                    tensors[f"{name}//{key}"] = value.detach()
                elif keep:
                    # A copy, because the optimizer goes on to change its tensors while the file is written.
                    tensors[f"{name}//{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                assert value is None or isinstance(value, bool | int | float | str), (
                    f"optimizer state {name}//{key} is a {type(value)}"
                )
                entry["values"][key] = value
        entries[name] = entry
    return tensors, entries


def _device_of(value: torch.Tensor, parameter: torch.nn.Parameter) -> str:
    """Name the device of an optimizer tensor: paged by bitsandbytes, its parameter's, or (step counters) the CPU."""
    if vars(value).get("is_paged"):
        return "paged"
    return "parameter" if value.device == parameter.device else "cpu"


def _restore_optimizer(
    tensors: Mapping[str, torch.Tensor],
    entries: Mapping[str, _ParameterState],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: AnyOptimizer,
) -> None:
    """Put the state back; nothing is changed before everything has been checked.

    torch's `load_state_dict` is not used, because it casts state tensors to the parameter's type.
    """
    absent = sorted(parameters.keys() - entries.keys())
    foreign = sorted(entries.keys() - parameters.keys())
    if absent or foreign:
        raise CheckpointError(
            "the checkpoint's optimizer knows other parameters: "
            f"{len(absent)} of the model's are absent ({', '.join(absent[:3])}), "
            f"{len(foreign)} are not in the model ({', '.join(foreign[:3])})",
            fix="resume with the model, adapter and optimizer the run was started with",
        )
    # Everything is compared before anything is set: a half-restored optimizer would train on without a word.
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
        state: dict[str, torch.Tensor | Scalar] = dict(entries[name]["values"])
        for key, device_kind in entries[name]["places"].items():
            saved = tensors[f"{name}//{key}"]
            if device_kind == "paged":
                # Paged memory is bitsandbytes' own; a tensor moved with `.to` would lose its paging.
                paged: torch.Tensor = part.get_state_buffer(parameter, dtype=saved.dtype)  # type: ignore[attr-defined]
                state[key] = paged.copy_(saved)
            else:
                state[key] = saved.to(parameter.device if device_kind == "parameter" else "cpu", copy=True)
        optimizer.set_state(parameter, state)


def capture_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """Copy the state of Python's, NumPy's and torch's generators, of the CPU and (key `cuda`) of a GPU `device`.

    Python and NumPy use MT19937 (https://doi.org/10.1145/272991.272995): 624 words and a position.

    The shapes: `python` int64 [626] (version, then words), `numpy` int64 [626] (words, position, whether a normal draw
    is kept), `normals` float64 [3] (whether Python keeps one, Python's, NumPy's), `torch` and `cuda` uint8.
    """
    version, words, normal_draw = random.getstate()
    kind, keys, position, has_normal, normal = np.random.get_state(legacy=True)
    assert kind == "MT19937", "NumPy's global generator is the Mersenne twister"
    tensors = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_normal], dtype=torch.int64),
        "normals": torch.tensor([normal_draw is not None, normal_draw or 0.0, normal], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_rng(tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to the states that `capture_rng` gave, in its shapes; a GPU's only where one was captured."""
    version, *words = tensors["python"].tolist()
    has_python_normal, python_normal, normal = tensors["normals"].tolist()
    random.setstate((version, tuple(words), python_normal if has_python_normal else None))
    *keys, position, has_normal = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_normal, normal))
    torch.set_rng_state(tensors["torch"].cpu().clone())  # torch 2.13 crashes on a tensor that begins inside its storage
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].cpu().clone(), device)
