"""The one exception of this package."""
from __future__ import annotations

from collections.abc import Iterable


class PlanError(ValueError):
    """The config doesn't fit this cluster. `problems` holds one line a mistake, with every number in it; str() is these lines."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
