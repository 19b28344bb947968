"""`llmtune ui`: the runs of a folder as a page on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import NoCuda
from llmtune.cli.process import yield_to_runs
from llmtune.common.environment import home_expanded, is_offline
from llmtune.common.text import print_line, printable

__all__ = ["ui"]


def ui(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder in which the runs are.")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", help="Port to listen at; a free one when 0.", min=0, max=65535)] = 0,
    no_cuda: NoCuda = False,
) -> None:
    """Serve a page with live charts, comparison, samples, ledger search and chat, to this machine alone.

    Prints the address, which holds a token, on stdout. Ctrl-C ends it.
    """
    from llmtune.watch.ui.server import UiServer

    with UiServer(home_expanded(folder), port=port, offline=is_offline(), no_cuda=no_cuda) as server:
        print_line(f"the runs in {printable(folder)}; Ctrl-C ends it")
        print(server.url, flush=True)
        yield_to_runs()
        server.serve_forever(poll_interval=5)  # requests wake it at once
