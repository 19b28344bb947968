"""Liger's Triton kernels (arXiv:2410.10989) as operators: SwiGLU, rotary positions, cross-entropy.

The package is optional (`pip install 'llmtune[gpu]'`). Here its kernels become operators of torch with shapes of their
own, so that a memory plan, a count of bytes and a pretend device meet them as one operation each, installed or not.
Three of them write into their inputs: whoever calls those must be the last that reads the inputs.

Shapes: [..., I], I the width of a feed-forward layer; T tokens, H heads, D head width; C rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["LIGER", "is_installed"]

LIGER = "liger-kernel"
"""The name of the package."""

IGNORED = -100
"""A target that the kernel of cross-entropy skips; no row here has it."""

LARGEST_BLOCK = 1 << 15
"""Logits that the kernel of cross-entropy reads at a time: Liger's own bound."""


@cache
def is_installed() -> bool:
    """Whether Liger and the Triton it needs are there; whether they work, the engine's probe finds out."""
    return all(find_spec(name) is not None for name in ("liger_kernel", "triton"))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    output: Tensor = swiglu_forward(gate, up)[2]
    return output


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    from liger_kernel.ops.swiglu import swiglu_backward

    swiglu_backward(gate, up, grad)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    from liger_kernel.ops.rope import rope_backward, rope_forward

    # Views as the library hands them over: Liger turns them back, and writes into what is contiguous then.
    rotate = rope_backward if backward else rope_forward
    rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin)


def _cross_entropy(logits: Tensor, targets: Tensor, cap: float | None, with_gradient: bool) -> Tensor:
    import triton
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    rows, vocabulary = logits.shape
    nll = logits.new_empty(rows, dtype=torch.float32)
    # The kernel itself and not Liger's function around it, which waits for the device and rounds the losses.
    liger_cross_entropy_kernel[(rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=targets,
        Y_stride=targets.stride(0),
        weight_ptr=None,
        loss_ptr=nll,
        z_loss_ptr=None,
        loss_stride=nll.stride(0),
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocabulary,
        n_non_ignore=rows,
        sum_non_ignore_weight=rows,
        weight_sum=0.0,
        ignore_index=IGNORED,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=cap,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary)),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=cap is not None,
        HAS_GRADIENTS=with_gradient,
        num_warps=32,
    )
    return nll


def _nothing(*_arguments: object) -> None: ...


OPERATORS: dict[str, tuple[str, Callable[..., object], Callable[..., object]]] = {
    "swiglu": ("(Tensor gate, Tensor up) -> Tensor", _swiglu, lambda gate, _up: torch.empty_like(gate)),
    "swiglu_backward_": ("(Tensor grad, Tensor(a!) gate, Tensor(b!) up) -> ()", _swiglu_backward, _nothing),
    "rotate_": ("(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin, bool backward) -> ()", _rotate, _nothing),
    "cross_entropy_": (
        "(Tensor(a!) logits, Tensor targets, float? cap, bool with_gradient) -> Tensor",
        _cross_entropy,
        lambda logits, *_others: logits.new_empty(len(logits), dtype=torch.float32),
    ),
}
"""Name -> arguments and result, what runs, and what makes the result's shape.

swiglu: silu(gate) * up, contiguous. swiglu_backward_: overwrites gate and up with their gradients. rotate_: rotates
query [1, T, H, D] and key by cos and sin [1, T, D] in place, backward by the opposite angle. cross_entropy_: gives the
negative log-likelihood of each row of logits [C, V], in nats, float32 [C]; overwrites the logits with its gradient.
"""

LIBRARY = torch.library.Library("llmtune", "FRAGMENT")
for _name, (_schema, _run, _shape) in OPERATORS.items():
    if not hasattr(torch.ops.llmtune, _name):  # a module that is loaded under two names must not define them twice
        LIBRARY.define(_name + _schema)
        for _key, _function in (("CUDA", _run), ("CPU", _run), ("Meta", _shape)):
            LIBRARY.impl(_name, _function, _key)
