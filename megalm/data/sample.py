"""A sample of a corpus that depends on the set of its texts and a seed alone: not on the order of files, shards or workers."""
from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

HASH_BYTES = 16


def key(text: bytes, seed: int) -> int:
    """A number below 2^128 that a text draws; equal texts draw the same one."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=HASH_BYTES, key=str(seed).encode()).digest(), "big")


def share_of(text: bytes, seed: int) -> float:
    """A number in [0, 1) that a text draws, independent of its `key` under the same seed."""
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode(), person=b"share").digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class Sample:
    """The texts with the least keys, just as many as reach most_bytes or most_documents (None: no limit).

    Only those are in memory. That some text is never needed again can be seen as soon as texts with lesser keys reach the limit,
    so that the result is the same in whatever order they come.
    """

    def __init__(self, seed: int, most_bytes: int | None = None, most_documents: int | None = None):
        self.seed, self.most_bytes, self.most_documents = seed, most_bytes, most_documents
        self._heap: list[tuple[int, bytes]] = []  # (-key, text): the greatest key first
        self.bytes = self.offered = self.offered_bytes = 0

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, text: bytes) -> None:
        """Let a text take part."""
        self.offered += 1
        self.offered_bytes += len(text)
        self.bytes += len(text)
        heapq.heappush(self._heap, (-key(text, self.seed), text))
        while self._is_reached_without(self._heap[0][1]):
            self.bytes -= len(heapq.heappop(self._heap)[1])

    def __iter__(self) -> Iterator[str]:
        """The texts by their keys."""
        for _, text in sorted(self._heap, reverse=True):
            yield text.decode()

    def _is_reached_without(self, last: bytes) -> bool:
        by_bytes = self.most_bytes is not None and self.bytes - len(last) >= self.most_bytes
        return by_bytes or (self.most_documents is not None and len(self._heap) > self.most_documents)
