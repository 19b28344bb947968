"""The terminal as a tracker: a progress bar and rows where there is a terminal, plain lines where there is none.

A plain line is a Python dict in the form of the Hugging Face Trainer, which people grep for, such as
`{'loss': 2.451, 'learning_rate': 0.0002, 'epoch': 0.01}`. Its `loss` is `train_mean_nll`, in nats per trained token of
the window. Everything goes to stderr; stdout is for data.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

# Not imported lazily: importing rich draws from Python's global random numbers, which are the training's once a run
# has started.
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from llmtune.common.text import printable, readable_bytes
from llmtune.tracking.screen import LABEL_COLUMNS, is_ascii, side_by_side
from llmtune.tracking.tracker import Histogram, Metrics, RunInfo, Sample

__all__ = ["ConsoleTracker", "eval_line", "heldout_losses", "on_one_line", "progress_numbers", "train_line"]

NARROW_COLUMNS = 60
"""Below this width the bar is left out and only the numbers are shown."""

LEAST_BAR_COLUMNS = 12

SECONDS_BETWEEN_DRAWINGS = 0.2

_OF_SET = re.compile(r"eval_(.+)_mean_nll")
"""The held-out loss of one source of several."""

SHOWN_CHARACTERS = 300
"""Characters of a prompt or an answer that are shown; samples.jsonl has all of them."""


class ConsoleTracker:
    """Shows a run on `stream` (stderr when not given)."""

    name = "console"

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._console: Console | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._info: RunInfo | None = None
        self._started_at = 0.0
        self._drawn_at = 0.0
        self._newest: Metrics = {}
        self._heldout: list[float] = []

    def start(self, info: RunInfo) -> None:
        """Open the progress bar where there is a terminal."""
        self._info = info
        self._started_at = time.monotonic()
        console = Console(file=self._stream or sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._console = console
        if not console.is_terminal or console.is_dumb_terminal:
            return
        self._progress = _make_progress(console)
        self._task = self._progress.add_task("", total=max(info.total_steps, 1), completed=info.start_step, numbers="")
        self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Move the bar, or print a line where there is none; an evaluation is always printed."""
        is_evaluation = any(key.startswith("eval_") for key in metrics)
        if self._progress is None:
            self._print(eval_line(metrics) if is_evaluation else train_line(metrics))
        elif is_evaluation:
            self._show_evaluation(step, metrics)
        else:
            self._newest = metrics
            self._draw(step)

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Print each prompt with its answer, one line each, without control characters."""
        shown = [(on_one_line(str(row.get("prompt", ""))), on_one_line(str(row.get("text", "")))) for row in rows]
        if self._progress is not None:
            self._show_samples(shown)
            return
        for prompt, answer in shown:
            self._print(f"[step {step}] {prompt} -> {answer}")

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Show nothing."""

    def finish(self, state: str) -> None:  # noqa: ARG002 - the command prints how the run ended
        """Draw the bar a last time; it stays on the screen."""
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()

    def _print(self, line: str) -> None:
        assert self._console is not None, "start comes first"
        self._console.print(line)

    def _show_evaluation(self, step: int, metrics: Metrics) -> None:
        """Print an evaluation as a row, with the change since the last one."""
        assert self._console is not None
        # A bare name would be read as another number: `loss train` of a file train.jsonl as the training loss.
        losses = heldout_losses(metrics)
        row = {f"loss of source {printable(name)}" if name else "loss": value for name, value in losses.items()}
        row |= {name: metrics[key] for name, key in OTHER_NUMBERS.items() if metrics.get(key) is not None}
        cells = [f"{name} {_short(value)}" for name, value in row.items()]
        loss = row.get("loss")
        if isinstance(loss, (int, float)):
            if self._heldout:
                cells[0] += f" ({loss - self._heldout[-1]:+.4f}{', best' if loss < min(self._heldout) else ''})"
            self._heldout.append(loss)
        if "eval_exact_answers" in metrics:
            cells.append(f"exact {metrics['eval_exact_answers']} of {metrics.get('eval_num_answers', '?')}")
        room = self._console.width - LABEL_COLUMNS - 2
        self._row("held-out", side_by_side([Text(cell) for cell in (f"step {step:<5,}", *cells)], room))
        self._draw(step)

    def _row(self, label: str, lines: Sequence[Text]) -> None:
        """Print lines behind a label."""
        assert self._console is not None
        labels = [f" {label:<{LABEL_COLUMNS}}", *[" " * (LABEL_COLUMNS + 1)] * len(lines)]
        rows = [Text.assemble((label, "cyan"), line) for label, line in zip(labels, lines, strict=False)]
        # At once, because the bar is drawn again after each call.
        self._console.print(Text("\n").join(rows))

    def _show_samples(self, rows: Iterable[tuple[str, str]]) -> None:
        assert self._console is not None
        arrow = "->" if is_ascii(self._console) else "→"
        room = self._console.width - LABEL_COLUMNS - 2
        texts = [text for prompt, answer in rows for text in (Text(prompt, "bold"), Text(f"{arrow} {answer}"))]
        self._row("samples", [line for text in texts for line in text.wrap(self._console, room)])

    def _draw(self, step: int) -> None:
        """Draw the bar after `step` steps with the newest numbers."""
        assert self._progress is not None
        assert self._task is not None
        assert self._info is not None
        # By the steps of this process alone: the first part of a resumed run may have been on another machine.
        steps_made = step - self._info.start_step
        left_s = (time.monotonic() - self._started_at) / max(steps_made, 1) * max(self._info.total_steps - step, 0)
        numbers = progress_numbers(
            self._newest,
            heldout=self._heldout[-1] if self._heldout else None,
            left_s=left_s if steps_made else None,
            columns=self._progress.console.width - 2 * len(f"{self._info.total_steps}") - LEAST_BAR_COLUMNS - 9,
        )
        self._progress.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        # A tiny model makes a hundred steps a second, which no terminal can draw.
        if now - self._drawn_at >= SECONDS_BETWEEN_DRAWINGS or step >= self._info.total_steps:
            self._drawn_at = now
            self._progress.refresh()


