"""The arithmetic of forward and backward: fp32, bf16 autocast, or fp16 autocast with a loss scale."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from llmtune.common.decisions import Decision
from llmtune.engine.sharded_tensors import full_tensor
from llmtune.errors import ConfigError

__all__ = ["Precision", "PrecisionName", "choose_precision", "fixed_order_of_sums", "gpu_without_bf16", "without_tf32"]

PrecisionName = Literal["fp32", "bf16", "fp16"]

FIRST_SCALE = 2.0**16
"""Loss scale of the first fp16 step; this and the two rules below are those of `torch.amp.GradScaler`."""
GROWTH_INTERVAL = 2000
"""fp16 steps without overflow after which the scale doubles."""
SMALLEST_SCALE = 1.0
"""An overflow at this scale is not the scale's fault."""

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The arithmetic called `name`: the context of a forward pass, the scale of the loss, clipping.

    Fp16 multiplies the loss by a scale and divides it out of the gradients again (arXiv:1710.03740). Trained weights
    and their gradients are expected in float32; autocast only changes the type of matrix multiplications.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name not in DTYPES:
            raise ConfigError(
                f"unknown precision `{name}`", where="training.precision", fix=f"one of {', '.join(DTYPES)}"
            )
        self.name = name
        self.device = device
        self._dtype = DTYPES[name]
        self._scale = FIRST_SCALE if name == "fp16" else 1.0
        self._good_steps = 0

    @property
    def scale(self) -> float:
        """Factor on the loss of the next backward; 1 but for fp16."""
        return self._scale

    def autocast(self) -> AbstractContextManager[object]:
        """Give the context for a forward."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def clip(self, parameters: Iterable[torch.Tensor], max_grad_norm: float | None) -> torch.Tensor:
        """Divide the gradients by the loss scale, then clip them to `max_grad_norm` (None: not at all).

        g <- g min(1, max_grad_norm / ||g||), over all parameters together (arXiv:1211.5063). Returns ||g|| before
        clipping, shape [], without waiting for the device; not finite when any gradient is not. Called once for a
        window, after accumulation and after the sum over devices.
        """
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        if self._scale != 1.0:
            # Before the norm is taken: the bound is one on the gradient of the loss.
            torch._foreach_mul_(gradients, 1.0 / self._scale)
        if max_grad_norm is None:
            return full_tensor(torch.nn.utils.get_total_norm(gradients))
        return full_tensor(torch.nn.utils.clip_grad_norm_(with_gradient, max_grad_norm))

    def advance(self, *, applied: bool, loss_is_finite: bool) -> bool:
        """Count a window: 2000 applied in a row double the fp16 scale, one that was not applied halves it.

        Returns whether a window was not applied only because the scale was too large: fp16, a finite loss, and a scale
        that could still be halved.
        """
        if self.name != "fp16":
            return False
        if applied:
            # A scale as large as possible keeps small gradients out of fp16's subnormal numbers.
            self._good_steps += 1
            if self._good_steps == GROWTH_INTERVAL:
                self._scale *= 2.0
                self._good_steps = 0
            return False
        # A loss that is not finite is no overflow of the scale: the scale is applied after it.
        overflow = loss_is_finite and self._scale > SMALLEST_SCALE
        self._scale = max(self._scale * 0.5, SMALLEST_SCALE)
        self._good_steps = 0
        return overflow

    def state_dict(self) -> dict[str, float | int | str]:
        """Give what a resumed run needs, as plain numbers."""
        return {"name": self.name, "scale": self._scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, float | int | str]) -> None:
        """Set the state that `state_dict` gave; a run resumed in another precision starts with its first scale."""
        if state["name"] == self.name:
            # Without it a resumed run would begin with overflows again, and skip windows that the other did not.
            self._scale = float(state["scale"])
            self._good_steps = int(state["good_steps"])


def choose_precision(device: torch.device, *, has_adapter: bool = False) -> Decision:
    """Answer `training.precision: auto`: bf16 where the hardware multiplies it natively, else fp32.

    A GPU without bf16 takes fp16 where only an adapter is trained.
    """
    key = "training.precision"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Decision(key, "bf16", f"{name} multiplies bf16 natively")
        if gpu_without_bf16(has_adapter=has_adapter) == "fp16":
            reason = f"{name} has no native bf16, and multiplies fp16 several times faster than fp32"
            return Decision(key, "fp16", f"{reason}; the trained weights stay float32")
        return Decision(key, "fp32", f"{name} has no native bf16; fp16 is faster there if you ask for it")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        units = [unit for unit in ("amx_bf16", "avx512_bf16", "bf16") if capabilities.get(unit)]
        if units:
            return Decision(key, "bf16", f"this CPU multiplies bf16 natively ({units[0]})")
        return Decision(key, "fp32", "this CPU has no native bf16 multiplication")
    return Decision(key, "fp32", f"bf16 on {device.type} is not verified")


def gpu_without_bf16(*, has_adapter: bool) -> PrecisionName:
    """The arithmetic of a GPU before Ampere: fp16 for an adapter, whose frozen base is held in 16 bits anyway."""
    return "fp16" if has_adapter else "fp32"


def fixed_order_of_sums(device: torch.device) -> Decision:
    """Take only kernels that add in a fixed order from here on, in this process (`training.deterministic`)."""
    key = "training.deterministic"
    if device.type != "cuda":
        return Decision(key, True, f"asked for: sums on this {device.type} have a fixed order in any case")
    # cuBLAS reads it with its first product; of several workspaces it may take another one each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Warnings and not errors: the loss adds one number a row (`scatter_add`), for which there is no such kernel and
    # whose order cannot matter.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Decision(key, True, "asked for: attention's backward pass and others add in a fixed order, and take longer")


def without_tf32(device: torch.device, precision: PrecisionName) -> list[Decision]:
    """Say that float32 products keep their 24 bits, where a GPU could round their inputs to TF32's 11."""
    if precision != "fp32" or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return []
    reason = "fp32 was asked for, and TF32 rounds the inputs of products to 11 bits; bf16 is faster than either"
    return [Decision("training.precision.tf32", False, reason)]
