"""Weights that other programs wrote, seen as megalm's parts: described by tables, read a slice at a time."""

from megalm.checkpoint.foreign.layout import Layout, join
from megalm.checkpoint.foreign.weights import Foreign
from megalm.checkpoint.pieces import Piece

__all__ = ["Foreign", "Layout", "Piece", "join"]