OTHER_NUMBERS = {
    "perplexity": "eval_perplexity",
    "bits/byte": "eval_bits_per_byte",
    "margin": "eval_rewards_margin",
    "accuracy": "eval_accuracy",
    "score": "eval_score",
    "reward": "eval_reward",
}
"""Numbers of an evaluation beside its losses, by the name shown."""


def heldout_losses(metrics: Metrics) -> dict[str, object]:
    """Return the held-out losses of an evaluation: that of all rows under "", and that of each source by its name.

    >>> heldout_losses({"eval_mean_nll": 1.5, "eval_chats_mean_nll": 1.0, "eval_perplexity": 4.5})
    {'': 1.5, 'chats': 1.0}
    """
    of_all = metrics.get("eval_mean_nll", metrics.get("eval_loss"))
    of_sets = {found[1]: value for key, value in metrics.items() if (found := _OF_SET.fullmatch(key))}
    return ({} if of_all is None else {"": of_all}) | of_sets


def progress_numbers(metrics: Metrics, *, heldout: float | None, left_s: float | None, columns: int) -> str:
    """Return the numbers beside the bar: those that fit into `columns`, the loss always.

    >>> metrics = {"train_mean_nll": 2.451, "tokens_per_second": 2345.6, "memory_bytes": 614_000_000}
    >>> progress_numbers(metrics, heldout=2.5, left_s=75, columns=80)
    'loss 2.451  held-out 2.5  2.3k tok/s  614.00 MB  ETA 0:01:15'
    >>> progress_numbers(metrics, heldout=2.5, left_s=75, columns=40)
    'loss 2.451  2.3k tok/s  ETA 0:01:15'
    """
    memory = metrics.get("memory_bytes")
    # From the left to the right as shown; the number says which is given up last.
    pieces = [
        (0, f"loss {_short(_loss(metrics))}"),
        (3, f"held-out {_short(heldout)}" if heldout is not None else ""),
        (2, _rate(metrics.get("tokens_per_second"))),
        (4, readable_bytes(int(memory)) if isinstance(memory, (int, float)) and memory else ""),
        (1, f"ETA {_clock(left_s)}" if left_s is not None else ""),
    ]
    shown = [piece for piece in pieces if piece[1]]
    while len(shown) > 1 and len("  ".join(text for _, text in shown)) > columns:
        shown.remove(max(shown))
    return "  ".join(text for _, text in shown)


