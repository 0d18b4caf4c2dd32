"""A shuffle that is computed and not stored: the item at any place, and the place of any item, in constant memory.

A generalised Feistel network over the pairs (left, right) of Z_w x Z_w, w^2 > count: each round adds a keyed hash of one half to
the other and swaps them (Luby and Rackoff, 1988). A result outside range(count) goes through the network again until it is
inside, which keeps it a bijection (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002); w is the least that serves,
so that all but about 2 / sqrt(count) of the places take one pass. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood,
2014). All of it is exact arithmetic on 64-bit integers: an order is the same with every version of numpy, on every machine.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

ROUNDS, BITS = 8, 64  # at least so many rounds, and as many as hash so many bits together: small networks mix slowly
CHUNK = 1 << 14  # values worked on at a time: their temporaries stay in a core's cache
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _32 = (np.uint64(bits) for bits in (27, 30, 32))


class Permutation:
    """A bijection of range(count), a function of (count, key) alone."""

    def __init__(self, count: int, *key: int):
        """`key`: integers such as seed and epoch. Raises ValueError unless count is from 0 to 2^62."""
        if not 0 <= count <= 1 << 62:
            raise ValueError(f"a permutation of {count}; it can have 0 to 2^62")
        self.count = count
        self._width = np.uint64(math.isqrt(count) + 1)  # 2^31 + 1 at most, so that half a hash times it fits 64 bits
        rounds = max(ROUNDS, math.ceil(BITS / math.log2(int(self._width) + 1)))
        digest = hashlib.shake_256(f"megalm permutation {count} {[int(part) for part in key]}".encode()).digest(8 * rounds + 1)
        self._keys = np.frombuffer(digest[:-1], "<u8").astype(np.uint64)
        # The network has permutations of one sign only, which shows where few pairs are outside: half of the keys swap two items.
        self._swaps = count > 1 and bool(digest[-1] & 1)

    def item_at(self, places: np.ndarray) -> np.ndarray:
        """The items at these places of the shuffled order: integers of range(count) [n] -> int64 [n]."""
        return self._chunked(places, lambda values: self._swapped(self._walk(values, self._forward)))

    def place_of(self, items: np.ndarray) -> np.ndarray:
        """Where these items stand in the shuffled order: the inverse of `item_at`."""
        return self._chunked(items, lambda values: self._walk(self._swapped(values), self._backward))

    def _chunked(self, values: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        values = np.asarray(values)
        out = np.empty(len(values), np.int64)
        for low in range(0, len(values), CHUNK):
            out[low:low + CHUNK] = function(values[low:low + CHUNK].astype(np.uint64))
        return out

    def _swapped(self, values: np.ndarray) -> np.ndarray:
        return values ^ (values < 2) if self._swaps else values

    def _walk(self, values: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        values = step(values)
        outside = np.flatnonzero(values >= self.count)
        while len(outside):
            again = step(values[outside])
            values[outside] = again
            outside = outside[again >= self.count]
        return values

    def _forward(self, values: np.ndarray) -> np.ndarray:
        left, right = self._halves(values)
        for key in self._keys:
            left, right = right, self._wrapped(left + self._mixed(right, key))
        return left * self._width + right

    def _backward(self, values: np.ndarray) -> np.ndarray:
        left, right = self._halves(values)
        for key in self._keys[::-1]:
            left, right = self._wrapped(right + (self._width - self._mixed(left, key))), left
        return left * self._width + right

    def _halves(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = values // self._width
        return left, values - left * self._width

    def _wrapped(self, sums: np.ndarray) -> np.ndarray:
        """Sums below 2 w, modulo w."""
        sums -= self._width * (sums >= self._width)
        return sums

    def _mixed(self, half: np.ndarray, key: np.uint64) -> np.ndarray:
        """A keyed hash of one half: uniform in range(w) to within w / 2^32."""
        x = half ^ key
        x ^= x >> _30
        x *= _FIRST
        x ^= x >> _27
        x *= _SECOND
        x >>= _32
        x *= self._width
        x >>= _32
        return x
