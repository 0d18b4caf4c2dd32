"""The computed shuffle: a bijection for every count, its own inverse's inverse, even, and different for every seed."""
from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from megalm.data.permutation import Permutation


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 65_537])
def test_a_bijection_and_its_inverse(count):
    shuffle, items = Permutation(count, 5), np.arange(count)
    places = shuffle.place_of(items)
    assert sorted(places.tolist()) == items.tolist()
    assert (shuffle.item_at(places) == items).all()


def test_parts_of_a_huge_order():
    shuffle = Permutation(10**12 + 7, 1)
    items = np.arange(10**11, 10**11 + 1000)
    places = shuffle.place_of(items)
    assert (shuffle.item_at(places) == items).all() and places.min() >= 0 and places.max() < 10**12 + 7
    assert abs(places.mean() / 10**12 - 0.5) < 0.05  # neighbours are spread over everything: 5 standard errors


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_order_is_as_likely(count):
    """Over 6,000 seeds, chi-squared of all orders of a few items, 6 standard deviations: the sign of a permutation shows here."""
    seen = Counter(tuple(Permutation(count, seed).item_at(np.arange(count)).tolist()) for seed in range(6000))
    orders = math.factorial(count)
    assert len(seen) == orders
    assert sum((n - 6000 / orders) ** 2 / (6000 / orders) for n in seen.values()) < orders - 1 + 6 * (2 * (orders - 1)) ** 0.5


def test_every_item_is_as_likely_at_every_place():
    """Over 4,000 seeds, chi-squared of (item, place) for 12 items: 121 degrees of freedom, 6 standard deviations."""
    counts = np.zeros((12, 12))
    for seed in range(4000):
        counts[np.arange(12), Permutation(12, seed).place_of(np.arange(12))] += 1
    expected = 4000 / 12
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 6 * (2 * 121) ** 0.5


def test_neighbours_are_independent():
    """The correlation of an item's place with that of the next ones, over 100,000 items, is noise (5 standard errors)."""
    places = Permutation(100_000, 3).place_of(np.arange(100_000)).astype(float)
    for distance in (1, 2, 255, 256, 512):
        assert abs(np.corrcoef(places[:-distance], places[distance:])[0, 1]) < 5 / 100_000**0.5


def test_the_order_is_fixed_for_ever():
    """A shuffled data set must come out the same after an upgrade."""
    assert Permutation(10, 1234).item_at(np.arange(10)).tolist() == [2, 9, 8, 5, 6, 0, 1, 3, 4, 7]


def test_seeds_differ():
    orders = {tuple(Permutation(20, seed).item_at(np.arange(20)).tolist()) for seed in range(200)}
    assert len(orders) == 200
    with pytest.raises(ValueError, match="a permutation of -1"):
        Permutation(-1, 0)
