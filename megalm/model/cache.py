"""Keys and values of the tokens that a model has seen, which generation computes once.

    cache = KeyValueCache(batch=1, most=seq_length, device)
    with cache.adding(model, [7]):
        hidden, weight = model.outputs(prompt)         # tokens [1, 7]
    with cache.adding(model, [1]):
        hidden, weight = model.outputs(next_token)     # [1, 1]: it sees the prompt, at the position after it

Sequences of unequal lengths are padded on the right: what a shorter one leaves there is written over by its next tokens, and
nobody sees it. A layer keeps [b, G, room, d], so that a group's keys lie one after the other; a full one doubles its room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megalm.ops.attention import UNBOUNDED, attention
from megalm.ops.decode import decode

FEW = 16
"""Queries that decode's kernel has in one block; of more it would read the cache several times."""
LEAST_ROOM = 64


class KeyValueCache:
    """Of one batch of sequences, for all layers of a model.

    Args:
        most: tokens that a sequence can have; memory grows up to it as it is needed.
    """

    def __init__(self, batch: int, most: int, device: torch.device):
        self.lengths, self.most, self.device = [0] * batch, most, device
        self.start = self.end = 0               # the place of the first new token in the longest sequence; of the last, + 1
        self.positions: Tensor | None = None    # of the new tokens, int64 [n, b], where sequences differ
        self.slots: Tensor | None = None        # where they are kept: the same, but for padding beyond the most
        self.seen: Tensor | None = None         # int32 [b], each sequence's length with the new tokens, where they differ
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
        if min(self.lengths) < self.start:
            lengths = torch.tensor(self.lengths, device=self.device)
            self.slots = lengths + torch.arange(n, device=self.device)[:, None]                 # [n, b]
            self.positions = self.slots.clamp(max=self.most - 1)                                # padding has none of its own
            self.seen = (lengths + n).to(torch.int32)


class LayerCache:
    """A layer's side of it; that of learned positions keeps nothing."""

    def __init__(self, whole: KeyValueCache):
        self.whole = whole
        self.keys: Tensor | None = None      # [b, G, room, d]
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
        keys, values = self._append(key, value)
        if self.whole.start == 0 or self.whole.seen is None and query.shape[0] > FEW:
            return attention(query, keys, values, causal=True, window=window, backend=backend, softmax=softmax)
        return decode(query, keys, values, self.whole.seen, left=UNBOUNDED if window is None else window[0])

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
