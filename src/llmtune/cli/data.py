"""`llmtune data report`: what became of every row, before anything is trained."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmtune.cli.failure import print_line
from llmtune.cli.options import ConfigName, Overrides
from llmtune.config.layers import load_config

__all__ = ["report"]


def report(
    overrides: Overrides = None,
    config: ConfigName = None,
    row: Annotated[
        str | None, typer.Option("--row", metavar="FILE:LINE", help="Show the fate of this one row.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Show what became of every row: the balance, lengths, padding, packing, each source.

    Exit code 3 if training would refuse them.
    """
    resolved = load_config(config, overrides=overrides or ())

    from llmtune.cli.process import check_working_folder
    from llmtune.common.offline import is_offline

    check_working_folder()
    from llmtune.config.process_options import Options
    from llmtune.data.dataset.make_dataset import raise_problems, survey_data
    from llmtune.data.dataset.report import data_report, report_lines, row_line, row_report
    from llmtune.prepare import find_model, open_renderer, open_tokenizer
    from llmtune.training.progress import tokenizing_progress

    options = Options(offline=is_offline(), trust_remote_code=trust_remote_code)
    loaded = open_tokenizer(resolved.config, find_model(resolved.config, options), options)
    prepared = survey_data(
        resolved.config.data, open_renderer(resolved.config, loaded), progress=tokenizing_progress(print_line)
    )
    if row is not None:
        entries = row_report(prepared, row)
        for entry in entries:
            print(json.dumps(entry, ensure_ascii=False) if as_json else row_line(entry))
            if not as_json:
                for number, example in enumerate(entry["examples"], 1):
                    print(
                        f"  example {number}: {example['tokens']:,} tokens, {example['loss_tokens']:,g} trained (by weight)"
                    )
                if "fix" in entry:
                    print(f"  fix: {entry['fix']}")
        return
    for decision in prepared.decisions:
        print_line(str(decision))
    batch_size = resolved.config.training.batch_size
    known = data_report(prepared, resolved.config.data, batch_size=batch_size if isinstance(batch_size, int) else 8)
    print(json.dumps(known, ensure_ascii=False) if as_json else "\n".join(report_lines(known)))
    raise_problems(prepared)
