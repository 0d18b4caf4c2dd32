"""One planted bug."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In `file` below csrc/, `old` becomes `new`; the cases whose names start with `op` must fail."""

    op: str
    name: str
    file: str
    old: str
    new: str
