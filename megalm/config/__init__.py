"""What the user said: one JSON file, validated. `load(path, overrides)` gives a frozen Config or one ConfigError."""
from __future__ import annotations

from .errors import ConfigError
from .load import load, validate
from .schema import Config

__all__ = ["Config", "ConfigError", "load", "validate"]
