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

    def config(*train, eval=(), **more):  # noqa: A002
        given = {"max_length": 256, "cache_dir": str(tmp_path / "cache"), "num_workers": 1} | more
        return DataConfig(
            train=tuple(one if isinstance(one, SourceConfig) else SourceConfig(str(one)) for one in train),
            eval=tuple(one if isinstance(one, SourceConfig) else SourceConfig(str(one)) for one in eval),
            **given,
        )

    return config
