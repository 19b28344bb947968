"""Rows and data configs of the rows' tests."""

import json

import pytest

from llmtune.config.schema import DataConfig, SourceConfig
from llmtune.data.rendering.renderer import Renderer


@pytest.fixture(scope="session")
def renderer(tiny_tokenizer):
    return Renderer(tiny_tokenizer)


@pytest.fixture
def write(tmp_path):
    """Write rows (objects, or bytes taken as they are) as jsonl; gives the path."""

    def write(name, rows):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def config(tmp_path):
    """A data config over files, with its own cache."""

    def config(*train, eval=(), **options):  # noqa: A002
        given = {"max_length": 256, "cache_dir": str(tmp_path / "cache"), "num_workers": 1} | options
        return DataConfig(
            train=tuple(source if isinstance(source, SourceConfig) else SourceConfig(str(source)) for source in train),
            eval=tuple(source if isinstance(source, SourceConfig) else SourceConfig(str(source)) for source in eval),
            **given,
        )

    return config
