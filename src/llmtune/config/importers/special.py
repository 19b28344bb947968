"""Rules that the table of one toolkit alone needs."""

# ruff: noqa: ARG001 - every rule of the table has the same parameters
from __future__ import annotations

from llmtune.config.document import Listing, shown
from llmtune.config.importers.rules import Context, Outcome, Result, Rule, compute, ignored, made, none, plain_text
from llmtune.config.importers.source import Given
from llmtune.config.importers.tables import Row
from llmtune.config.translation import Change

__all__ = ["SPECIAL_RULES"]


def switches(context: Context, given: Given, row: Row) -> Result:
    """One of several switches that name layers together: the argument lists them as `switch=layers`."""
    table = dict(part.partition("=")[::2] for part in row.text.split("; "))
    on = [name for switch, names in table.items() if context.assumed(switch) == "true" for name in names.split("+")]
    if not on:
        return Result(Outcome.DROPPED, "off")
    return Result(
        Outcome.COMPUTED, "the switches as a list", (Change(row.argument, made(f"[{', '.join(on)}]", given)),)
    )


def declared(context: Context, given: Given, row: Row) -> Result:
    """A feature that the peer has (the text lists them) and llmtune has not; it reads past any other key."""
    if given.name.rpartition(".")[2] not in row.text.split():
        return ignored(context, given, row._replace(text=""))
    return none(context, given, row._replace(text="a method that does not exist here"))


def torchtune_layers(context: Context, given: Given, row: Row) -> Result:
    """The attention layers that torchtune lists, and those its two switches add."""
    items = given.node.items if isinstance(given.node, Listing) else ()
    names = ["o_proj" if shown(item) == "output_proj" else shown(item) for item in items]
    names += ["gate_proj", "up_proj", "down_proj"] if context.text("model.apply_lora_to_mlp") == "true" else []
    names += ["lm_head"] if context.text("model.apply_lora_to_output") == "true" else []
    return Result(
        Outcome.COMPUTED, "with those of its switches", (Change(row.argument, made(f"[{', '.join(names)}]", given)),)
    )


def mlx_schedule(context: Context, given: Given, row: Row) -> Result:
    """`[peak, steps, end]`: the peak counts before `learning_rate`, and the end becomes a fraction of it."""
    try:
        numbers = [float(plain_text(item)) for item in given.node.items] if isinstance(given.node, Listing) else []
    except ValueError:
        numbers = []
    if not numbers or not numbers[0]:
        return Result(Outcome.NONE, "the arguments of the schedule are no list of numbers")
    changes = [Change(row.argument, made(repr(numbers[0]), given))]
    if len(numbers) > 2:
        changes.append(Change("training.min_lr_ratio", made(f"{numbers[2] / numbers[0]:.12g}", given)))
    return Result(Outcome.COMPUTED, "peak, steps and end of the rate; it falls over all steps here", tuple(changes))


def of_pretraining(context: Context, given: Given, row: Row) -> Result:
    """As `compute`, where litgpt pre-trains; its fine-tuning, which names a `checkpoint_dir`, reads past the key."""
    if context.text("checkpoint_dir"):
        return ignored(context, given, row._replace(text="litgpt's fine-tuning ends at a rate of 0 and reads past it"))
    return compute(context, given, row)


SPECIAL_RULES: dict[str, Rule] = {
    "switches": switches,
    "declared": declared,
    "torchtune-layers": torchtune_layers,
    "mlx-schedule": mlx_schedule,
    "of-pretraining": of_pretraining,
}
"""Name in a table -> rule."""
