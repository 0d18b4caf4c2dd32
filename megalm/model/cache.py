"""Keys and values of the tokens that a model has seen, which generation computes once.

    cache = KeyValueCache(batch=1, most=seq_length, device)
    with cache.adding(model, [7]):
        hidden, weight = model.outputs(prompt)         # tokens [1, 7]
    with cache.adding(model, [1]):
        hidden, weight = model.outputs(next_token)     # [1, 1]: it sees the prompt, at the position after it

Sequences of unequal lengths are padded on the right: what a shorter one leaves there is written over by its next tokens, and
nobody sees it. A layer keeps [b, G, room, d], so that a group's keys lie one after the other; a full one doubles its room.
With a page size it keeps pages of so many tokens instead, [pages, page, G, d], of which each sequence has what its own length
takes, and an ended one none (Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megalm.ops.attention import UNBOUNDED, attention
from megalm.ops.decode import LEAST_PAGE, decode

FEW = 16
"""Queries that decode's kernel has in one block; of more it would read the cache several times."""
LEAST_ROOM = 64


class KeyValueCache:
    """Of one batch of sequences, for all layers of a model.

    Args:
        most: tokens that a sequence can have; memory grows up to it as it is needed.
        page: tokens of a page, a power of two from ops/decode.py's LEAST_PAGE up; None: no pages.
    """

    def __init__(self, batch: int, most: int, device: torch.device, page: int | None = None):
        self.lengths, self.most, self.device = [0] * batch, most, device
        self.pages = None if page is None else Pages(batch, page, device)
        self.start = self.end = 0               # the place of the first new token in the longest sequence; of the last, + 1
        self.positions: Tensor | None = None    # of the new tokens, int64 [n, b], where sequences differ
        self.slots: Tensor | None = None        # where they are kept: the same, but for padding beyond the most
        self.seen: Tensor | None = None         # int32 [b], lengths with the new tokens, where they differ or there are pages
        self._layers: dict[nn.Module, LayerCache] = {}

    @contextmanager
    def adding(self, model: nn.Module, counts: Sequence[int]) -> Iterator[None]:
        """Inside, one forward pass of `model` (in eval mode, always the same) appends its tokens [b, n] and sees those before.

        counts: how many of the n = max(counts) tokens each sequence has; the rest is padding, whose outputs mean nothing.
        Raises ValueError where they don't fit.
        """
        assert not model.training and len(counts) == len(self.lengths), (model.training, counts)
        self._place(counts)
        if not self._layers:
            self._layers = {module: LayerCache(self) for module in model.modules() if hasattr(module, "cache")}
        for module, layer in self._layers.items():
            module.cache = layer
        try:
            yield
        finally:
            for module in self._layers:
                module.cache = None
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def _place(self, counts: Sequence[int]) -> None:
        n = max(counts)
        for length, count in zip(self.lengths, counts, strict=True):
            if length + count > self.most:
                raise ValueError(f"{count} more tokens after {length} don't fit into a cache of {self.most}")
        self.start, self.end = max(self.lengths), max(self.lengths) + n
        self.positions = self.slots = self.seen = None
        unequal = min(self.lengths) < self.start
        if unequal or self.pages is not None:
            lengths = torch.tensor(self.lengths, device=self.device)
            self.slots = lengths + torch.arange(n, device=self.device)[:, None]                 # [n, b]
            self.positions = self.slots.clamp(max=self.most - 1) if unequal else None           # padding has none of its own
            self.seen = (lengths + n).to(torch.int32)
        if self.pages is not None:
            self.pages.reserve([length + count for length, count in zip(self.lengths, counts, strict=True)], self.end)
            self.slots = self.pages.slots(self.slots, counts)

    def drop(self, sequence: int) -> None:
        """Forget a sequence that has ended: it is empty from here on, and its pages are free for the others."""
        self.lengths[sequence] = 0
        if self.pages is not None:
            self.pages.release(sequence)


