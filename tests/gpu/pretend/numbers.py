"""Tensors that say they are on the pretend GPU and compute on the host, or have a shape and no numbers.

Mixing devices is an error as on a GPU. Copies on another stream run late, when something waits for them. Operators
that only a GPU has (`TWINS`) have a plain form here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pretend.machine import DEVICE, Device, Event, Stream, cuda_of, outside_modes, patched, where

import torch  # isort: skip
import torch.nn.attention.varlen  # registers its operators
from pretend import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class OnCuda(torch.Tensor):
    """A tensor of the device; `elem` holds its numbers on the host."""

    elem: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> OnCuda:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=torch.device("cuda", 0),
            requires_grad=False,
        )
        made.elem = elem
        return made

    def __repr__(self) -> str:
        return f"OnCuda({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        DEVICE.wait("tolist")
        run_pending()
        return numbers_of(self.elem).tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnCuda) -> None:
        torch.Tensor.data.__set__(self, value)
        self.elem = value.elem

    def pin_memory(self, *args: object) -> torch.Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.Tensor': only dense CPU tensors can be pinned")


def numbers_of(elem: torch.Tensor) -> torch.Tensor:
    """The numbers as the host gets them: zeros where the device has none."""
    return torch.zeros_like(elem, device="cpu") if elem.is_meta else elem


PENDING: list[tuple[Stream, Callable[[], object]] | None] = []
"""Copies that have not run, in the order in which they were put on their streams."""


def run_pending(stream: Stream | None = None, until: int | None = None) -> None:
    """Run the copies of a stream (of all) that were put there before position `until`."""
    for position, one in enumerate(PENDING[:until]):
        if one is not None and stream in (None, one[0]):
            PENDING[position] = None
            one[1]()


class LateStream(Stream):
    """A stream whose copies run when somebody waits for them."""

    def wait_stream(self, other: Stream) -> None:
        if isinstance(other, LateStream):
            run_pending(other)

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            run_pending(event.stream, event.position)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.stream, event.position = self, len(PENDING)
        return event

    def synchronize(self) -> None:
        super().synchronize()
        run_pending(self)


class ComputingStream(LateStream):
    """The stream on which everything else runs, at once."""


def _histogram(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.histc(x.float(), *args, **kwargs).to(x.dtype)  # of integers, which the host's operator refuses


def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, inverse_rms: torch.Tensor, weight: torch.Tensor, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, scaled = x.float() * inverse_rms, grad.float() * weight.float()
    grad_x = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    grad_weight = (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight if needs_weight else weight.new_empty(0)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    inverse_rms = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * inverse_rms * weight.float()).to(x.dtype), inverse_rms


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate.float()).to(gate.dtype) * up


def _swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    grad, wide, sigmoid = grad.float(), gate.float(), gate.float().sigmoid()
    grad_gate = grad * up.float() * (sigmoid + wide * sigmoid * (1 - sigmoid))
    up.copy_(grad * wide * sigmoid)
    gate.copy_(grad_gate)


def _rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> None:
    cos, sin = cos.float().unsqueeze(2), sin.float().unsqueeze(2) * (-1 if backward else 1)
    for rows in (query, key):
        assert rows.is_contiguous(), "the kernel writes into what is contiguous, else into a copy"
        one, two = rows.float().chunk(2, dim=-1)
        rows.copy_(rows.float() * cos + torch.cat((-two, one), dim=-1) * sin)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, cap: float | None, with_gradient: bool) -> torch.Tensor:
    scores = logits.float()
    bent = None if cap is None else torch.tanh(scores / cap)
    scores = scores if bent is None else cap * bent
    nll = torch.logsumexp(scores, dim=1) - scores.gather(1, targets[:, None]).squeeze(1)
    if with_gradient:
        grad = torch.softmax(scores, dim=1) - torch.nn.functional.one_hot(targets, scores.shape[1])
        logits.copy_(grad if bent is None else grad * (1 - bent * bent))
    return nll


TWINS: dict[Any, Callable[..., Any]] = {
    torch.ops.torch_attn._varlen_attn.default: varlen.forward,
    torch.ops.torch_attn._varlen_attn_backward.default: varlen.backward,
    aten.histc.default: _histogram,
}

OF_KERNELS: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "swiglu": _swiglu,
    "swiglu_backward_": _swiglu_backward,
    "rotate_": _rotate,
    "cross_entropy_": _cross_entropy,
}
"""Operators of the package that call a kernel."""

WAITING = {
    aten._local_scalar_dense.default: "item",
    **{one: str(one) for one in (aten.nonzero.default, aten.equal.default, aten.masked_select.default)},
}
"""Operators whose result's shape or value the host must know."""
EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operators whose result holds what the memory held before: here NaN, so that reading it too early shows."""
HOST_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operators that accept indices on the host."""


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operator on the numbers, and note what the host waits for."""
    tensors: list[torch.Tensor] = []
    host_args = _on_host(args, tensors)
    host_kwargs = {name: _on_host(value, tensors) for name, value in kwargs.items()}
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    device = kwargs.get("device")
    to_device = bool(on_device) if device is None else torch.device(device).type == "cuda"
    if func is aten.copy_.default:
        return copy(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if func is aten._to_copy.default:
        _note_crossing(args[0], to_device=to_device, non_blocking=kwargs.get("non_blocking", False))
    elif on_device:
        _check_devices(func, tensors)
        if func in WAITING:
            DEVICE.wait(WAITING[func])
            run_pending()
    if on_device and (func in WAITING or not to_device):  # the host gets numbers
        host_args = tree_map_only(torch.Tensor, numbers_of, host_args)
    kernel = func if DEVICE.place.type == "meta" else TWINS.get(func, func)
    result = kernel(*host_args, **host_kwargs)
    if func in EMPTY and to_device and result.is_floating_point():
        result.fill_(float("nan"))
    if func is aten._to_copy.default and result is host_args[0]:
        result = result.clone()
    return _on_device(result, on_device) if to_device else result


def _on_host(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value with the numbers of tensors of the device in their place; every tensor is added to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.elem if isinstance(value, OnCuda) else value
    if isinstance(value, (tuple, list)):
        return type(value)([_on_host(one, tensors) for one in value])
    if isinstance(value, torch.device) and value.type == "cuda":
        return DEVICE.place
    return value


def _on_device(result: Any, arguments: list[OnCuda]) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)([_on_device(one, arguments) for one in result])
    if not isinstance(result, torch.Tensor):
        return result
    DEVICE.hold(result.untyped_storage())
    for tensor in arguments:
        if tensor.elem is result:  # operators in place return their argument
            return tensor
    return OnCuda(result)


def _note_crossing(source: torch.Tensor, *, to_device: bool, non_blocking: bool) -> None:
    if to_device == isinstance(source, OnCuda):
        return
    if to_device and non_blocking:
        if not source.is_pinned():
            DEVICE.copy_of_pageable(source.nbytes)
        return
    DEVICE.wait("copy to the device" if to_device else "copy to the host")
    run_pending()


def _check_devices(func: Any, tensors: list[torch.Tensor]) -> None:
    """Raise as torch does where tensors of two devices meet; a number alone may be on the host."""
    if not any(tensor.dim() > 0 and not isinstance(tensor, OnCuda) for tensor in tensors):
        return
    if func in HOST_INDICES:
        DEVICE.wait(f"index of the host in {func}")
        return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"({func} at {where()})"
    )


def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """Overwrite a tensor; between host and device on a second stream this happens later."""
    to, read = (one.elem if isinstance(one, OnCuda) else one for one in (target, source))
    if isinstance(target, OnCuda) == isinstance(source, OnCuda):
        to.copy_(read)
        return target
    host = read if isinstance(target, OnCuda) else to
    if not non_blocking:
        DEVICE.wait("copy")
        run_pending()
    elif not host.is_pinned():
        DEVICE.copy_of_pageable(host.nbytes)

    def run() -> None:
        with outside_modes():  # it may be called from anywhere
            to.copy_(read if to.is_meta else numbers_of(read))

    if non_blocking and not isinstance(DEVICE.stream, ComputingStream) and host.is_pinned():
        PENDING.append((DEVICE.stream, run))
    else:
        run()
    return target


class Numbers(TorchDispatchMode):
    """Sends every operator through `dispatch`, also those that make the first tensor of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


