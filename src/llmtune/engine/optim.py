"""Optimizers: which parameters decay, which rule moves which, and one interface for all of them.

Every rule is decoupled: a step first multiplies decayed parameters by `1 - learning rate x weight decay`. Matrices
decay (those of embeddings and LoRA too); whatever has one dimension - norms, biases, DoRA's magnitudes - never does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from llmtune.common.decisions import Decision
from llmtune.config.schema import TrainingConfig
from llmtune.engine.sharded_tensors import shard_like
from llmtune.errors import ConfigError
from llmtune.models.quantization import bnb_optimizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "LR_SCALE",
    "OPTIMIZERS",
    "AnyOptimizer",
    "Optimizer",
    "OptimizerName",
    "build_optimizer",
    "choose_rates",
    "learning_rate_scales",
    "matrices_of_blocks",
]

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "muon", "sgd"]
Group = dict[str, Any]
"""A group of parameters as `torch.optim` has it: `params`, `lr`, `weight_decay` and the optimizer's further options."""


class AnyOptimizer(Protocol):
    """What a training asks of its optimizer, whichever way the weights are held."""

    parts: tuple[torch.optim.Optimizer, ...]
    param_groups: list[Group]

    def step(self) -> None:
        """Apply the gradients once."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        ...

    def part_of(self) -> Iterator[tuple[nn.Parameter, torch.optim.Optimizer]]:
        """Give each parameter with the part that moves it."""
        ...

    def state_of(self, parameter: nn.Parameter, /) -> Mapping[str, Any]:
        """Give a parameter's state, empty before its first step; each process must call it.

        It is in full, or in DTensors, which name their full shapes.
        """
        ...

    def set_state(self, parameter: nn.Parameter, state: dict[str, Any], /) -> None:
        """Replace a parameter's state by one in full."""
        ...


