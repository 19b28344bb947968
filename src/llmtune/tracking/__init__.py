"""Where a run is shown and recorded: the terminal, metrics.jsonl, TensorBoard, wandb."""

from llmtune.tracking.jsonl import RunRecord
from llmtune.tracking.queue import TRACKERS, LaneReport, TrackerQueue, choose_trackers, keeps_record
from llmtune.tracking.tracker import Histogram, RunInfo, Tracker

__all__ = [
    "TRACKERS",
    "Histogram",
    "LaneReport",
    "RunInfo",
    "RunRecord",
    "Tracker",
    "TrackerQueue",
    "choose_trackers",
    "keeps_record",
]
