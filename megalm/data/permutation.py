"""A shuffle that is computed and not stored: the place of any item, and the item at any place, in constant memory.

A balanced Feistel network over the least even number of bits that holds the count (Luby and Rackoff, 1988), walked along its
cycle until it lands inside the count (Black and Rogaway, 2002). Both directions, any part of the order, no array.
"""
from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


class Permutation:
    """A bijection of range(count), a function of (count, seed) alone."""

    def __init__(self, count: int, seed: int):
        if not 0 <= count <= 1 << 62:
            raise ValueError(f"a permutation of {count}; it can have 0 to 2^62")
        self.count = count
        self._half = np.uint64(max(1, -(-max(0, count - 1).bit_length() // 2)))  # bits of each half
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.blake2b(f"megalm permutation {seed}".encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def place_of(self, items: np.ndarray) -> np.ndarray:
        """Where these items, int64 [n], stand in the shuffled order: int64 [n]."""
        return self._walk(items, self._forward)

    def item_at(self, places: np.ndarray) -> np.ndarray:
        """The items that stand at these places: the inverse of `place_of`."""
        return self._walk(places, self._backward)

    def _walk(self, values: np.ndarray, step) -> np.ndarray:
        values = step(np.asarray(values, np.int64).astype(np.uint64))
        outside = np.flatnonzero(values >= np.uint64(self.count))
        while len(outside):  # at most 3/4 of the domain lies outside
            values[outside] = step(values[outside])
            outside = outside[values[outside] >= np.uint64(self.count)]
        return values.astype(np.int64)

    def _forward(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ self._mixed(right, key)
        return left << self._half | right

    def _backward(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ self._mixed(left, key), left
        return left << self._half | right

    def _mixed(self, half: np.ndarray, key: np.uint64) -> np.ndarray:
        """A hash of half a value, as wide as half a value: the finalizer of MurmurHash3 (Appleby, public domain)."""
        x = half + key  # wraps
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x ^= x >> np.uint64(33)
            x *= np.uint64(factor)
        return (x ^ x >> np.uint64(33)) & self._mask
