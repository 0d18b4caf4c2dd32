"""The progress bar on a pseudo-terminal, and plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty

import pytest

from megalm.metrics.console import PlainConsole, open_console

RECORD = {"step": 5, "loss": 1.25, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 12345.6, "step_seconds": 2.0, "mfu": 0.41}


@pytest.fixture
def terminal(monkeypatch):
    """(stream of a terminal, function that reads what it shows)."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    os.set_blocking(master, False)

    def shown() -> str:
        text = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(master, 65536):
                text += chunk
        return text.decode()

    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        yield stream, shown
    os.close(master)


def test_a_pipe_gets_plain_lines():
    stream = io.StringIO()
    console = open_console(0, 10, stream)
    assert isinstance(console, PlainConsole)
    console.progress(5, 1.25)
    console.logged(RECORD)
    console.line("a note")
    console.close()
    assert stream.getvalue().splitlines() == [
        "step  5/10 | loss 1.2500 | grad norm 0.500 | lr 1.00e-03 | 12,346 tokens/s | 2.000 s/step | mfu 41.0% | left 0:00:10",
        "a note",
    ]


def test_a_terminal_gets_a_bar(terminal):
    stream, shown = terminal
    console = open_console(0, 10, stream)
    console.progress(5, 1.25)
    console.logged(RECORD)
    console.line("a note [not markup]")
    console.close()
    text = shown()
    for part in ("5/10", "loss 1.2500", "12,346 tokens/s", "left", "a note [not markup]"):
        assert part in text
    assert "grad norm" not in text


def test_behind_a_log_the_bar_is_on_the_terminal_and_the_lines_in_the_log(terminal):
    """As megalm.launch.output sets it up for rank 0."""
    terminal_stream, shown = terminal

    stream, log = io.StringIO(), io.StringIO()
    stream.terminal, stream.log = terminal_stream, log
    console = open_console(0, 10, stream)
    console.progress(5, 1.25)
    console.logged(RECORD)
    console.line("a note")
    console.close()
    assert stream.getvalue() == ""
    assert [line.partition(" |")[0] for line in log.getvalue().splitlines()] == ["step  5/10", "a note"]
    text = shown()
    assert "5/10" in text and "a note" in text and "grad norm" not in text


def test_a_terminal_lost_before_the_bar_leaves_the_lines_in_the_log():
    master, slave = pty.openpty()
    stream, log = io.StringIO(), io.StringIO()
    with os.fdopen(slave, "w") as terminal:
        stream.terminal, stream.log = terminal, log
        os.close(master)
        open_console(0, 10, stream).line("a note")
    assert log.getvalue() == "a note\n" and stream.getvalue() == ""