class Pages:
    """Which pages each sequence has, the same of every layer. Page 0 is nobody's: padding is written there."""

    def __init__(self, batch: int, size: int, device: torch.device):
        assert size >= LEAST_PAGE and size & (size - 1) == 0, size
        self.size, self.device = size, device
        self.count = 1                          # pages that there are
        self.free: list[int] = []
        self.owned: list[list[int]] = [[] for _ in range(batch)]
        self.table: Tensor | None = None        # int32 [b, pages of the longest], 0 where a sequence has none

    def reserve(self, lengths: Sequence[int], end: int) -> None:
        """Pages for sequences of these lengths, in a table that reaches up to `end`."""
        # A forward pass that failed behind its reservation leaves pages beyond `end`.
        columns, changed = max(-(-end // self.size), *map(len, self.owned)), False
        for owned, length in zip(self.owned, lengths, strict=True):
            while len(owned) * self.size < length:
                owned.append(self._take())
                changed = True
        if changed or self.table is None or self.table.shape[1] < columns:
            rows = [[*owned, *[0] * (columns - len(owned))] for owned in self.owned]
            self.table = torch.tensor(rows, dtype=torch.int32, device=self.device)

    def _take(self) -> int:
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1

    def release(self, sequence: int) -> None:
        self.free += self.owned[sequence]
        self.owned[sequence], self.table = [], None

    def slots(self, places: Tensor, counts: Sequence[int]) -> Tensor:
        """Where in the pages, one after the other, the tokens at `places` [n, b] of their sequences are kept: int64 [n, b]."""
        page = self.table.long().gather(1, (places // self.size).t()).t()                           # [n, b]
        real = torch.arange(len(places), device=self.device)[:, None] < torch.tensor(counts, device=self.device)
        return (page * self.size + places % self.size) * real


class LayerCache:
    """A layer's side of it; that of learned positions keeps nothing."""

    def __init__(self, whole: KeyValueCache):
        self.whole = whole
        self.keys: Tensor | None = None      # [b, G, room, d], or [pages, page, G, d]
        self.values: Tensor | None = None

    def places(self) -> dict[str, int | Tensor]:
        """Where the new tokens stand, as ops/rotary.py takes it."""
        return {"offset": self.whole.start} if self.whole.positions is None else {"positions": self.whole.positions}

    def rows(self, table: Tensor) -> Tensor:
        """The rows of [positions, h] for the new tokens: [n, 1 or b, h]."""
        if self.whole.positions is None:
            return table[self.whole.start:self.whole.end].unsqueeze(1)
        return table[self.whole.positions]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int] | None, backend: str,
               softmax: str) -> Tensor:
        """Causal attention of the new tokens [n, b, H or G, d] to all: [n, b, H, d]. A prompt takes attention's `backend`."""
        left = UNBOUNDED if window is None else window[0]
        if self.whole.pages is not None:
            self._append_to_pages(key, value, self.whole.pages)
            if self.whole.start > 0:
                return decode(query, self.keys, self.values, self.whole.seen, table=self.whole.pages.table, left=left)
            keys, values = key, value
        else:
            keys, values = self._append(key, value)
        if self.whole.start == 0 or self.whole.seen is None and query.shape[0] > FEW:
            return attention(query, keys, values, causal=True, window=window, backend=backend, softmax=softmax)
        return decode(query, keys, values, self.whole.seen, left=left)

    def _append_to_pages(self, key: Tensor, value: Tensor, pages: Pages) -> None:
        self.keys, self.values = (_with_pages(old, new, pages) for old, new in ((self.keys, key), (self.values, value)))
        for kept, new in ((self.keys, key), (self.values, value)):
            kept.flatten(0, 1)[self.whole.slots.flatten()] = new.flatten(0, 1)

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Views [s, b, G, d] of all keys and values, the new ones included."""
        end, slots = self.whole.end, self.whole.slots
        self.keys, self.values = (_roomy(old, new, self.whole) for old, new in ((self.keys, key), (self.values, value)))
        for kept, new in ((self.keys, key), (self.values, value)):
            if slots is None:
                kept[:, :, self.whole.start:end] = new.permute(1, 2, 0, 3)
            else:
                sequence = torch.arange(kept.shape[0], device=kept.device)[:, None]
                kept[sequence, :, slots.t()] = new.transpose(0, 1)                          # [b, n, G, d]
        return tuple(kept[:, :, :end].permute(2, 0, 1, 3) for kept in (self.keys, self.values))


def _roomy(kept: Tensor | None, new: Tensor, whole: KeyValueCache) -> Tensor:
    """The store [b, G, room, d] with room for the new tokens [n, b, G, d]: the old one, or twice as much with its content."""
    have = 0 if kept is None else kept.shape[2]
    if have >= whole.end:
        return kept
    room = max(whole.end, min(whole.most, max(LEAST_ROOM, 2 * have)))  # padding may reach beyond the most
    grown = new.new_empty(*new.shape[1:3], room, new.shape[3])
    if kept is not None:
        grown[:, :, :whole.start] = kept[:, :, :whole.start]
    return grown


def _with_pages(kept: Tensor | None, new: Tensor, pages: Pages) -> Tensor:
    """The store [pages, page, G, d] with all the pages that there are: the old one, or a larger one with its content."""
    have = 0 if kept is None else kept.shape[0]
    if have >= pages.count:
        return kept
    # Of zeros: a page that is not full is multiplied by probabilities of 0.
    grown = new.new_zeros(max(pages.count, have + have // 2), pages.size, *new.shape[2:])
    if kept is not None:
        grown[:have] = kept
    return grown
