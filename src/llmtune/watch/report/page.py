"""The report: sections in one self-contained HTML file that opens from disk and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from llmtune import durable
from llmtune.errors import CheckpointError
from llmtune.runs.run_file import read_run_file
from llmtune.version import __version__
from llmtune.watch.health import health_of, machine_event
from llmtune.watch.report.charts import charts_html
from llmtune.watch.report.data_html import data_html, examples_html, plan_html
from llmtune.watch.report.facts_html import config_html, differences_html, environment_html, repeat_html
from llmtune.watch.report.markup import Markup, asset, section, text
from llmtune.watch.report.overview import overview_html
from llmtune.watch.report.results_html import health_html, heldout_html, samples_html, win_html
from llmtune.watch.run_data import RunData

__all__ = ["SECTIONS", "document", "read_run", "report_html", "sections_html", "style_sheet", "write_report"]


class Section(NamedTuple):
    """One row of `SECTIONS`."""

    name: str
    title: str
    html: Callable[[Sequence[RunData]], Markup]
    """The content for one run or several; empty where there is nothing to show."""
    note: str = ""


def _charts(runs: Sequence[RunData]) -> Markup:
    charts = charts_html(runs)
    slider = '<label class="smoothing">smoothing <input type="range" min="0" max="0.99" step="0.01"></label>'
    return f'{slider}<div class="charts">{charts}</div>' if charts else ""


SECTIONS: tuple[Section, ...] = (
    Section("health", "Health", health_html),
    Section("curves", "Curves", _charts),
    Section("wins", "Who is better", win_html, "Last value of each held-out metric; the best of a line is marked."),
    Section("differences", "What differs", differences_html),
    Section("held-out", "Held-out metrics", heldout_html),
    Section("samples", "Answers before and after", samples_html),
    Section("data", "Data", data_html),
    Section("examples", "Examples as the model sees them", examples_html),
    Section("plan", "Planned and measured", plan_html),
    Section("config", "Config", config_html),
    Section("repeat", "Make it again", repeat_html),
    Section("environment", "Environment", environment_html),
)
"""The sections of a report below its overview. A new one is one row."""


def read_run(path: Path) -> RunData:
    """Read a run folder. Raises CheckpointError where it is none."""
    read_run_file(path)
    run = RunData(path)
    run.refresh()
    if not (path / "events.jsonl").is_file():  # a run of an earlier version
        run.take_events(health_of(path))
    elif (event := machine_event(run)) is not None:
        run.take_events([event])
    return run


def report_html(runs: Sequence[RunData]) -> str:
    """The report of one run, or of several over each other, as one page."""
    title = " · ".join(run.name for run in runs)
    foot = f"<footer>Written by llmtune {__version__}. This file is complete: it loads nothing.</footer>"
    return document(title, f"<main>{overview_html(runs)}{sections_html(runs)}</main>{foot}", script="report.js")


def sections_html(runs: Sequence[RunData]) -> Markup:
    """All sections with their headings, and links to them."""
    bodies = [(part, part.html(runs)) for part in SECTIONS]
    links = "".join(f'<a href="#{part.name}">{text(part.title)}</a>' for part, body in bodies if body)
    return f"<nav>{links}</nav>" + "".join(section(part.name, part.title, body, part.note) for part, body in bodies)


@cache
def style_sheet() -> str:
    """The style of a page; that of charts alone is `chart.css` on the palette."""
    return asset("palette.css") + asset("chart.css") + asset("report.css")


def document(title: str, body: Markup, *, script: str) -> str:
    """A page with the style and the named script inside; its policy lets nothing else run and nothing load."""
    code, style = asset(script), style_sheet()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        # Should anything of the data get past the escaping, the browser still runs and loads nothing.
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{style}</style></head><body>\n{body}\n<script>{code}</script>"
        "</body></html>\n"
    )


def write_report(runs: Sequence[RunData], path: Path) -> int:
    """Write the report to `path` and return its size in bytes. Raises MachineError; CheckpointError without runs."""
    if not runs:
        raise CheckpointError("there is no run to report on", fix="name the folder of a run")
    content = report_html(runs)
    durable.write_text(path, content)
    return len(content.encode("utf-8", "backslashreplace"))
