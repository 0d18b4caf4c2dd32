"""One line that tells how far a long operation is, where stderr is a terminal."""
from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

EVERY = 0.5  # seconds


def shown(quiet: bool) -> bool:
    """Whether anybody watches."""
    return not quiet and sys.stderr.isatty()


class Progress:
    """`merge  41.0%  812.3 MB/s  12 s left`, rewritten in place. Used as a context, which wipes the line when it is left."""

    def __init__(self, label: str, total: int, quiet: bool = False, before: int = 0):
        """Of `total` bytes (0: unknown) an earlier run has done those `before`."""
        self.label, self.total, self.live = label, total, shown(quiet)
        self.done, self.before, self.started = before, before, time.monotonic()
        self._next = self.started + EVERY

    def add(self, size: int) -> None:
        """So many bytes more are done."""
        self.done += size
        now = time.monotonic()
        if self.live and now >= self._next:
            self._next = now + EVERY
            _rewrite(self.line())

    def line(self) -> str:
        rate = f"{self.speed / 1e6:.1f} MB/s"
        if not self.total:
            return f"{self.label}  {self.done / 1e6:,.0f} MB  {rate}"
        left = max(0, self.total - self.done) / max(1.0, self.speed)
        return f"{self.label}  {min(1.0, self.done / self.total):.1%}  {rate}  {left:.0f} s left"

    @property
    def speed(self) -> float:
        """Bytes a second, of this run."""
        return (self.done - self.before) / self.seconds

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.started)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            _rewrite("")


@contextlib.contextmanager
def ticking(label: str, quiet: bool = False) -> Iterator[None]:
    """The seconds of a call that can't say how far it is."""
    if not shown(quiet):
        yield
        return
    over, started = threading.Event(), time.monotonic()

    def tick() -> None:
        while not over.wait(EVERY):
            _rewrite(f"{label}  {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _rewrite("")


def _rewrite(line: str) -> None:
    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