def train_line(metrics: Metrics) -> str:
    """Return the line of a training step.

    >>> train_line({"step": 3, "train_mean_nll": 2.45123, "learning_rate": 2e-4, "epoch": 0.0123, "grad_norm": 1.0})
    "{'loss': 2.4512, 'learning_rate': 0.0002, 'epoch': 0.01}"
    """
    name = "train_mean_nll" if "train_mean_nll" in metrics or "train_loss" not in metrics else "train_loss"
    line = {"loss": _rounded(metrics, name, 5)} | _comparison(metrics)
    return str(line | {"learning_rate": _rounded(metrics, "learning_rate", 4), "epoch": _epoch(metrics)})


def _comparison(metrics: Metrics, prefix: str = "") -> dict[str, object]:
    """Reward, margin and accuracy of an objective that compares answers, where the line has them."""
    keys = [name for name in ("reward", "rewards_margin", "accuracy") if metrics.get(prefix + name) is not None]
    return {prefix + name: _rounded(metrics, prefix + name, 4) for name in keys}


def _loss(metrics: Metrics) -> object:
    return metrics.get("train_mean_nll", metrics.get("train_loss"))


def eval_line(metrics: Metrics) -> str:
    """Return the line of an evaluation.

    >>> eval_line({"eval_mean_nll": 1.5, "eval_perplexity": 4.481689, "epoch": 1.0})
    "{'eval_loss': 1.5, 'eval_perplexity': 4.4817, 'epoch': 1.0}"
    >>> eval_line({"eval_mean_nll": 1.5, "eval_chats_mean_nll": 1.0, "eval_sums_mean_nll": 2.0})
    "{'eval_loss': 1.5, 'eval_chats_loss': 1.0, 'eval_sums_loss': 2.0}"
    """
    names = {
        "eval_loss": "eval_mean_nll" if "eval_mean_nll" in metrics else "eval_loss",
        "eval_perplexity": "eval_perplexity",
        "eval_bits_per_byte": "eval_bits_per_byte",
    }
    line = {name: _rounded(metrics, key, 5) for name, key in names.items() if metrics.get(key) is not None}
    of_sets = (key for key in metrics if _OF_SET.fullmatch(key))
    line |= {_OF_SET.sub(r"eval_\1_loss", key): _rounded(metrics, key, 5) for key in of_sets}
    line |= _comparison(metrics, "eval_")
    if "eval_exact_answers" in metrics:
        line["eval_exact"] = f"{metrics['eval_exact_answers']} of {metrics.get('eval_num_answers', '?')}"
    return str(line | ({"epoch": _epoch(metrics)} if "epoch" in metrics else {}))


def on_one_line(text: str) -> str:
    r"""Return `text` on one line, cut, and with the characters escaped that control a terminal.

    >>> on_one_line("two\nlines \x1b[31mred")
    'two\\nlines \\x1b[31mred'
    """
    return printable(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _make_progress(console: Console) -> Progress:
    columns: list[ProgressColumn] = [
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[numbers]}", markup=False)
    ]
    if console.width >= NARROW_COLUMNS:
        bar = BarColumn(bar_width=None, style="dim", complete_style="cyan", finished_style="green")
        columns = [bar, TaskProgressColumn(), *columns]
    return Progress(
        *columns,
        console=console,
        # Its refresh thread would draw while the training computes.
        auto_refresh=False,
        expand=console.width >= NARROW_COLUMNS,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=True,
    )


def _rounded(metrics: Metrics, key: str, digits: int) -> object:
    value = metrics.get(key)
    return float(f"{value:.{digits}g}") if isinstance(value, (int, float)) else value


def _epoch(metrics: Metrics) -> object:
    value = metrics.get("epoch")
    return round(float(value), 2) if isinstance(value, (int, float)) else value


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def _rate(tokens_per_second: object) -> str:
    if not isinstance(tokens_per_second, (int, float)):
        return ""
    return f"{tokens_per_second / 1000:.1f}k tok/s" if tokens_per_second >= 1000 else f"{tokens_per_second:.0f} tok/s"


def _clock(seconds: float) -> str:
    """Return h:mm:ss.

    >>> _clock(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
