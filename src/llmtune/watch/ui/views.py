"""What the page shows: the list of runs, the sections of chosen ones, rows of a ledger, as plain values and HTML."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llmtune.errors import UsageError
from llmtune.runs.run_file import RUN_FILE
from llmtune.watch.pace import rest_after
from llmtune.watch.report.markup import asset
from llmtune.watch.report.overview import overview_html, results
from llmtune.watch.report.page import sections_html, style_sheet
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["RunViews", "page", "page_policy"]

MOST_COMPARED = 8
LEDGER_ROWS = 200


class RunViews:
    """The runs of a folder, each read on where the last look ended. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._runs: dict[str, RunData] = {}
        self._versions: dict[str, int] = {}
        self._last_names: list[str] = []
        self._next_s = 0.0
        """When the same runs may be drawn again, by the monotonic clock."""

    def summaries(self) -> list[dict[str, Any]]:
        """One object for each run, the newest first."""
        self._find()
        rows = [self._summary(name) for name in self._runs]
        return sorted(rows, key=lambda row: (row["created"], row["name"]), reverse=True)

    def view(self, names: Sequence[str], *, since: str) -> dict[str, Any]:
        """The overview and sections of some runs as HTML with a stamp; only the stamp where it is still `since`.

        Runs at work are drawn again only as often as `pace` allows. Raises UsageError for a name that is no run of the
        folder.
        """
        runs = [self._fresh(name) for name in names[:MOST_COMPARED]]
        # The state is part of it: a run that is killed changes no file.
        stamp = "|".join(f"{run.name}:{self._versions[run.name]}:{run.state}" for run in runs)
        if stamp == since or not runs:
            return {"stamp": stamp}
        names = [run.name for run in runs]
        is_follow_up = bool(since) and names == self._last_names and any(run.state == "running" for run in runs)
        if is_follow_up and time.monotonic() < self._next_s:
            return {"stamp": since}
        # By the clock: beside a run that takes all processors a drawing takes longer, and is to be rarer.
        began_s = time.monotonic()
        html = overview_html(runs) + sections_html(runs)
        ended_s = time.monotonic()
        self._last_names, self._next_s = names, ended_s + rest_after(ended_s - began_s)
        return {"stamp": stamp, "html": html}

    def ledger(self, name: str, words: str) -> dict[str, Any]:
        """The rows of a run's ledger in which `words` stand, any case. Raises UsageError."""
        run, wanted = self._fresh(name), words.casefold()
        found = [entry for entry in run.ledger if wanted in " ".join(map(str, entry.values())).casefold()]
        return {"count": len(found), "of": len(run.ledger), "rows": found[:LEDGER_ROWS]}

    def folder_of(self, name: str) -> Path:
        """The folder of a run. Raises UsageError for a name that is none of the folder."""
        # Looked up, never joined to a path: `..` and `/etc` are simply no names of runs.
        if name not in self._runs:
            self._find()
        if name not in self._runs:
            raise UsageError(f"there is no run `{name}`", str(self.folder))
        return self._runs[name].path

    def _find(self) -> None:
        try:
            found = [path for path in self.folder.iterdir() if (path / RUN_FILE).is_file()]
        except OSError:
            found = []
        self._runs = {path.name: self._runs.get(path.name) or RunData(path) for path in found}

    def _fresh(self, name: str) -> RunData:
        self.folder_of(name)
        run = self._runs[name]
        if run.refresh():
            self._versions[name] = self._versions.get(name, 0) + 1
        self._versions.setdefault(name, 0)
        return run

    def _summary(self, name: str) -> dict[str, Any]:
        run = self._fresh(name)
        loss, heldout = run.metrics.get(run.loss_metric, Series()).last, results(run)[:1]
        return {
            "name": name,
            "state": run.state,
            "created": str(run.info.get("created", "")),
            "step": run.step,
            "total_steps": run.total_steps,
            "eta_seconds": run.eta_seconds() if run.state == "running" else None,
            "loss": None if loss is None else loss[1],
            "heldout": heldout[0].last[1] if heldout else None,
            "warnings": len(run.events) + len(run.skipped),
            "can_chat": run.state == "finished" and (run.path / "checkpoints" / "final").is_dir(),
            "ledger_rows": len(run.ledger),
        }


@cache
def _script() -> str:
    return asset("report.js") + (Path(__file__).parent / "ui.js").read_text(encoding="utf-8")


@cache
def page_policy() -> str:
    """The policy of the page: its own script alone, and requests to this server alone."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@cache
def page() -> str:
    """The page without any data; its script asks for that."""
    style = style_sheet() + (Path(__file__).parent / "ui.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>llmtune</title><style>{style}</style></head><body><div class=app>"
        '<aside><h1>llmtune</h1><div id="runs"></div></aside>'
        '<main id="view"><p class="note">Choose a run; tick several to compare them.</p></main></div>'
        f"<script>{_script()}</script></body></html>\n"
    )
