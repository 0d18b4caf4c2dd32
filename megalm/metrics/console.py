"""The console of rank 0: a live progress bar on a terminal, plain lines where the output is piped."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any, TextIO


def format_step(record: dict[str, Any], last: int) -> str:
    """One logged step as a plain line."""
    left = timedelta(seconds=round((last - record["step"]) * record["step_seconds"]))
    parts = [
        f"step {record['step']:>{len(str(last))}}/{last}",
        f"loss {record['loss']:.4f}",
        f"grad norm {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['step_seconds']:.3f} s/step",
    ]
    if "mfu" in record:
        parts.append(f"mfu {100 * record['mfu']:.1f}%")
    return " | ".join([*parts, f"left {left}"])


class PlainConsole:
    """Lines, each as soon as it is written."""

    def __init__(self, last: int, stream: TextIO):
        self._last, self._stream = last, stream

    def progress(self, step: int, loss: float) -> None:
        """Lines are for logged steps only."""

    def logged(self, record: dict[str, Any]) -> None:
        self.line(format_step(record, self._last))

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class TerminalConsole:
    """A bar with step, loss, tokens/s and time left; lines go above it, and with the logged steps into `log` if there is one."""

    def __init__(self, first: int, last: int, terminal: TextIO, log: TextIO | None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._plain = PlainConsole(last, log) if log is not None else None
        # Rich would ask standard input and output for the width, which in a rank are no terminals. Some terminals say 0.
        self._console = Console(file=terminal, width=os.get_terminal_size(terminal.fileno()).columns or 80)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._bar = Progress(
            *columns, console=self._console, refresh_per_second=4, expand=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._bar.add_task("", total=last, completed=first, loss="-", speed="-")
        self._bar.start()

    def progress(self, step: int, loss: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}")

    def logged(self, record: dict[str, Any]) -> None:
        self._bar.update(self._task, speed=f"{record['tokens_per_second']:,.0f}")
        if self._plain:
            self._plain.logged(record)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
        if self._plain:
            self._plain.line(text)

    def close(self) -> None:
        self._bar.stop()


def open_console(first: int, last: int, stream: TextIO | None = None) -> PlainConsole | TerminalConsole:
    """The console for where `stream` (standard output) leads.

    A launcher that copies a rank's output into its log leaves the terminal behind it, and the log, as attributes of
    `stream` (`terminal`, `log`).
    """
    stream = sys.stdout if stream is None else stream
    terminal = getattr(stream, "terminal", None) or (stream if stream.isatty() else None)
    if terminal is None:
        return PlainConsole(last, stream)
    log = getattr(stream, "log", None)
    try:
        return TerminalConsole(first, last, terminal, log)
    except OSError:  # it was lost while the run was being set up
        return PlainConsole(last, log or stream)
