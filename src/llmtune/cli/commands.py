"""The table of commands.

To add a command, write a function with Typer parameters in a module of `llmtune.cli` (heavy imports inside the
function) and add its row to `COMMANDS`. The help line is in the row, so that `llmtune --help` imports no command.
A command returns None, or its exit code.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["COMMANDS", "GROUPS", "PANELS", "Command"]


class Command(NamedTuple):
    """One command: its words, its function, and its line in the help."""

    words: str
    """`train`, or `config show` for a command of a group."""

    target: str
    """`module:function` under `llmtune.cli`."""

    help: str
    panel: str
    """Heading under which the help lists it; one of `PANELS`."""

    examples: tuple[str, ...]
    """Command lines that its help ends with."""


PANELS = ("Train", "Before a run", "Watch", "Use the result", "Check")

GROUPS: dict[str, str] = {
    "config": "Show, compare, check and describe configs.",
    "data": "Look at rows, tokens and weights before training.",
    "tokenizer": "Train a tokenizer.",
    "verify": "Prove a claim of llmtune on this machine.",
}

COMMANDS: tuple[Command, ...] = (
    Command(
        "train",
        "train:train",
        "Train a model from a preset or a config file.",
        "Train",
        (
            "llmtune train --config test",
            "llmtune train --config production data.train=rows.jsonl",
            "llmtune train -c my.yaml training.learning_rate=1e-4 --dry-run",
        ),
    ),
    Command(
        "init",
        "init:init",
        "Write a commented config for your rows and this device.",
        "Train",
        ("llmtune init", "llmtune init my-rows.jsonl --output mine.yaml"),
    ),
    Command(
        "resume",
        "resume:resume",
        "Go on with a run, bit for bit, from its newest valid checkpoint.",
        "Train",
        (
            "llmtune resume",
            "llmtune resume runs/NAME",
            "llmtune resume runs/NAME/checkpoints/step-000100",
        ),
    ),
    Command(
        "sweep",
        "sweep:sweep",
        "Train a run for each of several values of config keys, and compare them.",
        "Train",
        ("llmtune sweep sweep.yaml", "llmtune sweep sweep.yaml --devices 2", "llmtune sweep sweep.yaml --status"),
    ),
    Command(
        "list-models",
        "models:list_models",
        "List the models that have a name, and which are on this machine.",
        "Before a run",
        ("llmtune list-models",),
    ),
    Command(
        "config show",
        "config:show",
        "Print the resolved config; --origin says where each value comes from.",
        "Before a run",
        (
            "llmtune config show -c production --origin",
            "llmtune config show -c my.yaml --commented > all.yaml",
        ),
    ),
    Command(
        "config diff",
        "config:diff",
        "Print the keys in which two configs or runs differ.",
        "Before a run",
        (
            "llmtune config diff test production",
            "llmtune config diff runs/A runs/B",
        ),
    ),
    Command(
        "config schema",
        "config:schema",
        "Print a JSON Schema that editors can use.",
        "Before a run",
        ("llmtune config schema > schema.json",),
    ),
    Command(
        "config validate",
        "config:validate",
        "Check config files; every problem at once.",
        "Before a run",
        ("llmtune config validate my.yaml",),
    ),
    Command(
        "config import",
        "import_config:import_config",
        "Turn another toolkit's config into one of ours; every key is accounted for.",
        "Before a run",
        ("llmtune config import lora.yml --output lora-here.yaml",),
    ),
    Command(
        "data prepare",
        "data:prepare",
        "Tokenize the rows into the cache, in parts where several jobs share the work.",
        "Before a run",
        ("llmtune data prepare -c my.yaml --part 1/4",),
    ),
    Command(
        "data preview",
        "data:preview",
        "Show rows as the model will see them, trained tokens coloured.",
        "Before a run",
        (
            "llmtune data preview -c my.yaml -n 3",
            "llmtune data preview data.train=rows.jsonl --html rows.html",
        ),
    ),
    Command(
        "data report",
        "data:report",
        "Show what becomes of every row.",
        "Before a run",
        ("llmtune data report -c my.yaml",),
    ),
    Command(
        "tokenizer train",
        "tokenizer:train",
        "Train a byte-level BPE tokenizer on the config's data.",
        "Before a run",
        ("llmtune tokenizer train -c my.yaml -o my-tokenizer",),
    ),
    Command(
        "plan",
        "plan:plan",
        "Steps, memory by part, time and disk of a run; whether it fits, and what to change.",
        "Before a run",
        (
            "llmtune plan -c production",
            "llmtune plan -c production --device 24GB",
            "llmtune plan -c production --device h100 --devices 8",
            "llmtune plan -c my.yaml --measure",
        ),
    ),
    Command(
        "verify resume",
        "verify:resume",
        "Kill a run, resume it, compare it byte for byte with one nobody stopped.",
        "Check",
        (
            "llmtune verify resume",
            "llmtune verify resume -c my.yaml --steps 6",
        ),
    ),
    Command(
        "verify crash",
        "verify:crash",
        "Kill runs at random moments, resume them, compare.",
        "Check",
        ("llmtune verify crash --kills 20",),
    ),
    Command(
        "verify batching",
        "verify:batching",
        "Loss and gradients do not depend on how a step is cut.",
        "Check",
        ("llmtune verify batching -c my.yaml",),
    ),
    Command(
        "verify packing",
        "verify:packing",
        "Packed rows train as rows alone and see no neighbour.",
        "Check",
        ("llmtune verify packing -c my.yaml",),
    ),
    Command(
        "verify preference",
        "verify:preference",
        "Start, cut, swap and reference of a loss that compares answers.",
        "Check",
        ("llmtune verify preference -c my.yaml objective.method=dpo",),
    ),
    Command(
        "verify merge",
        "verify:merge",
        "A merge gives the logits of base plus adapter.",
        "Check",
        ("llmtune verify merge runs/NAME",),
    ),
    Command(
        "verify checkpoint",
        "verify:checkpoint",
        "Every byte of a run's checkpoints is what was saved.",
        "Check",
        ("llmtune verify checkpoint runs/NAME",),
    ),
    Command(
        "dashboard",
        "dashboard:dashboard",
        "Show runs as charts in the terminal, also while they train.",
        "Watch",
        (
            "llmtune dashboard",
            "llmtune dashboard runs/A runs/B",
            "llmtune dashboard --once",
            "llmtune dashboard --log train.log",
        ),
    ),
    Command(
        "gpu-monitor",
        "gpu_monitor:gpu_monitor",
        "Show what GPUs, processors and memory do now.",
        "Watch",
        (
            "llmtune gpu-monitor",
            "llmtune gpu-monitor --once --json",
        ),
    ),
    Command(
        "runs",
        "runs:runs",
        "List the runs of a folder: state, step, loss.",
        "Watch",
        (
            "llmtune runs",
            "llmtune runs --json",
        ),
    ),
    Command(
        "sync",
        "sync:sync",
        "Send a run that is over to wandb, or write it for TensorBoard.",
        "Watch",
        ("llmtune sync runs/NAME",),
    ),
    Command(
        "ui",
        "ui:ui",
        "Open the runs of a folder as a live page: compare, search, chat.",
        "Watch",
        ("llmtune ui", "llmtune ui runs"),
    ),
    Command(
        "health",
        "health:health",
        "Say what looked wrong in a run, and what to try.",
        "Watch",
        ("llmtune health runs/NAME",),
    ),
    Command(
        "report",
        "report:report",
        "Write a run, or several over each other, as one HTML file.",
        "Watch",
        (
            "llmtune report runs/NAME",
            "llmtune report runs/A runs/B -o comparison.html",
        ),
    ),
    Command(
        "doctor",
        "doctor:doctor",
        "Versions, devices, what works here and what does not, with the fix.",
        "Check",
        ("llmtune doctor",),
    ),
    Command(
        "completion",
        "completion:completion",
        "Print a script with which a shell completes commands and options.",
        "Check",
        ('eval "$(llmtune completion bash)"', "llmtune completion fish > ~/.config/fish/completions/llmtune.fish"),
    ),
    Command(
        "explain",
        "explain:explain",
        "Say what an exit code or a kind of error means, and the way out.",
        "Check",
        ("llmtune explain 5",),
    ),
    Command(
        "docs",
        "docs:docs",
        "Print a page of the documentation; without a topic, list the pages.",
        "Check",
        ("llmtune docs", "llmtune docs data"),
    ),
    Command(
        "merge-lora",
        "merge:merge_lora",
        "Fold an adapter into its base, and check the result.",
        "Use the result",
        ("llmtune merge-lora runs/NAME -o merged",),
    ),
    Command(
        "export",
        "export:export",
        "Write a model for transformers and vLLM, or as GGUF for llama.cpp, and check it.",
        "Use the result",
        (
            "llmtune export runs/NAME -o model",
            "llmtune export runs/NAME -o model.gguf",
            "llmtune export runs/NAME -o model.gguf --type q8_0",
        ),
    ),
    Command(
        "evaluate",
        "evaluate:evaluate",
        "Measure loss, perplexity and bits per byte on held-out rows.",
        "Use the result",
        (
            "llmtune evaluate runs/NAME",
            "llmtune evaluate runs/NAME --data rows.jsonl --exact-match --token-accuracy",
        ),
    ),
    Command(
        "predict",
        "predict:predict",
        "Answer the prompts of a data file; answers beside references as JSON lines.",
        "Use the result",
        ("llmtune predict runs/NAME --data rows.jsonl > answers.jsonl",),
    ),
    Command(
        "generate",
        "generate:generate",
        "Answer prompts, rendered exactly as in training.",
        "Use the result",
        (
            "llmtune generate runs/NAME 'Why does bread rise?'",
            "llmtune generate runs/NAME --prompt-file prompts.txt --json",
        ),
    ),
    Command(
        "chat",
        "generate:chat",
        "Talk with a model.",
        "Use the result",
        (
            "llmtune chat runs/NAME",
            "llmtune chat smollm2-135m-instruct --temperature 0.7",
        ),
    ),
    Command(
        "compare",
        "compare:compare",
        "Show base and tuned model side by side on the same prompts.",
        "Use the result",
        (
            "llmtune compare runs/NAME",
            "llmtune compare runs/A runs/B 'Why does bread rise?'",
            "llmtune compare runs/NAME --held-out",
        ),
    ),
)
