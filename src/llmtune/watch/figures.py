"""The newest figures of a run: what each means, and whether it looks right."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from llmtune.common.text import readable_bytes
from llmtune.watch.charts import short
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["Figure", "figures_of"]

ENOUGH = 8
"""Steps below which nothing is said about a trend."""

USUAL_CLIPPED_SHARE = 0.9
"""Above this share of the newest 100 steps the clip decides how far a step goes, and no longer the gradient."""

SLOW_SHARE = 0.7
"""Of the usual speed of a run; below it something else has the machine."""

PLAN_TOLERANCE = 0.15
"""Promise Q7: planned memory is within this share of the measured."""


class Figure(NamedTuple):
    """One number of a run."""

    name: str
    value: str
    meaning: str
    verdict: str
    """What it looks like; empty where there is too little to judge by."""
    is_fine: bool = True


def figures_of(run: RunData) -> list[Figure]:
    """Return the figures that the run has, in the order of the charts."""
    return [figure for make in FIGURES if (figure := make(run)) is not None]


def _loss(run: RunData) -> Figure | None:
    loss = run.metrics.get(run.loss_metric, Series()).finite()
    if not loss.values:
        return None
    third = len(loss) // 3
    verdict, is_fine = "", True
    if len(loss) >= ENOUGH:
        before, now = (sum(part) / third for part in (loss.values[-2 * third : -third], loss.values[-third:]))
        gain = (before - now) / abs(before) if before else 0.0
        better, worse = "falling", "rising"
        if run.measured == "reward":
            gain, better, worse = -gain, "rising", "falling"
        verdict = better if gain > 0.005 else "flat" if gain > -0.02 else f"{worse}: a lower learning rate may help"
        is_fine = gain > -0.02
    direction = "lower" if run.measured == "loss" else "higher"
    return Figure(run.measured, short(loss.values[-1]), f"{run.loss_unit}; {direction} is better", verdict, is_fine)


def _heldout(run: RunData) -> Figure | None:
    heldout = run.metrics.get(run.heldout_metric, Series()).finite()
    if not heldout.values:
        return None
    choose = max if run.measured == "reward" else min
    best = choose(range(len(heldout)), key=heldout.values.__getitem__)
    later = len(heldout) - 1 - best
    if len(heldout) == 1:
        verdict = f"measured once, at step {heldout.xs[0]:g}"
    elif later == 0:
        verdict = "the best so far"
    else:
        verdict = f"best was {short(heldout.values[best])} at step {heldout.xs[best]:g}"
    is_fine = later < 2
    verdict += "" if is_fine else "; no better since: it may over-fit"
    return Figure(f"held-out {run.measured}", short(heldout.values[-1]), "on rows it never trains on", verdict, is_fine)


def _gradients(run: RunData) -> Figure | None:
    norms = run.metrics.get("grad_norm", Series()).finite()
    if not norms.values:
        return None
    clip = run.flat_config.get("training.max_grad_norm")
    verdict, is_fine = "", True
    if isinstance(clip, int | float) and clip > 0 and len(norms) >= ENOUGH:
        newest = norms.values[-100:]
        share = sum(norm > clip for norm in newest) / len(newest)
        is_fine = share <= USUAL_CLIPPED_SHARE or len(newest) < 100  # the first steps of any run are large
        verdict = f"{share:.0%} of the newest {len(newest)} steps clipped at {clip:g}"
        verdict += "" if is_fine else ": nearly all"
    return Figure("gradient norm", short(norms.values[-1]), "length of the gradient before the clip", verdict, is_fine)


def _learning_rate(run: RunData) -> Figure | None:
    rates = run.metrics.get("learning_rate", Series()).finite()
    if not rates.values:
        return None
    now, peak = rates.values[-1], max(rates.values)
    verdict = "" if not peak else "at its peak" if now == peak else f"{now / peak:.0%} of its peak"
    return Figure("learning rate", f"{now:.3g}", "size of the steps", verdict, is_fine=peak > 0 or len(rates) < ENOUGH)


def _speed(run: RunData) -> Figure | None:
    speed = run.metrics.get("tokens_per_second", Series()).finite()
    if not speed.values:
        return None
    usual, now = median(speed.values), sum(speed.values[-5:]) / len(speed.values[-5:])
    verdict, is_fine = "", True
    if len(speed) >= ENOUGH and usual:
        is_fine = now >= SLOW_SHARE * usual
        verdict = "as usual" if is_fine else f"usually {usual:,.0f}: something else may use this machine"
    return Figure("tokens/s", f"{speed.values[-1]:,.0f}", "real tokens, no padding", verdict, is_fine)


def _memory(run: RunData) -> Figure | None:
    memory = run.metrics.get("memory_bytes", Series()).finite()
    if not memory.values or not max(memory.values):
        return None
    peak, planned = max(memory.values), run.planned_bytes
    verdict, is_fine = "", True
    if planned:
        is_fine = peak <= planned * (1 + PLAN_TOLERANCE)
        verdict = f"{peak / planned:.0%} of the {readable_bytes(round(planned))} planned"
    return Figure("memory", readable_bytes(round(peak)), "the most this process held", verdict, is_fine)


def _skipped(run: RunData) -> Figure | None:
    if not run.skipped:
        return None
    newest = run.skipped[-1]
    return Figure(
        "skipped steps", str(len(run.skipped)), "not applied: loss or gradient not finite", newest.reason, False
    )


FIGURES: tuple[Callable[[RunData], Figure | None], ...] = (
    _loss,
    _heldout,
    _gradients,
    _learning_rate,
    _speed,
    _memory,
    _skipped,
)
