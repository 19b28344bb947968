"""The weights, gradients and optimizer state of a run in parts, held and moved by DeepSpeed (`deepspeed`).

ZeRO (arXiv:1910.02054) divides the optimizer state (stage 1), gradients too (2), and the weights themselves (3). The
engine is given our optimizer, our loss and our windows: a window is one update, whatever the number of its
micro-batches, and its loss is a sum that was divided once. So a run has the losses of one process. Checkpoints are
those of any run: no file of DeepSpeed's own format is read or written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from llmtune.common.decisions import Decision
from llmtune.config.schema import Config
from llmtune.engine.deepspeed_settings import engine_settings, zero_stage_of
from llmtune.engine.devices import Devices
from llmtune.engine.optim import AnyOptimizer, Optimizer
from llmtune.engine.precision import Precision
from llmtune.engine.rank_messages import lost_ranks_noticed
from llmtune.engine.sharding import ComputeRoot, MakeOptimizer
from llmtune.engine.update import set_learning_rate
from llmtune.errors import ConfigError, MachineError, in_one_line
from llmtune.models.parameters import base_model_of, trained_parameters

__all__ = ["StepOfEngine", "Zero", "ZeroOptimizer"]

P = ParamSpec("P")
T = TypeVar("T")


class Zero:
    """Every process holds a part of what the stage divides.

    Raises MachineError where DeepSpeed cannot be built.
    """

    is_sharded = True
    takes_blocks_as_stored = False

    def __init__(self, config: Config, devices: Devices) -> None:
        self._config, self._devices = config, devices
        self._stage = zero_stage_of(config)
        self._deepspeed = _import_deepspeed(devices.device)
        self._engine: Any = None

    def shard(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        /,
        *,
        convert_block: Callable[[nn.Module], object],  # noqa: ARG002 - of the protocol
    ) -> tuple[ZeroOptimizer, tuple[Decision, ...], list[Decision]]:
        """Give the model and the optimizer of its trained weights to DeepSpeed's engine.

        Raises MachineError where the engine of an earlier training of this program still holds the processes,
        ConfigError where DeepSpeed refuses its settings.
        """
        # Before the engine divides the weights: then they have their shapes, by which the optimizer groups them.
        optimizer, own = make_optimizer(self._devices.device)
        whole = sum(parameter.numel() for parameter in model.parameters())
        base = base_model_of(model)  # type: ignore[arg-type]
        settings, notes = engine_settings(
            self._config,
            world_size=self._devices.world_size,
            hidden_size=base.config.get_text_config().hidden_size,
            page_locked=self._devices.device.type == "cuda",
        )
        if self._deepspeed.comm.comm.cdb is not None:
            raise MachineError(
                "DeepSpeed still holds the processes of an earlier training of this program",
                where="distributed.strategy",
                fix="train once in a program, or use `distributed.strategy: fsdp`",
            )
        root = ComputeRoot(model)
        try:
            # It prints what it builds, and the standard output is for data.
            with contextlib.redirect_stdout(io.StringIO()), lost_ranks_noticed():
                self._deepspeed.init_distributed(verbose=False)
                if self._stage == 3:
                    # Weight by weight, so that no device holds the whole model first.
                    self._deepspeed.zero.Init(module=root, config_dict_or_path=settings)
                    for module in root.modules():
                        for name, buffer in module.named_buffers(recurse=False):
                            module._buffers[name] = buffer.to(self._devices.device)
                engine, *_ = self._deepspeed.initialize(model=root, optimizer=optimizer.parts[0], config=settings)
        except (ValueError, AssertionError) as error:
            file = self._config.distributed.deepspeed_config
            raise ConfigError(
                f"DeepSpeed refuses this run: {in_one_line(error)}",
                where=file or "distributed",
                fix="take what it names out of the file" if file else "use `distributed.strategy: fsdp`",
            ) from error
        self._engine = engine
        held = sum(self.part(parameter).numel() for parameter in model.parameters())
        own_part = f"this one of {self._devices.world_size} processes holds {held:,} of {whole:,} stored numbers"
        reason = f"ZeRO stage {self._stage} of DeepSpeed {self._deepspeed.__version__}; {own_part}"
        decisions = (Decision("distributed.strategy", "deepspeed", reason), *notes)
        return ZeroOptimizer(optimizer, engine, trained_parameters(model).values(), self._stage), decisions, own

    def run(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Call the function inside the engine, which gathers each weight where it is used."""
        kind = self._devices.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def in_autocast() -> T:
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                return function(*args, **named)

        # The engine switches off an autocast that it has not made, so it begins inside of it.
        with torch.autocast(kind, enabled=False), lost_ranks_noticed():
            result: T = self._engine(in_autocast)
        return result

    def whole(self, block: nn.Module, /) -> contextlib.AbstractContextManager[object]:
        """Gather the block's weights for a while."""
        return self.opened(block.parameters())

    @contextmanager
    def opened(self, parameters: Iterable[Tensor], /, *, write: bool = False) -> Iterator[None]:
        """Gather the parameters, of any shape, for a while; with `write` they keep the main process's values."""
        opened = list(parameters)
        with lost_ranks_noticed(), self._deepspeed.zero.GatheredParameters(opened, modifier_rank=0 if write else None):
            yield
            if write:
                for parameter in opened:
                    # The optimizer moves a copy of its own, and would put the earlier values back.
                    self._deepspeed.utils.safe_set_full_fp32_param(parameter, parameter.data)

    def shape(self, parameter: Tensor, /) -> torch.Size:
        """Give the shape of the whole parameter."""
        return torch.Size(parameter.ds_shape) if self._is_divided(parameter) else parameter.shape  # type: ignore[attr-defined]

    def part(self, parameter: Tensor, /) -> Tensor:
        """Give this process's part: with stage 3 of flat shape [about numel / processes], else the whole parameter."""
        return parameter.ds_tensor if self._is_divided(parameter) else parameter  # type: ignore[attr-defined, no-any-return]

    def _is_divided(self, parameter: Tensor) -> bool:
        return bool(self._deepspeed.runtime.zero.partition_parameters.is_zero_param(parameter))

    def gather(self, tensors: Mapping[str, Tensor], /, *, keep: bool) -> dict[str, Tensor]:
        """Gather them one at a time, each in its full shape. Two names of one tensor stay one tensor."""
        made: dict[int, Tensor] = {}
        # Each tensor once on every process, also where nothing is kept: a tied weight has two names.
        for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
            with self.opened([tensor]):
                if keep:
                    full = tensor.detach()
                    # What was gathered is dropped again.
                    made[id(tensor)] = full.to("cpu", copy=True) if self._is_divided(tensor) else full
        return {name: made[id(tensor)] for name, tensor in tensors.items()} if keep else {}

    def make_update(
        self,
        _parameters: Sequence[nn.Parameter],
        optimizer: AnyOptimizer,
        _precision: Precision,
        /,
        *,
        max_grad_norm: float | None,  # noqa: ARG002 - the engine has it in its settings
    ) -> StepOfEngine:
        """Leave the window to the engine."""
        return StepOfEngine(self._engine, optimizer, self._devices)


