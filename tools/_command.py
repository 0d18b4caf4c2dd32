"""What the programs of this folder share: errors of the user are one line on stderr and exit code 2."""
from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler's Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line: `error: ...`."""

    def error(self, message: str):
        fail(f"{message} (--help lists the options)")
        raise SystemExit(2)


def fail(message: str) -> int:
    """Print the error in one line; returns the exit code, 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def counted(number: int, what: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def positive(text: str) -> int:
    """The type of an option that is a number of at least 1."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """The type of an option that is a number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return int(text)


@contextlib.contextmanager
def hearing_sigterm() -> Iterator[None]:
    """Raises Terminated, wherever the program is, when it is told to end; in the main thread alone, as Python has it."""
    def stop(*_):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(parser: Parser, work: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Parse, work, and turn what the user or the machine did wrong into an exit code; a signal's too, as a shell reports it."""
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return work(arguments)
    except BrokenPipeError:  # the reader has seen enough: for cli.py
        raise
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except ValueError as error:
        return fail(str(error))
    except KeyboardInterrupt as stop:  # its arguments: what is left
        number, what = (signal.SIGTERM, "stopped by SIGTERM") if isinstance(stop, Terminated) else (signal.SIGINT, "interrupted")
        print("; ".join((what, *map(str, stop.args))), file=sys.stderr)
        return 128 + number