class Optimizer:
    """One or several `torch.optim` optimizers that step together, each over different parameters."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups: list[Group] = [group for part in parts for group in part.param_groups]
        self._owners = {
            parameter: (part, group) for part in parts for group in part.param_groups for parameter in group["params"]
        }

    def step(self) -> None:
        """Apply the gradients once."""
        for part in self.parts:
            for group in part.param_groups:
                if group.get(_DECAY_APART):
                    with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
                    # Before the step, as AdamW does it: the gradient's part is not decayed.
                    with torch.no_grad():
                        torch._foreach_mul_(with_gradient, 1.0 - group["lr"] * group[_DECAY_APART])
            part.step()

    def step_only(self, parameter: nn.Parameter) -> None:
        """Apply the gradient of one parameter, by the rules of its group and with its state."""
        part, group = self._owners[parameter]
        groups = part.param_groups
        # torch's optimizers step over all their groups, so for this step the part has only one, with one parameter.
        part.param_groups = [{**group, "params": [parameter]}]
        try:
            Optimizer(part).step()
        finally:
            part.param_groups = groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def part_of(self) -> Iterator[tuple[nn.Parameter, torch.optim.Optimizer]]:
        """Give each parameter with the part that moves it."""
        yield from ((parameter, part) for parameter, (part, _) in self._owners.items())

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Give a parameter's state as it is held, empty before its first step."""
        return dict(self._owners[parameter][0].state.get(parameter, {}))

    def set_state(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Replace a parameter's state by one in full, of which a sharded parameter keeps its part."""
        part = self._owners[parameter][0]
        # A parameter without saved state (never moved) must not keep that of a step made in between.
        part.state.pop(parameter, None)
        if state:
            part.state[parameter] = {
                key: shard_like(value, parameter) if isinstance(value, torch.Tensor) else value
                for key, value in state.items()
            }


LR_SCALE = "lr_scale"
"""Key of a group whose learning rate is that of the schedule times this factor."""

_DECAY_APART = "decay_apart"
"""Key of a group whose optimizer has no decoupled decay of its own; `Optimizer.step` applies it."""


@dataclass(frozen=True)
class _Request:
    """The arguments of a function in `OPTIMIZERS`."""

    name: OptimizerName
    parameters: Mapping[str, nn.Parameter]
    orthogonal: Collection[str]
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    device: torch.device
    lr_scales: Mapping[str, float]

    def groups(self, names: Collection[str] | None = None) -> list[Group]:
        """Give decayed and undecayed parameters as two groups (those that are not empty), in order.

        Of `names` only, when given. Parameters with a rate of their own follow, in groups with `LR_SCALE`.
        """
        named = {name: parameter for name, parameter in self.parameters.items() if names is None or name in names}
        scales = {name: self.lr_scales.get(name, 1.0) for name in named}
        groups: list[Group] = []
        for scale in sorted(set(scales.values()), key=lambda scale: (scale != 1.0, scale)):
            parameters = [parameter for name, parameter in named.items() if scales[name] == scale]
            matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
            vectors = [parameter for parameter in parameters if parameter.ndim < 2]
            both = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
            own = {} if scale == 1.0 else {LR_SCALE: scale}
            groups += [{**group, **own} for group in both if group["params"]]
        return groups


def build_optimizer(
    name: OptimizerName,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    device: torch.device,
    orthogonal: Collection[str] = (),
    lr_scales: Mapping[str, float] | None = None,
) -> tuple[Optimizer, list[Decision]]:
    """Build the optimizer `name` over the trained `parameters` (by name), all on `device`.

    `orthogonal`: names of the matrices that `muon` moves (see `matrices_of_blocks`); AdamW moves the rest, at the same
    learning rate. `lr_scales`: factors of the learning rate by name (see `learning_rate_scales`). `sgd` takes its
    momentum from `betas[0]`; `lion` uses `betas` as they are. Raises ConfigError for a name that is unknown or cannot
    work on `device`.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"unknown optimizer `{name}`", where="training.optimizer", fix=f"one of {', '.join(OPTIMIZERS)}"
        )
    assert parameters, "there is at least one trained parameter"
    return OPTIMIZERS[name](
        _Request(name, parameters, orthogonal, learning_rate, weight_decay, betas, eps, device, lr_scales or {})
    )


def learning_rate_scales(
    model: PreTrainedModel | PeftModel,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    embedding_learning_rate: float | None,
    loraplus_lr_ratio: float | None,
) -> tuple[dict[str, float], list[Decision]]:
    """Return the factor of the learning rate of each trained parameter that has another one, and those choices.

    loraplus_lr_ratio: factor of LoRA's B, which is 0 at first, and of DoRA's magnitudes; A keeps the rate (LoRA+, Hayou
    et al. 2024, arXiv:2402.12354). embedding_learning_rate: peak rate of the embedding and the output head, or of the
    rows of them that are trained.

    Raises ConfigError where no parameter is of that kind.
    """
    scales: dict[str, float] = {}
    decisions = []
    if loraplus_lr_ratio is not None:
        names = [
            name for name in parameters if any(part in name for part in ("lora_B", "lora_embedding_B", "lora_mag"))
        ]
        if not names:
            fix = "set adapter.method=lora, or leave training.loraplus_lr_ratio out"
            raise ConfigError("no LoRA layer is trained", where="training.loraplus_lr_ratio", fix=fix)
        scales |= dict.fromkeys(names, loraplus_lr_ratio)
        reason = f"the learning rate of {len(names)} tensors that begin at 0 is {loraplus_lr_ratio * learning_rate:g}"
        decisions.append(Decision("training.loraplus_lr_ratio", loraplus_lr_ratio, reason))
    if embedding_learning_rate is not None:
        layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
        # By identity: names differ between architectures, and a tied weight is listed under one of its two.
        ids = {id(parameter) for layer in layers for parameter in layer.parameters()}
        names = [name for name, parameter in parameters.items() if id(parameter) in ids]
        if not names:
            fix = "train it: adapter.modules_to_save or adapter.train_tokens; or leave it out"
            problem = "neither the embedding nor the output head is trained"
            raise ConfigError(problem, where="training.embedding_learning_rate", fix=fix)
        scales |= dict.fromkeys(names, embedding_learning_rate / learning_rate if learning_rate else 1.0)
        reason = f"the learning rate of {', '.join(names[:4])}"
        decisions.append(Decision("training.embedding_learning_rate", embedding_learning_rate, reason))
    return scales, decisions


def matrices_of_blocks(model: PreTrainedModel | PeftModel, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Name the trained matrices that are no embedding and no output head: those that Muon is made for.

    https://kellerjordan.github.io/posts/muon
    """
    outside = {
        id(weight) for module in model.modules() if isinstance(module, nn.Embedding) for weight in module.parameters()
    }
    # A head that is not tied is a Linear, which the look at embeddings misses.
    head = model.get_output_embeddings()
    if head is not None:
        outside |= {id(weight) for weight in head.parameters()}
    return {name for name, parameter in parameters.items() if parameter.ndim == 2 and id(parameter) not in outside}


def _adamw(request: _Request) -> tuple[Optimizer, list[Decision]]:
    fused = request.device.type in FUSED_DEVICES and all(
        parameter.is_floating_point() for parameter in request.parameters.values()
    )
    optimizer = torch.optim.AdamW(
        request.groups(),
        lr=request.learning_rate,
        betas=request.betas,
        eps=request.eps,
        fused=fused,
        foreach=None if fused else True,
    )
    reason = (
        f"torch has the fused kernel for {request.device.type}"
        if fused
        else f"no fused kernel for {request.device.type}"
    )
    return Optimizer(optimizer), [Decision("training.optimizer", "adamw, fused" if fused else "adamw", reason)]


def _bitsandbytes(request: _Request) -> tuple[Optimizer, list[Decision]]:
    if request.name.startswith("paged") and request.device.type != "cuda":
        raise ConfigError(
            f"optimizer `{request.name}` pages its state between GPU and CPU memory; "
            f"this run is on the {request.device.type}",
            where="training.optimizer",
            fix=f"use `{request.name.removeprefix('paged_')}` here",
        )
    assert request.name in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion")
    optimizer = bnb_optimizer(
        request.name,
        request.groups(),
        lr=request.learning_rate,
        betas=request.betas,
        eps=request.eps,
        weight_decay=request.weight_decay,
    )
    return Optimizer(optimizer), [
        Decision("training.optimizer", request.name, f"bitsandbytes' {type(optimizer).__name__}")
    ]


def _adafactor(request: _Request) -> tuple[Optimizer, list[Decision]]:
    """Shazeer and Stern 2018 (arXiv:1804.04235) as the Trainer of transformers sets it up for `optim: adafactor`."""
    from transformers.optimization import Adafactor

    optimizer = Adafactor(request.groups(), lr=request.learning_rate, scale_parameter=False, relative_step=False)
    reason = "transformers' own, with the learning rate as it is: neither scaled by the weights nor by the step"
    return Optimizer(optimizer), [Decision("training.optimizer", "adafactor", reason)]


def _muon(request: _Request) -> tuple[Optimizer, list[Decision]]:
    rest = [name for name in request.parameters if name not in request.orthogonal]
    parts: list[torch.optim.Optimizer] = []
    if request.orthogonal:
        parts.append(
            # Scaled to the size of AdamW's updates (arXiv:2502.16982), so that one learning rate serves both.
            torch.optim.Muon(
                request.groups(request.orthogonal), lr=request.learning_rate, adjust_lr_fn="match_rms_adamw"
            )
        )
    if rest:
        adamw, _ = _adamw(replace(request, parameters={name: request.parameters[name] for name in rest}))
        parts.extend(adamw.parts)
    reason = f"{len(request.orthogonal)} matrices of the blocks; AdamW for the other {len(rest)} tensors"
    return Optimizer(*parts), [Decision("training.optimizer", "muon", reason)]


def _sgd(request: _Request) -> tuple[Optimizer, list[Decision]]:
    groups = [{**group, "weight_decay": 0.0, _DECAY_APART: group["weight_decay"]} for group in request.groups()]
    optimizer = torch.optim.SGD(groups, lr=request.learning_rate, momentum=request.betas[0])
    return Optimizer(optimizer), [
        Decision("training.optimizer", "sgd", f"momentum {request.betas[0]}, the first of `training.betas`")
    ]


FUSED_DEVICES = ("cuda", "cpu")
"""Device types for which `torch.optim.AdamW(fused=True)` has a kernel."""

OPTIMIZERS: dict[str, Callable[[_Request], tuple[Optimizer, list[Decision]]]] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes,
    "paged_adamw": _bitsandbytes,
    "paged_adamw_8bit": _bitsandbytes,
    "lion": _bitsandbytes,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
}


