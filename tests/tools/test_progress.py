"""The line of progress: only where somebody watches, and gone when the work is done."""
from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest

from megalm.tools import _progress
from megalm.tools._progress import Progress, ticking


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setattr(_progress, "EVERY", 0.001)
    return watched_by(monkeypatch, Terminal())


def watched_by(monkeypatch, stream: io.StringIO) -> io.StringIO:
    """The module's own sys.stderr: pytest puts back the real one between a fixture and its test."""
    monkeypatch.setattr(_progress, "sys", SimpleNamespace(stderr=stream))
    return stream


def lines(terminal: Terminal) -> list[str]:
    return terminal.getvalue().split("\r\x1b[K")[1:]


def test_progress(terminal):
    with Progress("merge", 4_000_000) as progress:
        for _ in range(4):
            time.sleep(0.002)
            progress.add(1_000_000)
    shown = lines(terminal)
    assert [line.split()[:2] for line in shown[:-1]] == [["merge", share] for share in ("25.0%", "50.0%", "75.0%", "100.0%")]
    assert shown[0].endswith("s left") and "MB/s" in shown[0] and shown[-1] == ""


def test_unknown_total(terminal):
    with Progress("read", 0) as progress:
        time.sleep(0.002)
        progress.add(5_000_000)
    assert lines(terminal)[0].startswith("read  5 MB")


def test_ticking(terminal):
    with ticking("train"):
        deadline = time.monotonic() + 10
        while len(lines(terminal)) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert lines(terminal)[0] == "train  0 s" and lines(terminal)[-1] == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_nobody_watches(monkeypatch, quiet):
    monkeypatch.setattr(_progress, "EVERY", 0.0)
    stream = watched_by(monkeypatch, Terminal() if quiet else io.StringIO())
    with Progress("x", 10, quiet) as progress, ticking("y", quiet):
        progress.add(10)
        time.sleep(0.005)
    assert stream.getvalue() == ""
