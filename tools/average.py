"""The average of several checkpoints' weights, as a checkpoint for generate, convert and init_from; a few rows at a time.

Checkpoints of one run near its end, averaged, are often better than the last (Izmailov et al., "Averaging Weights Leads to Wider
Optima and Better Generalization", 2018).
"""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint import CheckpointError, Weights, differences, find, read_weights
from megalm.checkpoint.format import MANIFEST, read_json
from megalm.checkpoint.sealed import seal_of
from megalm.checkpoint.stream import write_weights

FOLDERS = ("tokenizer", "huggingface")
"""What is taken from the first checkpoint, besides config.json and plan.json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megalm checkpoint average`."""
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a run's folder, or one checkpoint in it")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the new checkpoint; it must be new")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W",
                        help="one a checkpoint, divided by their sum; default: equal ones")


def average(arguments: argparse.Namespace) -> int:
    """Write the average; returns 0. Raises CheckpointError or ValueError."""
    folders = [find(path, lambda line: print(line, file=sys.stderr)) for path in arguments.checkpoints]
    weights = [1.0] * len(folders) if arguments.weights is None else arguments.weights
    if len(weights) != len(folders):
        raise ValueError(f"--weights: {len(weights)} numbers for {len(folders)} checkpoints")
    if not all(map(math.isfinite, weights)) or not sum(weights) > 0:
        raise ValueError(f"--weights {' '.join(map(str, weights))}: finite numbers with a sum above 0 expected")
    _check_distinct(arguments.checkpoints, folders)
    _check_alike(folders)
    mean = Mean([read_weights(folder) for folder in folders], [weight / sum(weights) for weight in weights], folders)
    first = folders[0]
    files = {f"{name}/{path.name}": path for name in FOLDERS for path in sorted((first / name).glob("*"))}
    documents = {name: read_json(first / name) for name in ("config.json", "plan.json")}
    write_weights(Path(arguments.output), mean, documents, files)
    print(f"{arguments.output}: the average of {', '.join(path.name for path in folders)}")
    return 0


def _check_distinct(given: Sequence[str], folders: Sequence[Path]) -> None:
    """Each is another one, wherever it lies: for shares there is --weights. Raises ValueError."""
    seen: dict[str | None, str] = {}
    for path, folder in zip(given, folders, strict=True):
        seal = seal_of((folder / MANIFEST).read_bytes())
        if seal in seen:
            raise ValueError(f"{seen[seal]} and {path} are the same checkpoint; --weights gives one a larger share")
        seen[seal] = path


def _check_alike(folders: Sequence[Path]) -> None:
    """They are one model with one tokenizer. Raises CheckpointError with every difference."""
    configs = [read_json(folder / "config.json") for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        found = differences(configs[0], config, ("model", "tokenizer"))
        found = [difference for difference in found if not difference.path.endswith("dropout")]
        if found:
            lines = "; ".join(f"{difference.path}: {difference.stored!r} and {difference.current!r}" for difference in found)
            raise CheckpointError(f"{folders[0]} and {folder} are different models: {lines}")


class Mean:
    """The weighted mean of weights with the same parts, summed in fp64, in the dtype of the first. The coefficients sum to 1."""

    def __init__(self, weights: Sequence[Weights], coefficients: Sequence[float], folders: Sequence[Path]):
        """Raises CheckpointError where the parts or their shapes differ."""
        self.weights, self.coefficients = weights, coefficients
        first = weights[0]
        for folder, other in zip(folders, weights, strict=True):
            if set(other) != set(first):
                part = sorted(set(other) ^ set(first))[0]
                raise CheckpointError(f"{folders[0]} and {folder} are different models: only one has {part}")
            for part in first:
                if other.shape(part) != first.shape(part):
                    raise CheckpointError(f"{part} is {list(first.shape(part))} in {folders[0]} and {list(other.shape(part))} in "
                                          f"{folder}: `megalm convert` to hf: and back takes the padding away")

    def shape(self, part: str) -> tuple[int, ...]:
        return self.weights[0].shape(part)

    def dtype(self, part: str) -> torch.dtype:
        return self.weights[0].dtype(part)

    def rows(self, part: str, low: int, high: int) -> Tensor:
        total = torch.zeros((high - low, *self.shape(part)[1:]), dtype=torch.float64)
        for weights, coefficient in zip(self.weights, self.coefficients, strict=True):
            total += coefficient * weights.rows(part, low, high).double()
        return total.to(self.dtype(part))

    def release(self) -> None:
        for weights in self.weights:
            weights.release()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights[0])
