"""`llmtune tokenizer train`: learn a byte-level BPE tokenizer from the rows a config names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune import durable
from llmtune.cli.options import Overrides
from llmtune.cli.process import check_working_folder
from llmtune.common.text import print_line
from llmtune.config.layers import load_config
from llmtune.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from llmtune.models.tokenizer_training import TokenizerReport

__all__ = ["train"]


VocabSize = Annotated[
    int | None, typer.Option("--vocab-size", help="Entries; model.architecture.vocab_size or 16,384 when left out.")
]
SpecialTokens = Annotated[
    list[str] | None, typer.Option("--special-token", help="A further special token; may be repeated.")
]
ChatTemplate = Annotated[str | None, typer.Option("--chat-template", help="A shipped name or a Jinja file.")]
MinFrequency = Annotated[int, typer.Option("--min-frequency", help="Times a pair must be seen to become an entry.")]


def train(
    overrides: Overrides = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", help="A preset, or a YAML or JSON file; its data.train is read."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist yet.")] = Path(
        "tokenizer"
    ),
    vocab_size: VocabSize = None,
    special_token: SpecialTokens = None,
    chat_template: ChatTemplate = None,
    min_frequency: MinFrequency = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on the config's data and save it as a tokenizer folder."""
    check_working_folder()  # before torch, which ends the process where there is none
    from llmtune.data.dataset.make_dataset import iter_texts
    from llmtune.data.rows.preferences import RECOGNIZED_BY
    from llmtune.models.chat_templates import find_chat_template
    from llmtune.models.save import write_tokenizer
    from llmtune.models.tokenizer_training import measure_tokenizer, train_tokenizer

    resolved = load_config(config, overrides=overrides or ())
    settings = resolved.config
    if not settings.data.train:
        raise ConfigError("no training data is named", where="data.train", fix="name a file: `data.train=rows.jsonl`")
    if output.exists():
        raise UsageError(
            f"`{output}` exists already",
            where="--output",
            fix="name a folder that does not exist yet, or delete it first",
        )
    for note in resolved.notes:
        print_line(note)
    architecture = settings.model.architecture
    entries = vocab_size or architecture.vocab_size or 16_384
    tokenizer = train_tokenizer(
        _with_progress(iter_texts(settings.data, RECOGNIZED_BY[settings.objective.method])),
        entries,
        chat_template=find_chat_template(chat_template or settings.model.chat_template or "chatml"),
        special_tokens=special_token or (),
        min_frequency=min_frequency,
        max_length=architecture.max_seq_len or 2048,
    )
    report = measure_tokenizer(tokenizer, iter_texts(settings.data, RECOGNIZED_BY[settings.objective.method]))
    durable.prepare_target(output, print_line)
    with durable.commit_folder(output, with_manifest=False, replace=False) as folder:
        write_tokenizer(tokenizer, folder)
    if report.vocab_size < entries and not as_json:
        print_line(
            f"{entries:,} entries were asked for; these texts hold no more pairs that are seen {min_frequency} times"
        )
    _print_report(output, report, as_json)


def _print_report(output: Path, report: TokenizerReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"folder": str(output), **asdict(report)}))
        return
    print(f"{output}: {report.vocab_size:,} entries from {report.texts:,} texts ({report.num_bytes:,} bytes)")
    unused = f"{report.unused_share:.1%} of the entries are unused in these texts"
    print(f"  {report.bytes_per_token:.3f} bytes per token; {unused}")
    failures = report.round_trip_failures
    print(f"  round trip: {report.texts - failures:,} of {report.texts:,} texts come back exactly")


def _with_progress(texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts, and print after every 10,000 how many were read."""
    width = shutil.get_terminal_size().columns
    for count, text in enumerate(texts, 1):
        if count % 10_000 == 0:
            print_line(f"{count:,} texts read"[:width])
        yield text
