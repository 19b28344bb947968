"""The keys `data.*`, and those of one entry of `data.train` or `data.eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DataConfig", "SourceConfig", "TrainOn"]

TrainOn = Literal[
    "last_assistant_message",
    "last_assistant_turn",
    "all_assistant_messages",
    "all_messages",
    "all_tokens",
    "all_user_and_system_messages",
    "customized",
]
RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"]


@dataclass(frozen=True)
class SourceConfig:
    """One place rows come from; in YAML a plain string is the `path` of a source with nothing else said."""

    path: str = ""
    """A file (jsonl, json, csv, tsv, parquet, txt; also .gz, .zst), a folder, a glob, `example:NAME`, or a `datasets` name."""

    config: str | None = None
    """Configuration of a `datasets` name, for example `wikitext-103-raw-v1`."""

    split: str | None = None
    """Split of a `datasets` name or of a folder with train/valid/test files."""

    weight: float = 1.0
    """Weight of every trained token of this source in the loss."""

    max_samples: int | None = None
    """Use at most this many rows of this source."""


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from, how they become examples, and what happens to those that cannot."""

    train: tuple[SourceConfig, ...] = ()
    """Training rows: a list of files, folders, globs, `example:NAME` or `datasets` names, or mappings with `path` and more."""

    eval: tuple[SourceConfig, ...] = ()
    """Held-out rows, never trained on."""

    format: RowFormat = "auto"
    """What a row looks like; `auto` detects it from the first rows and says what it found."""

    text_column: str | None = None
    """Field of a text row; `text` when not given."""

    min_length: int | None = None
    """Drop (and count) text rows shorter than this many tokens."""

    test_size: float = 0.0
    """Held-out rows taken from the training rows: a number of rows (1 or more) or a fraction (below 1)."""

    shuffle_seed: int | None = 42
    """Seed of the order in which rows are held out and shuffled each epoch; null keeps the files' order."""

    train_on: TrainOn = "all_assistant_messages"
    """Which messages of a conversation carry loss."""

    max_length: int = 2048
    """Longest example, and length of a pack, in tokens."""

    overlong: Literal["error", "drop", "truncate_right", "truncate_left", "split"] = "error"
    """What happens to an example longer than `max_length`; each one is written to the ledger."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at rows that cannot be used (all are named), or skip and count them."""

    on_duplicate: Literal["keep", "drop"] = "keep"
    """Keep or drop rows whose tokens and weights repeat an earlier row; both are counted."""

    on_overlap: Literal["error", "keep", "drop"] = "drop"
    """What happens to a training row that also stands in the held-out rows; each one is written to the ledger."""

    packing: Literal["none", "greedy", "first_fit", "best_fit"] = "none"
    """Lay several examples in one sequence of `max_length` tokens; they cannot see each other."""

    max_samples: int | None = None
    """Use at most this many training rows."""

    parse_control_tokens: bool = False
    """Let text in the data match control tokens such as `<|im_end|>`. Off: content is only content."""

    num_workers: int | None = None
    """Processes that tokenize; all cores when not given. The result does not depend on it."""

    cache_dir: str | None = None
    """Folder of the tokenized-data cache; the user's cache folder when not given."""
