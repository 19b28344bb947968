"""Adapters whose first values are a part of their base: PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775).

B0 A0 is a part of each weight W, and in memory the base keeps the rest: W = R + s B0 A0, so outputs are unchanged. The
base on the disk is W, so the adapter is saved as what was learned beside it: R + s B A = W + s [B, -B0] [A; A0], plain
LoRA of twice the rank, as peft converts it: https://huggingface.co/docs/peft/developer_guides/lora#pissa
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llmtune.common.decisions import Decision
from llmtune.errors import AdapterError
from llmtune.models.weights import digest_tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer

__all__ = ["PARTS", "TakenPart", "lora_layers", "strongest_part", "take_part"]

_SAVED_A, _SAVED_B = ".lora_A.weight", ".lora_B.weight"


class TakenPart:
    """What was taken out of the base: A0 [r, in] and B0 [out, r] of each layer, float32, by their names in a file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def from_saved(cls, saved: Mapping[str, Tensor]) -> TakenPart:
        """Read it out of the tensors of an adapter that `as_lora` made, A [2r, in] and B [out, 2r] of each layer.

        A0 = the last r rows of A, B0 = minus the last r columns of B.
        """
        return cls({name: _halves(name, saved[name])[1] for name in saved if name.endswith((_SAVED_A, _SAVED_B))})

    def digest(self) -> str:
        """The sha256 over all of it."""
        return digest_tensors(sorted(self.tensors.items()))

    def as_lora(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return A [r, in] and B [out, r] as LoRA for the base as it was: [2r, in] and [out, 2r], the rest as it is.

        B A - B0 A0 = [B, -B0] [A; A0] (PiSSA, Meng et al. 2024, arXiv:2404.02948).
        """
        return {
            name: torch.cat([tensor.cpu(), _signed(name, self.tensors[name])], dim=_dim(name))
            if name in self.tensors
            else tensor
            for name, tensor in trained.items()
        }

    def trained(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained half of each [2r, in] and [out, 2r] that `as_lora` made, bit for bit.

        A = the first r rows, B = the first r columns.
        """
        return {name: _halves(name, tensor)[0] if name in self.tensors else tensor for name, tensor in saved.items()}

    def config_as_lora(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the adapter's config with twice every rank, and the alphas that keep every scale."""
        # The scale is alpha / r, or alpha / sqrt(r).
        grown = 2**0.5 if config["use_rslora"] else 2
        return {
            **config,
            "r": 2 * config["r"],
            "lora_alpha": grown * config["lora_alpha"],
            "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
            "alpha_pattern": {name: grown * alpha for name, alpha in config["alpha_pattern"].items()},
        }


def take_part(
    adapted: PeftModel, init: str, *, seed: int, saved: Mapping[str, Tensor] | None = None
) -> tuple[TakenPart, Decision]:
    """Give every adapted layer the first values that `init` names (see `PARTS`), and take them out of its weight.

    W' = W - scale B0 A0, with W [out, in], A0 [r, in], B0 [out, r] (PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775).

    seed: of the random projections of `pissa_niter_N`. saved: tensors of a checkpoint of this run, in which the part
    stands: the same one is taken again, on any machine. Raises AdapterError for a layer that cannot give it.
    """
    known = TakenPart.from_saved(saved).tensors if saved is not None else None
    tensors: dict[str, Tensor] = {}
    lost = 0.0
    for index, (name, layer) in enumerate(lora_layers(adapted)):
        weight = cast("Tensor", layer.get_base_layer().weight)
        _check(adapted, name, layer, weight, init)
        stored = cast("Any", layer).fan_in_fan_out  # as [in, out]
        full_OI = (weight.data.T if stored else weight.data).float()
        a, b = cast("nn.Linear", layer.lora_A["default"]).weight, cast("nn.Linear", layer.lora_B["default"]).weight
        if known is None:
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                torch.manual_seed(seed + index)
                first_A, first_B = PARTS[init](full_OI, layer.r["default"], layer.scaling["default"])
        else:
            first_A, first_B = (known[f"{name}{end}"].to(weight.device) for end in (_SAVED_A, _SAVED_B))
        a.data, b.data = first_A.contiguous(), first_B.contiguous()
        rest_OI = full_OI - layer.scaling["default"] * b.data @ a.data
        rounded_OI = rest_OI.to(weight.dtype)
        lost = max(lost, float((rounded_OI.float() - rest_OI).norm() / full_OI.norm()))
        weight.data = (rounded_OI.T if stored else rounded_OI).contiguous()
        tensors |= {f"{name}{_SAVED_A}": a.data.cpu().clone(), f"{name}{_SAVED_B}": b.data.cpu().clone()}
    rank = adapted.peft_config["default"].r  # type: ignore[attr-defined]
    reason = f"the base in memory is without this part; saved as LoRA of rank {2 * rank}, which fits the base as it is"
    if lost:
        reason += f"; {weight.dtype} rounds the rest by up to {lost:.1e} of a weight's norm".replace("torch.", "")
    return TakenPart(tensors), Decision("adapter.init", init, reason)


def lora_layers(adapted: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the name and module of every adapted layer."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _check(adapted: PeftModel, name: str, layer: LoraLayer, weight: Tensor, init: str) -> None:
    """Raise AdapterError for a layer of which no part can be taken."""
    short = name.removeprefix("base_model.model.")
    if "default" not in layer.lora_A:
        problem, fix = f"`{short}` is an embedding", "leave it out with adapter.exclude_modules"
    elif layer.r["default"] > min(weight.shape):
        problem = f"`{short}` is {tuple(weight.shape)}, less than rank {layer.r['default']}"
        fix = f"lower adapter.r to {min(weight.shape)}"
    elif weight is adapted.get_input_embeddings().weight:
        problem = f"`{short}` is tied to the embedding, which would change"
        fix = "leave it out with adapter.exclude_modules"
    else:
        return
    raise AdapterError(f"{init} takes the adapter's first values from each weight, and {problem}", "adapter.init", fix)


def _dim(name: str) -> int:
    return 0 if name.endswith(_SAVED_A) else 1


def _signed(name: str, tensor: Tensor) -> Tensor:
    return tensor if name.endswith(_SAVED_A) else -tensor


def _halves(name: str, saved: Tensor) -> tuple[Tensor, Tensor]:
    trained, taken = saved.chunk(2, dim=_dim(name))
    return trained.contiguous(), _signed(name, taken).contiguous()


def strongest_part(weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The strongest `rank` singular directions, each singular value shared by both: A [r, in], B [out, r].

    W = U S V^T, A = sqrt(S / scale) V^T and B = U sqrt(S / scale), of the `rank` largest S (PiSSA, arXiv:2404.02948).
    """
    u_OK, s_K, vt_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    return _shared(u_OK[:, :rank], s_K[:rank], vt_KI[:rank], scale)


def _pissa_niter(iterations: int) -> Callable[[Tensor, int, float], tuple[Tensor, Tensor]]:
    """The same, nearly: by random projections (Halko et al. 2009, arXiv:0909.4061), many times faster."""

    def part(weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        u_OR, s_R, v_IR = torch.svd_lowrank(weight_OI, rank, niter=iterations)
        return _shared(u_OR, s_R, v_IR.T, scale)

    return part


def _shared(u_OR: Tensor, s_R: Tensor, vt_RI: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    root_R = (s_R / scale).sqrt()
    return root_R[:, None] * vt_RI, u_OR * root_R


def _olora(weight_OI: Tensor, rank: int, _: float) -> tuple[Tensor, Tensor]:
    """The first `rank` columns of Q and rows of R of the weight's QR decomposition: R [r, in], Q [out, r]."""
    q_OK, r_KI = torch.linalg.qr(weight_OI)
    return r_KI[:rank], q_OK[:, :rank]


PARTS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": strongest_part,
    "pissa_niter_4": _pissa_niter(4),
    "pissa_niter_16": _pissa_niter(16),
    "olora": _olora,
}
"""Weight [out, in], rank and scale to A [r, in] and B [out, r]."""
