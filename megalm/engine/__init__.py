"""The one door to DeepSpeed. Importing the package imports no DeepSpeed: `build` and `warm` do."""

from megalm.engine.warm import warm

__all__ = ["warm"]
