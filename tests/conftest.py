"""How long each part of the suite took, at the end of a session: its time budget is by part."""

from __future__ import annotations

PARTS = {"tests/parity/": "parity", "tests/csrc/": "kernels"}
REST = "the rest"


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
