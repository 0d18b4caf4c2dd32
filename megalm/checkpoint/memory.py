"""How much memory a machine's ranks may still take together: the kernel's word, and the limits of their control groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

UNLIMITED = 1 << 60  # version 1's "no limit" is a number near 2^63
FILES = (("memory.max", "memory.current", "inactive_file"),
         ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
"""Limit, use, and what of the use is cached files that nobody needs (a line of memory.stat): versions 2 and 1."""


def machine() -> str:
    """The same for all processes of one machine, and for no others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this process's machine and control groups can still take; None where the kernel doesn't say."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        own = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except (OSError, StopIteration, ValueError):
        return None
    for _, controllers, path in own:
        top = groups / "memory" if controllers == "memory" else groups
        if controllers in ("", "memory"):
            folder = top / path.lstrip("/")
            free = min([free, *(_left(level) for level in (folder, *folder.parents) if level == top or top in level.parents)])
    return free


def _left(folder: Path) -> int:
    """What one control group can still take."""
    for limit, use, idle in FILES:
        try:
            most = int((folder / limit).read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return most - int((folder / use).read_text()) + int(cached.get(idle, 0))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return UNLIMITED


def shortage(own: str, told: Sequence[tuple[str, int, int | None]]) -> tuple[int, int] | None:
    """(bytes needed, bytes free) of the machine `own` where half of the free can't hold it, of every rank's (machine, bytes
    that it needs, bytes free): the same answer for all ranks of a machine. None: there is room, or nobody knows."""
    needed = sum(size for name, size, _ in told if name == own)
    free = min((number for name, _, number in told if name == own and number is not None), default=None)
    return (needed, free) if free is not None and needed > free / 2 else None
