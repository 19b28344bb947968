"""Seconds of saving a checkpoint with sync and digests, of verifying and loading it, and the memory that saving takes.

    python benchmarks/save_cost.py [MEGABYTES] [--folder FOLDER]

Prints one JSON object. Compare with the seconds of a step of your own run (`step_seconds` in metrics.jsonl).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from llmtune import durable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from disk_faults import Unsynced
from llmtune.engine.state import Snapshot
from llmtune.runs import checkpoint
from llmtune.runs.folder import create_run


def peak_megabytes() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Save, verify and load once each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=int, nargs="?", default=512, help="of weights and two moments")
    parser.add_argument("--folder", help="where to save; the system's temporary folder when not given")
    options = parser.parse_args()
    count = options.megabytes * 250_000 // 3  # float32 numbers of each of the three
    weights = {"w": torch.randn(count)}
    snapshot = Snapshot({"optimizer": {"m": torch.randn(count), "v": torch.randn(count)}}, {"step": 1})
    figures: dict[str, float] = {"megabytes": options.megabytes}
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        create_run(folder, "cost") as run,
    ):

        def save(step: int) -> float:
            begin = time.perf_counter()
            checkpoint.save_checkpoint(
                run, step, lambda folder: durable.write_tensors(folder / "model.safetensors", weights), snapshot
            )
            return time.perf_counter() - begin

        before = peak_megabytes()
        save(1)
        figures["more_memory_megabytes"] = peak_megabytes() - before
        figures["save_seconds"] = save(2)
        with durable.use_backend(Unsynced()):
            figures["save_without_sync_seconds"] = save(3)
        saved = checkpoint.CheckpointFolder(2, Path(run.checkpoints / "step-000002"))
        begin = time.perf_counter()
        assert checkpoint.verify(saved) == []
        figures["verify_seconds"] = time.perf_counter() - begin
        begin = time.perf_counter()
        assert checkpoint.verify(saved, past_cache=True) == []
        figures["verify_from_disk_seconds"] = time.perf_counter() - begin
        begin = time.perf_counter()
        checkpoint.load(saved)
        figures["load_snapshot_seconds"] = time.perf_counter() - begin
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
