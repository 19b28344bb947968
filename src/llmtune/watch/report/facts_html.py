"""Sections about a run's setting: config with origins, what differs between runs, machine, the way to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.watch.differences import as_in_config
from llmtune.watch.report.markup import Markup, table, text
from llmtune.watch.run_data import RunData

__all__ = ["config_html", "differences_html", "environment_html", "repeat_html"]


def config_html(runs: Sequence[RunData]) -> Markup:
    """The values that somebody or something set, with origin and reason; all others folded away."""
    return "".join((f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else "") + _config(run) for run in runs if run.config)


def _config(run: RunData) -> Markup:
    reasons = _reasons(run)
    rows: list[list[Markup]] = []
    defaults: list[list[Markup]] = []
    for key, value in run.flat_config.items():
        origin = run.origins.get(key, "")
        row = [f"<code>{text(key)}</code>", f"<code>{text(_shown(value), most=600)}</code>", text(origin)]
        row.append(text(reasons.get(key, "")))
        (defaults if origin == "default" and key not in reasons else rows).append(row)
    chosen = [
        [f"<code>{text(key)}</code>", text(value), text(reason)]
        for key, (value, reason) in _decisions(run).items()
        if key not in run.flat_config
    ]
    head = ["key", "value", "from", "why"]
    rest = table(head[:3], (row[:3] for row in defaults), kind="config")
    folded = f"<details><summary>{len(defaults)} defaults</summary>{rest}</details>"
    more = f"<h4>Chosen besides</h4>{table(['what', 'choice', 'why'], chosen)}" if chosen else ""
    return table(head, rows, kind="config") + more + (folded if defaults else "")


def _decisions(run: RunData) -> dict[str, tuple[str, str]]:
    found = run.info.get("decisions")
    return {
        str(entry.get("key")): (str(entry.get("value")), str(entry.get("reason")))
        for entry in (found if isinstance(found, list) else ())
        if isinstance(entry, dict)
    }


def _reasons(run: RunData) -> dict[str, str]:
    return {key: reason for key, (_, reason) in _decisions(run).items()}


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differences_html(runs: Sequence[RunData]) -> Markup:
    """For several runs: every key of their configs, versions and data in which they differ."""
    if len(runs) < 2:
        return ""
    of_run = [_comparable(run) for run in runs]
    missing = object()
    keys = [
        key
        for key in dict.fromkeys(key for values in of_run for key in values)
        if any(values.get(key, missing) != of_run[0].get(key, missing) for values in of_run[1:])
    ]
    rows = [
        [
            f"<code>{text(key)}</code>",
            *(
                f"<code>{text(as_in_config(key, values[key]), most=300)}</code>" if key in values else "–"
                for values in of_run
            ),
        ]
        for key in keys
    ]
    return table(["key", *(run.name for run in runs)], rows) or '<p class="note">Their configs are equal.</p>'


def _comparable(run: RunData) -> dict[str, Any]:
    identity = run.info.get("identity")
    facts: Mapping[str, Any] = identity if isinstance(identity, dict) else {}
    values = {key: value for key, value in run.flat_config.items() if key not in ("run.name", "run.output_dir")}
    for part in ("versions", "digests"):
        found = facts.get(part)
        values |= {f"{part}.{key}": value for key, value in (found.items() if isinstance(found, dict) else ())}
    return values | {key: facts[key] for key in ("device", "processor", "threads", "world_size") if key in facts}


def environment_html(runs: Sequence[RunData]) -> Markup:
    """Machine, versions and digests of the first run."""
    info = runs[0].info
    identity = info.get("identity")
    facts: Mapping[str, Any] = identity if isinstance(identity, dict) else {}
    rows = {key: info.get(key) for key in ("platform", "processor", "git_revision", "run_id", "seed")}
    rows |= {key: facts.get(key) for key in ("device", "world_size", "threads", "engine", "global_batch_size")}
    for part in ("versions", "digests"):
        found = facts.get(part)
        rows |= {f"{part[:-1]} of {key}": value for key, value in (found.items() if isinstance(found, dict) else ())}
    return table(
        ["", ""],
        (
            [text(key.replace("_", " ")), f"<code>{text(value)}</code>"]
            for key, value in rows.items()
            if value is not None
        ),
    )


def repeat_html(runs: Sequence[RunData]) -> Markup:
    """The command that makes each run again, the command that made it, and the whole config."""
    return "".join(_repeat(run, several=len(runs) > 1) for run in runs)


def _repeat(run: RunData, *, several: bool) -> Markup:
    again = f"llmtune train --config {shlex.quote(str(run.path / 'config.yaml'))}"
    command = run.info.get("command")
    first = f"<p>It was started with</p><pre class=copy>{text(_command(command))}</pre>" if command else ""
    try:
        config = (run.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = ""
    whole = (
        f"<details><summary>config.yaml</summary><pre class=copy>{text(config, most=40_000)}</pre></details>"
        if config
        else ""
    )
    name = f"<h3>{text(run.name)}</h3>" if several else ""
    return f"{name}<p>This makes the run again</p><pre class=copy>{text(again)}</pre>{first}{whole}"


def _command(command: object) -> str:
    """A command line as it would be typed.

    >>> _command(["/usr/bin/llmtune", "train", "a b"])
    "llmtune train 'a b'"
    """
    if not isinstance(command, list) or not command:
        return str(command)
    words = [str(word) for word in command]
    program = words[0].replace("\\", "/").rpartition("/")[2]
    words[0] = "llmtune" if program in ("__main__.py", "llmtune") else words[0]
    return shlex.join(words)
