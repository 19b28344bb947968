"""Train with llmtune in the workers of Ray Train: `python ray_train.py --workers 8 --name my-run KEY=VALUE ...`.

A worker that is lost ends the others with exit code 8; Ray starts all of them again, and the same command goes on with
its run. `run.output_dir` must be on storage that every node sees.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(options: dict[str, list[str]]) -> None:
    """What each worker does. Ray has made the process group already; llmtune joins it."""
    from llmtune.cli.main import run

    code = run(["train", "--resume", "auto", *options["words"]])
    if code != 0:
        raise RuntimeError(f"llmtune ended with exit code {code}: `llmtune explain {code}`")


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="one for each GPU")
    parser.add_argument("--name", required=True, help="of the run")
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU, to try it")
    parser.add_argument("--storage", default=Path("ray").resolve(), help="folder of Ray's own files, for all nodes")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="the config")
    options = parser.parse_args()
    TorchTrainer(
        train,
        train_loop_config={"words": ["--name", options.name, *options.words]},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=RunConfig(storage_path=str(options.storage), failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