class StepOfEngine:
    """The update of a window by DeepSpeed's engine: it sums and clips the gradients, and moves the weights, at once.

    Where the norm is not finite it moves nothing, and the window is skipped as ever. A loss that is not finite has such
    a norm; where it had none, the weights would have moved (`has_begun`), and the run ends there, unsaved.
    """

    def __init__(self, engine: Any, optimizer: AnyOptimizer, devices: Devices) -> None:
        self._engine, self._optimizer, self._devices = engine, optimizer, devices
        self.has_begun = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, shape [], to that of the window: g = g + sum over processes of d loss / d w."""
        with lost_ranks_noticed():
            # The engine takes the mean over processes.
            self._engine.backward(loss * self._devices.world_size, scale_wrt_gas=False)

    def before_last_backward(self, losses: Sequence[Tensor], rate: float) -> None:  # noqa: ARG002 - of the protocol
        """Set the learning rate of the window's update; `losses`: scalars, shape [] each."""
        set_learning_rate(self._optimizer, rate)

    def finish_gradients(self) -> Tensor:
        """Move the weights by the window's gradient, summed over all processes and clipped (arXiv:1211.5063).

        Returns its norm before clipping, shape [], infinite where nothing was moved.
        """
        with lost_ranks_noticed():
            self._engine.step()
        self.has_begun = bool(self._engine.was_step_applied())
        norm = float(self._engine.get_global_grad_norm()) if self.has_begun else float("inf")
        return torch.tensor(norm, device=self._devices.device)

    def apply(self, rate: float) -> None:
        """Do nothing: the weights have moved."""

    def clear(self) -> None:
        """Begin a window; the engine has dropped its gradients."""
        self.has_begun = False


