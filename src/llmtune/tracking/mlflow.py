"""MLflow as a tracker: the server that `MLFLOW_TRACKING_URI` names, else a database in `mlflow/` of the run folder."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmtune import durable
from llmtune.common.records import flat_items
from llmtune.common.secrets import redacted
from llmtune.common.text import PrintLine, print_to_stderr
from llmtune.tracking.tracker import Histogram, Metrics, RunInfo, Sample, gradient_flow, grouped_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MlflowTracker"]

PARAMS_AT_ONCE, LONGEST_NAME, LONGEST_PARAM = 100, 250, 500
"""Limits of MLflow's interface for one request and one name, and of its older servers for one value, in characters."""


class MlflowTracker:
    """Sends config, metrics, answers and gradient flow to MLflow; a resumed run goes on under its id there."""

    name = "mlflow"

    def __init__(self, project: str, *, tags: Sequence[str] = (), print_line: PrintLine = print_to_stderr) -> None:
        self._project, self._tags, self._print_line = project, tuple(tags), print_line
        self._client: MlflowClient
        """From `start` on. MLflow's module-level functions would share one run with the user's own code."""
        self._run_id = ""
        self._names: dict[str, str] = {}
        """Name of each metric there. Those of one kind come in one line, so a resumed run names them the same."""

    def start(self, info: RunInfo) -> None:
        """Open the run in the experiment of the project's name. Raises MLflow's errors where its server refuses."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing phones home (Q9); the import reads it
        import mlflow

        folder = info.folder / "mlflow"
        durable.make_folder(folder)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        address, id_file = server or f"sqlite:///{folder / 'mlflow.db'}", folder / "run-id.txt"
        self._client = mlflow.MlflowClient(address)
        if id_file.is_file():
            self._run_id = id_file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            known = self._client.get_experiment_by_name(self._project)
            artifacts = None if server else (folder / "artifacts").as_uri()
            experiment = known.experiment_id if known else self._client.create_experiment(self._project, artifacts)
            tags = {"llmtune.model": info.model, **{_name(tag): "true" for tag in (*info.tags, *self._tags)}}
            tags |= {"mlflow.note.content": info.notes} if info.notes else {}
            self._run_id = self._client.create_run(experiment, run_name=info.name, tags=tags).info.run_id
            durable.write_text(id_file, self._run_id + "\n")
            values = dict(flat_items({**redacted(info.config), "parameters": info.parameters}))
            names: dict[str, str] = {}
            params = [
                mlflow.entities.Param(_name_of(key, names), str(value)[:LONGEST_PARAM]) for key, value in values.items()
            ]
            for first in range(0, len(params), PARAMS_AT_ONCE):
                self._client.log_batch(self._run_id, params=params[first : first + PARAMS_AT_ONCE])
            self._client.log_dict(self._run_id, {"origins": dict(info.origins), "rows": dict(info.ledger)}, "run.json")
        self._print_line(f"mlflow has the run as {self._run_id} at {address}")

    def log(self, step: int, metrics: Metrics) -> None:
        """Send every number of a line."""
        self._send(step, {grouped_name(key): value for key, value in metrics.items() if key != "step"})

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Send the answers as one file of JSON lines."""
        lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        self._client.log_text(self._run_id, lines, f"samples/step-{step:06d}.jsonl")

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Send the gradient flow; MLflow draws no histograms."""
        self._send(step, gradient_flow(histograms))

    def finish(self, state: str) -> None:
        """Record how the run ended."""
        self._client.set_tag(self._run_id, "llmtune.state", state)
        ends = {"finished": "FINISHED", "stopped": "KILLED"}
        self._client.set_terminated(self._run_id, ends.get(state, "FAILED"))

    def _send(self, step: int, values: Mapping[str, object]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = [
            Metric(_name_of(key, self._names), float(value), now, step)
            for key, value in values.items()
            if isinstance(value, int | float)
        ]
        self._client.log_batch(self._run_id, metrics=numbers)


def _name(name: str) -> str:
    """A name as MLflow takes it: it refuses the whole request for a pattern among the keys of a config."""
    return re.sub(r"[^\w./ -]", "_", name)[:LONGEST_NAME]


def _name_of(key: str, names: dict[str, str]) -> str:
    """The name of a key, which `names` keeps, unlike that of any other key in it: MLflow knows nothing but the name.

    >>> names: dict[str, str] = {}
    >>> [_name_of(key, names) for key in ("r.q.*", "r.q.+", "r.v", "r.q.+")]
    ['r.q._', 'r.q._2', 'r.v', 'r.q._2']
    """
    if key not in names:
        name, number = _name(key), 2
        while name in names.values():
            name, number = f"{_name(key)[: LONGEST_NAME - 3]}{number}", number + 1
        names[key] = name
    return names[key]
