"""Q4, Q6, Q8: random files of rows, the whole way from bytes to the ledger: a named status for each row, and never a
traceback.
"""

import functools
import json
from collections import Counter
from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disk_faults import Unsynced
from llmtune import durable
from llmtune.cli.failure import message
from llmtune.data.dataset.make_dataset import survey_data
from llmtune.data.dataset.row_result import STATUSES
from llmtune.data.dataset.tokenize import detect_formats
from llmtune.data.example import Row
from llmtune.data.reading.find_files import find_files
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.formats import conversation_of
from llmtune.errors import ConfigError, DataError, TokenizerError
from read_rows import read_rows
from row_fuzz import OPTIONS, files

NOW = datetime(2026, 1, 1)


@functools.cache
def renderer_of(tokenizer, train_on):
    return Renderer(tokenizer, train_on=train_on, now=NOW)


def calm(value, controls):
    """The value with every control string in it, keys included, replaced by a letter."""
    if isinstance(value, str):
        return functools.reduce(lambda text, control: text.replace(control, "x"), controls, value)
    if isinstance(value, dict):
        return {calm(key, controls): calm(item, controls) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [calm(item, controls) for item in value]
    return value


def calm_conversation(conversation, controls):
    messages = (
        replace(each, content=calm(each.content, controls), extra=calm(dict(each.extra), controls), role=each.role)
        for each in conversation.messages
    )
    return replace(
        conversation,
        messages=tuple(messages),
        text=calm(conversation.text, controls),
        tools=tuple(calm(list(conversation.tools), controls)),
    )


def controls_of(tokenizer, ids):
    added = tokenizer.added_tokens_decoder
    return [token_id for token_id in ids if token_id in added]


def assert_content_is_content(path, config, renderer, examples):
    """Q6: the control tokens of a used row are those of the same row whose texts spell none."""
    strings = sorted(
        (token.content for token in renderer.tokenizer.added_tokens_decoder.values()), key=len, reverse=True
    )
    data_files = find_files(config.train, "train")
    name = detect_formats(config, data_files)[0][0]
    tried = 0
    for row in read_rows(config.train):
        if not isinstance(row, Row) or row.source not in examples:
            continue
        conversation = conversation_of(row, name, config.text_column)
        ids = examples[row.source].input_ids.tolist()
        assert ids == renderer.render(conversation).input_ids
        harmless = renderer.render(calm_conversation(conversation, strings)).input_ids
        assert controls_of(renderer.tokenizer, ids) == controls_of(renderer.tokenizer, harmless)
        tried += 1
    return tried


def assert_balanced(prepared, count):
    """Q4: every row has exactly one status, and one that is not simply used has a reason or a note."""
    rows = 0
    for part, summary in prepared.ledger.summary().items():
        if not isinstance(summary, dict) or "input" not in summary:
            continue
        assert summary["input"] == sum(summary[status] for status in STATUSES), part
        rows += summary["input"]
    assert count is None or rows == count
    entries = list(prepared.ledger.entries)
    assert len({entry["source"] for entry in entries}) == len(entries)
    for entry in entries:
        assert entry["fate"] in STATUSES
        assert entry.get("reason") or entry.get("notes") or entry["fate"] == "held_out"
        json.dumps(entry, ensure_ascii=False).encode()
    return rows


def fuzz_once(folder, tally, tokenizer, file, options):
    path = folder / f"{tally['files']}{file.ending}"
    path.write_bytes(file.data)
    tally["files"] += 1
    config = data_config(path, folder, options)
    renderer = renderer_of(tokenizer, config.train_on)
    try:
        prepared = survey_data(config, renderer)
    except (DataError, ConfigError, TokenizerError) as error:
        assert all(problem.problem and problem.where and problem.fix for problem in error.problems)  # noqa: PT017 - either outcome is right
        message(error).encode()
        tally["files refused"] += 1
        tally["rows"] += file.rows or 0
        return
    finally:
        path_size = len(file.data)
        tally["bytes"] += path_size
    tally["rows"] += assert_balanced(prepared, file.rows)
    for problem in prepared.problems:
        assert problem.problem
        assert problem.where
        message(DataError.all([problem])).encode()
    tally.update(
        {f"rows {status}": sum(part.balance()[status] for part in prepared.ledger.parts) for status in STATUSES}
    )
    examples = {example.source: example for example in prepared.train}
    cut = {entry["source"] for entry in prepared.ledger.entries if entry["fate"] == "cut"}
    sources = [example.source for example in prepared.train]
    tally["rows rendered twice"] += assert_content_is_content(
        path,
        config,
        renderer,
        {source: example for source, example in examples.items() if source not in cut and sources.count(source) == 1},
    )
    path.unlink()


def data_config(path, folder, options):
    from llmtune.config.schema import DataConfig, SourceConfig

    return DataConfig(
        train=(SourceConfig(str(path)),), eval=(), cache_dir=str(folder / "cache"), num_workers=1, **options
    )


def fuzz(folder, tokenizer, count, rows):
    """Try `count` files, and as many again while they held fewer rows than wanted; returns how many rows met which
    status.
    """
    tally = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False)
    @given(file=files(), options=st.fixed_dictionaries(OPTIONS))
    def attempt(file, options):
        fuzz_once(folder, tally, tokenizer, file, options)

    with durable.use_backend(Unsynced()):
        for _ in range(10):
            attempt()
            if tally["rows"] >= rows:
                break
    return tally


@pytest.mark.parametrize("which", ["tiny", "qwen25"])
def test_random_files_of_rows_end_in_named_fates(which, tokenizer_for, tiny_tokenizer, tmp_path):
    tally = fuzz(tmp_path, tiny_tokenizer if which == "tiny" else tokenizer_for(which), 60, rows=150)
    assert tally["rows"] >= 150
    assert min(tally[f"rows {status}"] for status in ("used", "bad", "dropped")) > 0
    assert tally["rows rendered twice"] > 0


@pytest.mark.campaign
@pytest.mark.parametrize("which", ["tiny", "qwen25", "llama31", "smollm2"])
def test_twenty_thousand_random_rows_end_in_named_fates(
    which, tokenizer_for, tiny_tokenizer, tmp_path, capsys, request
):
    """5,000 rows and more for each of four tokenizers; the last is a real model's."""
    made = {"tiny": lambda: tiny_tokenizer, "smollm2": lambda: request.getfixturevalue("smollm2")}
    tally = fuzz(tmp_path, made.get(which, lambda: tokenizer_for(which))(), 1500, rows=5000)
    assert tally["rows"] >= 5000
    with capsys.disabled():
        print(f"\n{which}: {dict(tally)}")  # the figures of docs/reliability.md