class ZeroOptimizer:
    """Our optimizer in the hands of DeepSpeed's engine, which lets it move flat parts of many weights at once."""

    def __init__(self, optimizer: Optimizer, engine: Any, parameters: Iterable[nn.Parameter], stage: int) -> None:
        self._engine, self._parameters, self._stage = engine, list(parameters), stage
        self.parts, self.param_groups = optimizer.parts, optimizer.param_groups

    def step(self) -> None:
        """Let the engine move the weights."""
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        self._engine.optimizer.zero_grad(set_to_none)

    def part_of(self) -> Iterator[tuple[nn.Parameter, torch.optim.Optimizer]]:
        """Give each parameter with the torch optimizer that moves it."""
        yield from ((parameter, self.parts[0]) for parameter in self._parameters)

    def state_of(self, parameter: nn.Parameter, /) -> dict[str, Any]:
        """Give a parameter's state in full, empty before its first step; each process must call it."""
        # All flat parts move together, so that one counter of steps is that of all.
        first: dict[str, Tensor] = next((state for state in self.parts[0].state.values() if state), {})
        if first:
            self._link(parameter)
        with lost_ranks_noticed():
            get = _tools().safe_get_full_optimizer_state
            return {key: value.clone() if key == "step" else get(parameter, key) for key, value in first.items()}

    def _link(self, parameter: nn.Parameter) -> None:
        """Tell the parameter where in the flat parts its state lies, with stages in which it has to know.

        DeepSpeed does it after the step of the first group of parameters, when the others have no state yet.
        """
        place = parameter._hp_mapping if self._stage < 3 else None  # type: ignore[attr-defined]
        if place is not None:  # else it is not in this process's parts
            flat = self._flat_parts()[place.param_group_index]
            place.set_optim_state_fragment(flat, self.parts[0].state[flat])

    def _flat_parts(self) -> list[Tensor]:
        flat: list[Tensor] = getattr(self._engine.optimizer, FLAT_PARTS[self._stage])
        return flat

    def set_state(self, parameter: nn.Parameter, state: dict[str, Any], /) -> None:
        """Replace a parameter's state by one in full; an empty one clears that of all."""
        inner = self.parts[0].state
        if not state:
            inner.clear()
            return
        for flat in self._flat_parts():
            inner[flat].update({key: torch.zeros_like(flat) for key in state if key not in ("step", *inner[flat])})
            inner[flat]["step"] = state["step"].clone()
        self._link(parameter)
        for key, value in state.items():
            if key != "step":
                _tools().safe_set_full_optimizer_state(parameter, value, key)


FLAT_PARTS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}
"""What DeepSpeed calls the flat parts of weights that a process moves, by stage."""


def _tools() -> ModuleType:
    import deepspeed.utils

    return deepspeed.utils


def _import_deepspeed(device: torch.device) -> ModuleType:
    """Import the package for that device, quietly. Raises MachineError where it could not build a part of itself."""
    missing = [name for name in ("ninja", "g++") if shutil.which(name) is None]
    if device.type == "cpu" and missing:
        raise MachineError(
            f"DeepSpeed builds a part of itself on a CPU, and {' and '.join(missing)} cannot be found",
            where="distributed.strategy",
            fix="install them (`apt install g++ ninja-build`), or use `distributed.strategy: fsdp`",
        )
    # Read by its import: else it takes a GPU that `--no-cuda` leaves alone.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collective operations of torch by their older names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed
