"""The loss of a run as a picture that a notebook shows: inline SVG, without further packages."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.errors import DataError

__all__ = ["Curve"]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 260, 48, 24, 30
MAX_POINTS = 600
Points = Sequence[tuple[int, float]]


@dataclass
class Curve:
    """Training and held-out loss over steps, nats per trained token.

    >>> curve = Curve([(1, 5.0), (2, 4.0)], [(0, 5.5), (2, 4.2)])
    >>> curve._repr_html_().startswith("<svg")
    True
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss of its window)."""

    heldout: list[tuple[int, float]] = field(default_factory=list)
    """(step, held-out loss after it)."""

    title: str = ""

    @classmethod
    def of_run(cls, folder: str | Path, *, last_step: int | None = None) -> Curve:
        """Read the curve of a run, which may be training, from its metrics.jsonl up to `last_step`.

        Raises DataError where there is no such file.
        """
        path = Path(folder) / "metrics.jsonl"
        curve = cls(title=Path(folder).name)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError("there is no record of this run", where=str(path), fix="name a run's folder") from error
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that is being written
            for points, key in ((curve.train, "train_mean_nll"), (curve.heldout, "eval_mean_nll")):
                if entry.get(key) is not None and (last_step is None or entry["step"] <= last_step):
                    points.append((entry["step"], entry[key]))
        return curve

    def _repr_html_(self) -> str:
        """Return the SVG for a notebook."""
        points = [point for point in (*self.train, *self.heldout) if math.isfinite(point[1])]
        if not points:
            return f"<p>{html.escape(self.title)}: no step yet</p>"
        first, last = min(step for step, _ in points), max(step for step, _ in points)
        low, high = min(loss for _, loss in points), max(loss for _, loss in points)

        def position(step: int, loss: float) -> str:
            x = LEFT + (WIDTH - LEFT - 8) * (step - first) / max(last - first, 1)
            y = TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / max(high - low, 1e-9)
            return f"{x:.1f},{y:.1f}"

        def line(points: Points, colour: str) -> str:
            path = " ".join(position(*point) for point in _thinned(points) if math.isfinite(point[1]))
            return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>'

        dots = "".join(
            '<circle r="3" fill="#c2410c" cx="{}" cy="{}"/>'.format(*position(*point).split(","))
            for point in _thinned(self.heldout)
            if math.isfinite(point[1])
        )
        style = 'font-family="sans-serif" font-size="11" fill="currentColor"'
        frame = f"{LEFT - 4},{TOP - 4} {LEFT - 4},{HEIGHT - BOTTOM + 4} {WIDTH - 4},{HEIGHT - BOTTOM + 4}"
        name = f"{html.escape(self.title)}: " if self.title else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
            f'aria-label="loss over steps">'
            f'<polyline fill="none" stroke="currentColor" stroke-opacity="0.35" points="{frame}"/>'
            f"{line(self.train, '#2563eb')}{line(self.heldout, '#c2410c')}{dots}<g {style}>"
            f'<text x="4" y="{TOP + 4}">{high:.3f}</text><text x="4" y="{HEIGHT - BOTTOM + 4}">{low:.3f}</text>'
            f'<text x="{LEFT}" y="{HEIGHT - 6}">step {first}</text>'
            f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {last}</text>'
            f'<text x="{WIDTH / 2}" y="14" text-anchor="middle">{name}nats per token, '
            f'<tspan fill="#2563eb">training</tspan>, <tspan fill="#c2410c">held out</tspan></text></g></svg>'
        )


def _thinned(points: Points) -> Points:
    """Return at most `MAX_POINTS` points and the last one.

    >>> len(_thinned([(step, 1.0) for step in range(5000)])) <= MAX_POINTS + 1
    True
    """
    every = -(-len(points) // MAX_POINTS) or 1
    return [*points[:-1:every], points[-1]] if points else points
