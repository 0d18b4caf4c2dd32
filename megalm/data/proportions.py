"""Who gives which sample of a mixture: proportions held at every prefix, each sample found without those before it.

Weights in a proportion of small whole numbers, as people write them, have a schedule of one period, which is kept: after every
number n of samples each data set has given its weight's share of n to within less than one sample. Giving the next sample to
whoever is furthest behind doesn't always hold that bound; the earliest deadline among those that are behind does (the quota
method of Balinski and Young, 1975; as a schedule, Baruah et al., "Proportionate progress", 1996).

Other weights, taken as exactly, have a tree of two-way choices, Huffman's (1952), and a choice is computed: after n samples the
lighter side has had n times its share, rounded. Every choice on the way to a data set adds at most half a sample to what it is
off, and passes on its share of what the choices above it are off: one to two samples in all, however unequal the weights.
"""
from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LIMIT = 1 << 16  # the longest schedule kept, built in a quarter of a second


def proportions(weights: Sequence[float]) -> list[int]:
    """Integers in the proportion of the weights, each taken as the decimal that it is written as: [0.7, 0.3] -> [7, 3].

    Raises ValueError unless every weight is positive and finite.
    """
    for weight in weights:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of a data set is {weight}; it must be a positive number")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(value.denominator for value in exact))
    integers = [int(value * scale) for value in exact]
    divisor = math.gcd(*integers)
    return [value // divisor for value in integers]


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


class Schedule:
    """The schedule of a mixture, kept for one period, the sum of the integer weights: every lookup is O(1)."""

    def __init__(self, weights: Sequence[int]):
        self._source = schedule(weights, sum(weights))
        self._period = np.asarray(weights, np.int64)  # samples of each data set in one period
        by_source = np.argsort(self._source, kind="stable")  # the places of data set 0 in order, then those of 1, ...
        firsts = np.cumsum(self._period) - self._period
        self._rank = np.empty(len(self._source), np.int64)  # which sample of its data set, within the period
        self._rank[by_source] = np.arange(len(self._source)) - firsts[self._source[by_source]]

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, sample of that data set) of sample `index`."""
        rounds, place = divmod(index, len(self._source))
        source = int(self._source[place])
        return source, rounds * int(self._period[source]) + int(self._rank[place])

    def counts(self, num_samples: int) -> np.ndarray:
        """Samples that each data set gives to the first num_samples, int64 [data sets]."""
        rounds, rest = divmod(num_samples, len(self._source))
        return rounds * self._period + np.bincount(self._source[:rest], minlength=len(self._period))


class Choices:
    """The tree of two-way choices: nothing is kept but the tree, and a lookup is as long as its path, log2(data sets) or so."""

    def __init__(self, weights: Sequence[int]):
        """Joins the two lightest until one is left, so that heavy data sets are near the root."""
        self._leaves = len(weights)
        self._nodes: list[tuple[int, int, int, int]] = []  # (lighter child, its weight, heavier child, weight of both)
        heap = [(weight, k) for k, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (weight, light), (other, heavy) = heapq.heappop(heap), heapq.heappop(heap)
            self._nodes.append((light, weight, heavy, weight + other))
            heapq.heappush(heap, (weight + other, self._leaves + len(self._nodes) - 1))
        self._root = heap[0][1]

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, sample of that data set) of sample `index`."""
        node = self._root
        while node >= self._leaves:
            light, weight, heavy, total = self._nodes[node - self._leaves]
            before = _share(index, weight, total)
            if _share(index + 1, weight, total) > before:
                node, index = light, before
            else:
                node, index = heavy, index - before
        return node, index

    def counts(self, num_samples: int) -> np.ndarray:
        """Samples that each data set gives to the first num_samples, int64 [data sets]."""
        given = [0] * (self._leaves + len(self._nodes))
        given[self._root] = num_samples
        for place in range(len(self._nodes) - 1, -1, -1):  # a node comes after its children
            light, weight, heavy, total = self._nodes[place]
            whole = given[self._leaves + place]
            given[light] = _share(whole, weight, total)
            given[heavy] = whole - given[light]
        return np.asarray(given[:self._leaves], np.int64)


def _share(count: int, weight: int, total: int) -> int:
    """count * weight / total, rounded to the nearest."""
    return (2 * count * weight + total) // (2 * total)


class Blend:
    """num_samples samples of several data sets by weight."""

    def __init__(self, weights: Sequence[float], num_samples: int):
        """Raises ValueError unless every weight is positive and finite."""
        integers = proportions(weights)
        self.num_samples = num_samples
        self._order = Schedule(integers) if sum(integers) <= LIMIT else Choices(integers)

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, sample of that data set) of sample `index`, whatever num_samples is."""
        return self._order.locate(index)

    def counts(self, num_samples: int | None = None) -> np.ndarray:
        """Samples that each data set gives to the first num_samples, or to the whole: int64 [data sets]."""
        return self._order.counts(self.num_samples if num_samples is None else num_samples)