FULL_LEARNING_RATE = 2e-5
LORA_LEARNING_RATE = 2e-4
COMPARISON_DIVISOR = 20
"""A loss that compares answers moves a tuned model away from its reference; usual rates are that much lower."""

SCRATCH_LEARNING_RATES = ((20_000_000, 1e-3), (100_000_000, 6e-4), (300_000_000, 3e-4))
"""(parameters up to, peak rate): smaller models take larger steps; the last rate holds for all larger ones."""


def choose_rates(
    training: TrainingConfig, *, scratch: bool, adapter: bool, parameters: int, compares: bool = False
) -> tuple[TrainingConfig, list[Decision]]:
    """Fill in learning rate and weight decay where the config leaves them open, with the reason for each.

    compares: the objective compares answers, which asks for a far lower rate (DPO's authors used 1e-6 for full tuning,
    arXiv:2305.18290, appendix B).

    >>> choose_rates(TrainingConfig(), scratch=False, adapter=True, parameters=135_000_000)[0].learning_rate
    0.0002
    """
    decisions = []
    if training.learning_rate is None:
        if scratch:
            rate = next(
                (rate for limit, rate in SCRATCH_LEARNING_RATES if parameters <= limit), SCRATCH_LEARNING_RATES[-1][1]
            )
            why = f"usual for a model of {parameters / 1e6:.0f} M parameters trained from scratch"
        else:
            rate, why = (
                (LORA_LEARNING_RATE, "usual for LoRA")
                if adapter
                else (FULL_LEARNING_RATE, "usual for full tuning of a pretrained model")
            )
            if compares:
                # Rounded: 2e-5 / 20 is 1.0000000000000002e-06.
                rate = float(f"{rate / COMPARISON_DIVISOR:g}")
                why += f", divided by {COMPARISON_DIVISOR}: answers are compared"
        training = replace(training, learning_rate=rate)
        decisions.append(Decision("training.learning_rate", rate, why))
    if training.weight_decay is None:
        decay, why = (
            (0.1, "usual from scratch")
            if scratch
            else (0.0, "usual for LoRA")
            if adapter
            else (0.01, "usual for full tuning")
        )
        training = replace(training, weight_decay=decay)
        decisions.append(Decision("training.weight_decay", decay, why))
    return training, decisions
