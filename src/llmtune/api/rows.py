"""Rows that a program holds in memory, as a file that the run reads like any other.

The file lies beside the runs, is named by the digest of its content, and has one JSON object a line: so the run can be
resumed, its rows have names, and the ledger accounts for each of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from llmtune import durable
from llmtune.common.environment import home_expanded
from llmtune.common.text import PrintLine
from llmtune.config.document import Origin
from llmtune.config.layers import ResolvedConfig
from llmtune.config.schema import SourceConfig
from llmtune.errors import DataError, UsageError

__all__ = ["FormattingFunc", "GivenRows", "Rows"]

Rows: TypeAlias = Iterable[Mapping[str, object]]
"""A list of mappings, a `datasets.Dataset`, or anything else that gives mappings when it is iterated."""

FormattingFunc: TypeAlias = Callable[[Mapping[str, object]], Mapping[str, object] | None]
"""From a row to a row in any format of docs/data.md, or to None to leave it out."""

ROWS_FOLDER = "rows"
"""Folder of the files in `run.output_dir`."""


class GivenRows(NamedTuple):
    """The rows that a program gives to a run; None: those of its config."""

    train: Rows | None = None
    eval: Rows | None = None
    formatting_func: FormattingFunc | None = None

    def check(self) -> None:
        """Raise UsageError for a function without rows, and for what is no rows at all."""
        if self.formatting_func is not None and self.train is None and self.eval is None:
            problem = "`formatting_func` is given the rows of `train_dataset` and `eval_dataset`, and there are none"
            fix = (
                'give rows, for example `train_dataset=datasets.load_dataset("json", data_files="rows.jsonl")["train"]`'
            )
            raise UsageError(problem, where="formatting_func", fix=fix)
        for name, rows in (("train_dataset", self.train), ("eval_dataset", self.eval)):
            if isinstance(rows, Mapping):
                splits = ", ".join(str(key) for key in list(rows)[:6])
                raise UsageError(
                    f"this is a mapping of {splits}, not rows", name, f"give one of them: `{name}=rows[...]`"
                )
            if isinstance(rows, (str, bytes)) or not (rows is None or isinstance(rows, Iterable)):
                fix = "give a list of mappings or a `datasets.Dataset`; files are named in the config, as `data.train`"
                raise UsageError(f"{str(rows)[:60]!r} is no rows", name, fix)

    def into(self, resolved: ResolvedConfig, print_line: PrintLine) -> ResolvedConfig:
        """Write the rows as files, and return the config that reads them.

        Raises DataError for a row that is no mapping, or whose values are not those of JSON; MachineError.
        """
        data, origins = resolved.config.data, dict(resolved.origins)
        folder = home_expanded(resolved.config.run.output_dir) / ROWS_FOLDER
        for purpose, rows in (("train", self.train), ("eval", self.eval)):
            if rows is None:
                continue
            name = f"{purpose}_dataset"
            lines = list(_json_lines(rows, self.formatting_func, name))
            path = _write(folder, purpose, lines)
            data = replace(data, **{purpose: (SourceConfig(path=str(path), name=name),)})  # type: ignore[arg-type]
            origins[f"data.{purpose}"] = Origin("flag", name)
            print_line(f"data.{purpose} = {path}: the {len(lines):,} rows of `{name}`")
        if self.eval is not None and data.test_size:
            data = replace(data, test_size=0.0)
            origins["data.test_size"] = Origin("flag", "eval_dataset")
            print_line("data.test_size = 0: the held-out rows are those of `eval_dataset`")
        return replace(resolved, config=replace(resolved.config, data=data), origins=origins)


def _json_lines(rows: Rows, formatting_func: FormattingFunc | None, name: str) -> Iterator[bytes]:
    for index, given in enumerate(rows):
        where = f"{name}[{index}]"
        row: Mapping[str, object] | None = given
        if formatting_func is not None and isinstance(given, Mapping):
            row = formatting_func(given)
            if row is None:
                continue
        if not isinstance(row, Mapping):
            problem = f"a row must be a mapping of fields, this is a {type(row).__name__}"
            fix = "of a pandas table give `table.to_dict('records')`" if index == 0 else "give each row as a mapping"
            raise DataError(problem, where, fix)
        try:
            text = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            fix = "give texts, numbers, lists and mappings; `formatting_func` can make them"
            raise DataError(f"the row is not JSON: {error}", where, fix) from None
        yield text.encode("utf-8", "surrogatepass") + b"\n"


def _write(folder: Path, purpose: str, lines: list[bytes]) -> Path:
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    path = folder / f"{purpose}-{digest[:16]}.jsonl"
    if not path.is_file():  # the same name is the same content
        durable.make_folder(folder)
        durable.write_stream(path, lines)
    return path