@contextmanager
def machine(card: str = "rtx4090", pinned_limit: int = 2**63, *, has_numbers: bool = True) -> Iterator[Device]:
    """A process with that card, whose tensors have numbers, or only shapes: then any model fits on the host."""
    PENDING.clear()
    # Register their operators; not earlier, since pytest wants to rewrite what it imports.
    import llmtune.kernels.liger
    import llmtune.kernels.rms_norm  # noqa: F401

    for name, twin in OF_KERNELS.items():
        TWINS.setdefault(getattr(torch.ops.llmtune, name).default, twin)
    ties = [(torch.nn.Module, "_apply", _keeping_ties(torch.nn.Module._apply))]
    with cuda_of(card, LateStream, pinned_limit) as device, patched(ties):
        device.default_stream = device.stream = ComputingStream()
        device.place = torch.device("cpu" if has_numbers else "meta")
        torch.__future__.set_overwrite_module_params_on_conversion(
            True
        )  # a wrapper is no tensor that can be swapped in
        try:
            with Numbers():
                yield device
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)


def _keeping_ties(real: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`Module._apply`, after which modules that shared a parameter share the new one, as on a GPU."""

    def apply(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((owner, name))
        real(module, *args, **options)
        for (first, first_name), *others in owners.values():
            for owner, name in others:
                owner._parameters[name] = first._parameters[first_name]
        return module

    return apply


def _never(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("a kernel of the pretend device was called")


# A build without CUDA takes these apart where no kernel is registered for CUDA, which a GPU does not.
_KERNELS = torch.library.Library("aten", "IMPL")
for _name in ("silu_backward",):
    _KERNELS.impl(_name, _never, "CUDA")
