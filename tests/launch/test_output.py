"""Streams that a full disk or a lost console doesn't break."""

from __future__ import annotations

import os
import sys

from megalm.launch.output import Lasting, say


def test_a_full_disk_takes_nothing_and_breaks_nothing():
    fd = os.open("/dev/full", os.O_WRONLY)
    stream = Lasting(fd)
    for _ in range(3):
        print("x" * 10_000, file=stream, flush=True)
    stream.flush()
    os.close(fd)


def test_a_stream_that_works_has_every_line_at_once(tmp_path):
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    stream = Lasting(fd)
    print("naïve \udcff", file=stream)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "naïve \\udcff\n"
    os.close(fd)


def test_the_launcher_goes_on_where_nobody_reads(monkeypatch):
    """And its exit code stays: what it couldn't write isn't tried again at the end of the program."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        say("one line\nand another")
        say("a last one")
