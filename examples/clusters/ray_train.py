"""Train with llmtune in the workers of Ray Train: `python ray_train.py --workers 8 --name my-run KEY=VALUE ...`.

Other words of the command follow `--`: `... --name my-run -- --config /shared/config.yaml`. Every path must be
absolute: workers start in folders of their own. `run.output_dir` must be on storage that every node sees.

A worker that is lost ends the others with exit code 8; Ray starts all of them again, and the same command goes on with
its run.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


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
    parser.add_argument("--timeout-s", type=int, default=120, help="after which a silent worker counts as lost")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="the config")
    options = parser.parse_args()
    # The process group is Ray's. Its operations may wait for a slow worker as long as in a group of llmtune's own.
    words = ["--name", options.name, f"distributed.timeout_s={options.timeout_s}", *options.words]
    TorchTrainer(
        train,
        train_loop_config={"words": words},
        torch_config=TorchConfig(timeout_s=10 * options.timeout_s),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=RunConfig(storage_path=str(options.storage), failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
