"""Losses that compare answers, as functions of log-probabilities: one value for each pair, or for each answer.

log p is the sum over the trained tokens of an answer, in nats; every function is computed in the type it is given
(float32 in training). Sums over a window, and the one division by its number of pairs, are in `preference`.

Shapes: P pairs, S answers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

__all__ = [
    "PairLogProbs",
    "dpo_losses",
    "kto_losses",
    "log_odds",
    "log_ratios",
    "orpo_losses",
    "simpo_losses",
    "token_means",
]


class PairLogProbs(NamedTuple):
    """Log-probabilities of both sides of P pairs, and their numbers of trained tokens; each [P]."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    """By the reference; zeros in methods without one."""
    reference_rejected: Tensor


def log_ratios(pairs: PairLogProbs, *, by_token: bool = False) -> tuple[Tensor, Tensor]:
    """Log-ratios of the chosen and of the rejected side to the reference, [P] each.

    ratio = log p - log p_ref (arXiv:2305.18290, section 4); `by_token`: divided by the side's trained tokens. Each side
    is compared with its own reference first: a model equal to its reference then has exactly 0 on both.
    """
    chosen, rejected = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
    return (chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens) if by_token else (chosen, rejected)


def token_means(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """Mean log-probability of a token of the chosen and of the rejected side, [P] each.

    mean = log p / trained tokens of the side (arXiv:2405.14734, section 2.2).
    """
    return pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens


def dpo_losses(chosen: Tensor, rejected: Tensor, *, loss: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimization from log-ratios to the reference, [P] each; returns [P].

    With d = chosen - rejected:

    - `sigmoid`: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), e the label smoothing (Rafailov et al. 2023,
      arXiv:2305.18290, equation 7; with e its conservative form: E. Mitchell, "A note on DPO with noisy preferences").
    - `hinge`: max(0, 1 - beta d) (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425, in the form of RSO, Liu et al. 2023,
      arXiv:2309.06657).
    - `ipo`: (d - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, equation 17), on log-ratios by token, as its
      authors confirmed.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> [round(dpo_losses(zero, zero, loss=name, beta=0.1).item(), 4) for name in ("sigmoid", "hinge", "ipo")]
    [0.6931, 1.0, 25.0]
    """
    difference = chosen - rejected
    if loss == "hinge":
        return functional.relu(1 - beta * difference)
    if loss == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    assert loss == "sigmoid"
    losses = -functional.logsigmoid(beta * difference)
    if not label_smoothing:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * functional.logsigmoid(-beta * difference)


def simpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    """Simple preference optimization from mean log-probabilities of a token, [P] each; returns [P].

    -log sigmoid(beta (chosen - rejected) - gamma), gamma = gamma_beta_ratio * beta (Meng et al. 2024, arXiv:2405.14734,
    equation 6).
    """
    return -functional.logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))


def log_odds(mean: Tensor) -> Tensor:
    """Log-odds of mean log-probabilities m of a token, which are below 0, of any shape (arXiv:2403.07691).

    log_odds = log(p / (1 - p)) = m - log(1 - e^m). The second term is log(-expm1(m)) near 0 and log1p(-exp(m)) far from
    it (M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012), so it is right to rounding for m from -30 to
    -1e-7. Above -1e-7, where float32 has no number between p and 1, m counts as -1e-7.

    >>> import torch
    >>> log_odds(torch.tensor([-0.6931472, -30.0])).round(decimals=3).tolist()
    [0.0, -30.0]
    """
    mean = mean.clamp(max=-1e-7)
    is_near = mean > -math.log(2)
    # Each branch sees only values at which its gradient is finite: a NaN times 0 is NaN.
    near = (-mean.where(is_near, mean.new_tensor(-1.0)).expm1()).log()
    far = (-mean.where(~is_near, mean.new_tensor(-1.0)).exp()).log1p()
    return mean - near.where(is_near, far)


def orpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Odds-ratio term from mean log-probabilities of a token, [P] each; returns [P].

    -beta log sigmoid(log odds(chosen) - log odds(rejected)) (Hong et al. 2024, arXiv:2403.07691, equation 7; beta is
    the paper's lambda). The other term, the loss of the chosen answers, is added for the whole window.
    """
    return -beta * functional.logsigmoid(log_odds(chosen) - log_odds(rejected))


def kto_losses(
    ratios_S: Tensor, is_desirable_S: Tensor, *, loss: str, beta: float, z0: float, weights: tuple[float, float]
) -> Tensor:
    """Kahneman-Tversky optimization from log-ratios to the reference [S], and which answers are desirable, bool [S].

    - `kto`: w (1 - sigmoid(beta (r - z0))) where desirable, w (1 - sigmoid(beta (z0 - r))) where not (Ethayarajh et al.
      2024, arXiv:2402.01306, equation 8). z0: the reference point, at least 0, a constant for the gradient.
    - `apo_zero`: w (1 - sigmoid(beta r)) and w sigmoid(beta r), without a reference point (D'Oosterlinck et al. 2024,
      arXiv:2408.06266).

    weights: w of desirable and of undesirable answers. Returns [S].
    """
    point = z0 if loss == "kto" else 0.0
    gain = beta * (ratios_S - point)
    losses = 1 - gain.where(is_desirable_S, -gain).sigmoid()
    return losses * losses.new_tensor(weights[0]).where(is_desirable_S, losses.new_tensor(weights[1]))
