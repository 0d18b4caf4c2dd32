"""For every session: signals as a terminal has them, and at its end how long each part took, as its time budget is by part."""

from __future__ import annotations

import signal

PARTS = {"tests/parity/": "parity", "tests/csrc/": "kernels"}
REST = "the rest"


def pytest_configure() -> None:
    """What runs the suite may ignore signals (nohup, a shell's background job), which programs under test would inherit."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def part_seconds(durations: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds by part of (test id, seconds) pairs; parts without a test are left out."""
    seconds: dict[str, float] = {}
    for name, duration in durations:
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), REST)
        seconds[part] = seconds.get(part, 0.0) + duration
    return seconds


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "duration")]
    seconds = part_seconds([(report.nodeid, report.duration) for report in reports])
    if seconds:
        terminalreporter.write_line("seconds: " + ", ".join(f"{part} {seconds[part]:.0f}" for part in sorted(seconds)))
