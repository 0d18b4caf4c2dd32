"""The one exception of this package."""
from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """The user's configuration is wrong. `problems` holds one line a mistake, all of them; str() is these lines."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
