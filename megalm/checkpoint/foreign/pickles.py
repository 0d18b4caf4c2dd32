"""What torch.save wrote, opened so that nothing but tensors and plain containers can come out of it."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megalm.checkpoint.format import CheckpointError

KNOWN = ("argparse.", "megatron.", "deepspeed.", "numpy.", "types.SimpleNamespace")
"""Whose objects stand beside the weights in files of Megatron-LM and GPT-NeoX."""


class Inert:
    """What an object of another program's class becomes: its attributes, and none of its code."""

    def __init__(self, *arguments: Any) -> None:
        """Whatever the file calls it with is forgotten."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_pickle(path: Path) -> Any:
    """The content, mapped rather than read, tensors on the CPU. Raises CheckpointError.

    weights_only: the unpickler itself makes tensors and containers and calls nothing that the file names. Classes of KNOWN
    programs become Inert without being looked up; any other name is refused.
    """
    try:
        if path.stat().st_size and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: no file of torch.save, or one of before torch 1.6, which can't be mapped: "
                                  "torch.load with weights_only=True and torch.save make a new one of it")
        named = get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in named if not name.startswith(KNOWN)]
        if refused:
            raise CheckpointError(f"{path}: refused: it holds more than tensors, and would call {', '.join(refused[:3])}")
        with safe_globals([(Inert, name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: it holds more than tensors: {_line(error)}") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: can't be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


class PickleFiles:
    """Opens each file once and keeps it mapped until `release`."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def load(self, path: Path) -> Any:
        """The file's content. Raises CheckpointError."""
        if path not in self._open:
            self._open[path] = load_pickle(path)
        return self._open[path]

    def release(self) -> None:
        """Let go of all files until they are asked for again."""
        self._open.clear()
