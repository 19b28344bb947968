"""The parameters that many commands share, described once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = [
    "AllowChanges",
    "Checkpoint",
    "ConfigName",
    "Devices",
    "Dtype",
    "MaxRestarts",
    "NoCuda",
    "NoCudaInTraining",
    "Overrides",
    "Push",
    "Rewards",
    "Score",
    "TemplateArgs",
    "TrustRemoteCode",
    "Verbose",
]

AllowChanges = Annotated[
    bool,
    typer.Option("--allow-changes", help="Go on although something changed that makes it another training from here."),
]
Score = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="NAME|FILE.py:FUNCTION",
        help="Judge answers: exact, contains, f1, number, or a function of (prompt, reference, answer), which is run.",
    ),
]
TemplateArgs = Annotated[
    str | None,
    typer.Option(
        "--template-args",
        metavar="{NAME: VALUE}",
        help="Arguments of the chat template, such as '{enable_thinking: false}'; those of training count below.",
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="FILE.py:FUNCTION[=WEIGHT]",
        help="With grpo: a reward of your own, a function of (prompts, completions, completion_ids, **columns), "
        "which is run; may be given several times.",
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="OWNER/NAME",
        help="Also upload the result to the Hugging Face Hub; a new repository is private.",
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", help="Of a run: final, best, last (the newest checkpoint) or step-N; final when not given."
    ),
]
ConfigName = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        help="A preset (test, development, production, quickstart) or a YAML or JSON file; of several, the last wins.",
    ),
]
Devices = Annotated[
    int | None,
    typer.Option("--devices", help="Train with this many processes, one for each device of this machine."),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts",
        metavar="N",
        help="With --devices: start again at most N times after a process was lost or the machine refused.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that override the config, by dotted key.")
]
NoCuda = Annotated[bool, typer.Option("--no-cuda", help="Use the CPU even where there is a CUDA device.")]
NoCudaInTraining = Annotated[
    bool, typer.Option("--no-cuda", help="Train on the CPU even where there is a CUDA device.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", help="On a terminal, show the reasons of choices in full; elsewhere they always are."),
]


class Dtype(StrEnum):
    """Types a model can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
