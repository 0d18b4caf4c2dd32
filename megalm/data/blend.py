"""Several data sets mixed by weight: which one gives sample i, and which of its own samples that is.

After every number n of samples each data set has given its weight's share of n to within less than one sample. Giving the next
sample to whoever is furthest behind doesn't always hold that bound; the earliest deadline among those that are behind does
(the quota method of Balinski and Young, 1975; as a schedule, Baruah et al., "Proportionate progress", 1996).
"""
from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from .errors import DataError
from .samples import PackedSamples

LIMIT = 1 << 20  # the longest schedule kept: 6 MB, built in about two seconds


@dataclass(frozen=True)
class Source:
    """A data set and its weight; anything with these two attributes serves as well."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Share:
    """What a run takes from one data set: samples, and how many times it goes through the data."""

    path: str
    weight: float  # of all weights' sum, 0 to 1
    samples: int
    epochs: float

    def __str__(self) -> str:
        return f"{self.path} gives {self.samples:,} samples ({self.weight:.1%} of the blend), {self.epochs:.2f} epochs"


def integer_weights(weights: Sequence[float], limit: int = LIMIT) -> list[int]:
    """Integers in the proportion of the weights, each weight taken as the decimal that it is written as: [0.7, 0.3] -> [7, 3].

    If their sum would exceed `limit`, they are rounded to sum to about `limit`, the smallest to 1 at least.
    Raises ValueError unless every weight is positive and finite.
    """
    for weight in weights:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of a data set is {weight}; it must be a positive number")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(value.denominator for value in exact))
    integers = [int(value * scale) for value in exact]
    divisor = math.gcd(*integers)
    integers = [value // divisor for value in integers]
    total = sum(integers)
    return integers if total <= limit else [max(1, round(Fraction(value * limit, total))) for value in integers]


def schedule(weights: Sequence[int], length: int) -> np.ndarray:
    """Who gives each of `length` samples, int32 [length], for integer weights.

    The j-th sample (from 1) of a data set with share w may be the n-th of all once w n > j - 1, and is due at the first n with
    w n >= j. Taking the earliest deadline among those that may, every deadline is met, as the shares sum to 1.
    """
    total = sum(weights)
    counts = [0] * len(weights)
    ready: list[tuple[int, int]] = []  # (deadline, k)
    waiting = [(1, -(-total // weight), k) for k, weight in enumerate(weights)]  # (release, deadline, k)
    heapq.heapify(waiting)
    chosen = np.empty(length, np.int32)
    for place in range(length):
        while waiting and waiting[0][0] <= place + 1:
            _, deadline, k = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, k))
        deadline, k = heapq.heappop(ready)
        assert deadline >= place + 1, "a deadline was missed: the shares don't sum to 1"
        chosen[place] = k
        counts[k] += 1
        given = counts[k] * total
        heapq.heappush(waiting, (given // weights[k] + 1, -(-(given + total) // weights[k]), k))
    return chosen


class Blend:
    """The schedule of num_samples samples, kept for one period (the sum of the integer weights): every lookup is O(1)."""

    def __init__(self, weights: Sequence[float], num_samples: int):
        """Weights in a proportion of integers that sum to LIMIT at most are exact; others are rounded by about 1 / LIMIT."""
        integers = integer_weights(weights)
        self.num_samples = num_samples
        self._source = schedule(integers, min(sum(integers), num_samples))
        self._period = np.bincount(self._source, minlength=len(integers))  # [data sets], samples of each in one period
        by_source = np.argsort(self._source, kind="stable")  # the places of data set 0 in order, then those of 1, ...
        firsts = np.cumsum(self._period) - self._period
        self._rank = np.empty(len(self._source), np.int64)  # which sample of its data set, within the period
        self._rank[by_source] = np.arange(len(self._source)) - firsts[self._source[by_source]]

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, sample of that data set) of sample `index`."""
        rounds, place = divmod(index, len(self._source))
        source = int(self._source[place])
        return source, rounds * int(self._period[source]) + int(self._rank[place])

    def counts(self) -> np.ndarray:
        """Samples that each data set gives to the whole, int64 [data sets]."""
        if self.num_samples == 0:
            return self._period
        rounds, rest = divmod(self.num_samples, len(self._source))
        return rounds * self._period + np.bincount(self._source[:rest], minlength=len(self._period))


class Dataset:
    """num_samples samples from weighted data sets, in the order in which training consumes them."""

    def __init__(self, parts: Sequence[PackedSamples], blend: Blend, shares: Sequence[Share]):
        self.parts, self.blend, self.shares = tuple(parts), blend, tuple(shares)
        self.num_samples, self.seq_length = blend.num_samples, parts[0].seq_length

    def __len__(self) -> int:
        return self.num_samples

    def tokens(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """The token ids of sample `index`, int64 [seq_length + 1], written to `out` if given. Raises IndexError as `locate`."""
        part, local = self.locate(index)
        return self.parts[part].tokens(local, out)

    def document_starts(self, index: int) -> np.ndarray:
        """Where in sample `index` its documents begin, int32 [documents], as PackedSamples has it; no token is read."""
        part, local = self.locate(index)
        return self.parts[part].document_starts(local)

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, sample of that data set) of sample `index`. Raises IndexError outside [0, num_samples)."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return self.blend.locate(index)


def build_dataset(sources: Sequence, seq_length: int, num_samples: int, seed: int, cache_dir: str | Path | None) -> Dataset:
    """Open the data sets (each with .path, a prefix, and .weight) and mix num_samples samples of seq_length + 1 tokens.

    Each data set's sample index is mapped from cache_dir, or built and published there first (None: kept in memory): call
    it once per file system in one process, then in all. The result is a function of the data, the weights, seq_length and
    seed; a larger num_samples only appends. Raises DataError, for all unreadable data sets at once.
    """
    if not sources:
        raise DataError("no data set is named: data needs at least one {\"path\": ...}")
    paths = [str(source.path) for source in sources]
    for path in paths:
        if paths.count(path) > 1:
            raise DataError(f"{path} is named {paths.count(path)} times; name it once, with the sum of its weights")
    blend = Blend([source.weight for source in sources], num_samples)
    folder = None if cache_dir is None else Path(cache_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    parts, problems = [], []
    for path, count in zip(paths, blend.counts().tolist(), strict=True):
        try:
            parts.append(PackedSamples(path, seq_length, count, seed, folder))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    total = sum(source.weight for source in sources)
    shares = [Share(part.prefix, source.weight / total, part.num_samples, part.epochs)
              for part, source in zip(parts, sources, strict=True)]
    return Dataset(parts, blend, shares)
