"""Keyed random numbers: every draw is a pure function of a key, never of a generator's state.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which
turns a counter of four 32-bit words and a key of two into four random words. What goes into counter and key:

    dropout   key     = first two words of philox(counter = (step low, step high, layer, op), key = (seed low, seed high))
              counter = (block low, block high, sample low, sample high)
    weights   key     = first 8 bytes (little-endian) of sha256("megalm.normal:<seed>:<name>")
              counter = (block low, block high, 0, 0)

`block` is an element's row-major place in the *unsharded* tensor divided by 4 and `place % 4` picks the word, so that no rank,
shard or micro-batch enters: every layout draws the same numbers, and a resumed run has no state to restore.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EMBEDDING = 0
ATTENTION_SCORES = 1
ATTENTION_OUTPUT = 2
MLP_OUTPUT = 3

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Counters drawn at a time: on CPU the five 8-byte buffers of a chunk stay in a core's L2 cache, elsewhere they stay under 64 MB.
_CHUNK_CPU = 1 << 14
_CHUNK_DEVICE = 1 << 20


class DropoutKey(NamedTuple):
    """What a dropout mask depends on besides sample and place. `op` is one of the small constants of this module.

    Compiled code is given step and layer as int64 scalars on the CPU: it would otherwise be compiled anew for every number.
    """

    seed: int
    step: int | Tensor
    layer: int | Tensor
    op: int


def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: counter words c0..c3 and key words k0, k1 -> four random words.

    Counter words are ints, or int64 tensors that hold values of 0 .. 2**32 - 1 and broadcast together; key words are ints.
    """
    if isinstance(c0, Tensor) and c0.device.type == "cpu":
        words = np.broadcast_arrays(*(np.asarray(word) for word in (c0, c1, c2, c3)))
        return tuple(torch.from_numpy(word) for word in _philox_numpy(*(word.astype(np.int64) for word in words), k0, k1))
    for _ in range(_ROUNDS):
        # A product fills 64 bits: on int64 tensors its sign bit may be set, so the shift is followed by a mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3


def _philox_numpy(c0, c1, c2, c3, k0: int, k1: int):
    """The same on int64 arrays, whose memory it reuses: numpy's calls cost less than torch's, which decides on small masks."""
    shifted = np.empty_like(c0)
    m0, m1, word, half = np.int64(_MULTIPLIERS[0]), np.int64(_MULTIPLIERS[1]), np.int64(WORD), np.int64(32)
    for _ in range(_ROUNDS):
        np.multiply(c0, m0, out=c0)
        np.multiply(c2, m1, out=c2)
        # The low halves c1 and c3 are only masked here, a round later, where they are mixed in.
        np.right_shift(c2, half, out=shifted)
        np.bitwise_xor(c1, shifted, out=c1)
        np.bitwise_xor(c1, np.int64(k0), out=c1)
        np.bitwise_and(c1, word, out=c1)
        np.right_shift(c0, half, out=shifted)
        np.bitwise_xor(c3, shifted, out=c3)
        np.bitwise_xor(c3, np.int64(k1), out=c3)
        np.bitwise_and(c3, word, out=c3)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    np.bitwise_and(c1, word, out=c1)
    np.bitwise_and(c3, word, out=c3)
    return c0, c1, c2, c3


@lru_cache(maxsize=4096)
def dropout_words(key: DropoutKey) -> tuple[int, int]:
    """The two Philox key words of a dropout mask: what a CUDA kernel is handed beside the sample indices."""
    step, seed = int(key.step), int(key.seed)
    words = philox4x32(step & WORD, (step >> 32) & WORD, key.layer, key.op, seed & WORD, (seed >> 32) & WORD)
    return words[0], words[1]


def seed_of(key: DropoutKey) -> int:
    """A 63-bit seed for a library's own generator, from the same key: reproducible, but not free of the layout."""
    k0, k1 = dropout_words(key)
    return (k1 << 32 | k0) >> 1


def threshold(probability: float) -> int:
    """An element is dropped where its 32-bit word is below this. Raises ValueError unless 0 <= probability < 1."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), not {probability}")
    return min(round(probability * 2**32), WORD)


def keep_mask(key: DropoutKey, samples: Tensor, extents: Sequence[tuple[int, int, int]], probability: float,
              device=None) -> Tensor:
    """The slice of a keyed dropout mask that this rank needs: bool [b, *local], True where an element is kept.

    samples: int64 [b], global sample indices. extents: (start, stop, full) for each dim of one sample's unsharded tensor; the
    local shape is stop - start of each. probability: of a drop. device: of the mask (default: that of samples).
    An element's bit depends on key, sample and place alone. Raises ValueError for a range outside its dim.
    """
    bounds = [int(bound) for extent in extents for bound in extent]
    device = samples.device if device is None else torch.device(device)
    if torch.compiler.is_compiling():
        step, layer = torch.as_tensor(key.step), torch.as_tensor(key.layer)
        return torch.ops.megalm.keep_mask(samples, key.seed, step, layer, key.op, bounds, probability, device)
    return _keep_mask(samples, key.seed, key.step, key.layer, key.op, bounds, probability, device)


def _keep_mask(samples, seed: int, step, layer, op: int, bounds: list[int], probability: float, device) -> Tensor:
    """keep_mask with flat arguments, as a custom op has them: under torch.compile the rounds stay one opaque call."""
    extents = list(zip(bounds[0::3], bounds[1::3], bounds[2::3], strict=True))
    for start, stop, full in extents:
        if not 0 <= start <= stop <= full:
            raise ValueError(f"dropout extent ({start}, {stop}, {full}): need 0 <= start <= stop <= full")
    starts, length = _runs(extents)                                      # [r], first place of each contiguous run of a sample
    samples = samples.to(device=device, dtype=torch.int64)               # [b]
    mask = torch.empty(len(samples) * len(starts), length, dtype=torch.bool, device=device)
    limit = threshold(probability)

    def compare(words, out):
        for lane in range(4):
            torch.ge(words[lane], limit, out=out[..., lane])

    key_words = dropout_words(DropoutKey(seed, int(step), int(layer), op))
    _fill(mask, starts.repeat(len(samples)), samples.repeat_interleave(len(starts)), key_words, compare)
    return mask.view(len(samples), *(stop - start for start, stop, _ in extents))


def _keep_mask_shape(samples, seed, step, layer, op, bounds, probability, device):
    shape = [stop - start for start, stop in zip(bounds[0::3], bounds[1::3], strict=True)]
    return torch.empty(samples.shape[0], *shape, dtype=torch.bool, device=device)


_library = torch.library.Library("megalm", "FRAGMENT")
_library.define(
    "keep_mask(Tensor samples, int seed, Tensor step, Tensor layer, int op, SymInt[] bounds, float probability, Device device)"
    " -> Tensor"
)
_library.impl("keep_mask", _keep_mask, "CompositeExplicitAutograd")
torch.library.register_fake("megalm::keep_mask", _keep_mask_shape, lib=_library)


def normal(seed: int, name: str, full_shape: Sequence[int], dim: int | None, start: int, stop: int, std: float,
           dtype: torch.dtype = torch.float32, device=None) -> Tensor:
    """Slice [start, stop) along dim (dim None: the whole tensor) of a N(0, std**2) tensor that depends on (seed, name) alone.

    Values are made by the Box-Muller transform in float64 and rounded to dtype. Only the slice is computed, in chunks.
    Raises ValueError for a slice outside full_shape.
    """
    extents = [(0, size, size) for size in full_shape]
    if dim is not None:
        if not 0 <= start <= stop <= full_shape[dim]:
            raise ValueError(f"{name}: slice [{start}, {stop}) of dim {dim} is outside the shape {tuple(full_shape)}")
        extents[dim] = (start, stop, full_shape[dim])
    digest = hashlib.sha256(f"megalm.normal:{seed}:{name}".encode()).digest()
    key_words = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    starts, length = _runs(extents)
    out = torch.empty(len(starts), length, dtype=dtype, device=device)

    def box_muller(words, values):
        for lane in (0, 2):
            # (word + 1) / 2**32 is in (0, 1], so that its logarithm is finite.
            radius = words[lane].double().add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_().mul_(std)
            angle = words[lane + 1].double().mul_(2.0 * math.pi * 2.0**-32)
            values[..., lane] = radius * torch.cos(angle)
            values[..., lane + 1] = radius.mul_(angle.sin_())

    _fill(out, starts, torch.zeros(len(starts), dtype=torch.int64, device=device), key_words, box_muller)
    return out.view([stop - start for start, stop, _ in extents])


def _runs(extents: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Places of the slice as contiguous runs of equal length: (first places int64 [r], length)."""
    merged = [(0, 1, 1)]
    for start, stop, full in extents:
        if start == 0 and stop == full:   # a whole dim makes the run before it longer
            low, high, size = merged[-1]
            merged[-1] = (low * full, high * full, size * full)
        else:
            merged.append((start, stop, full))
    places = torch.zeros(1, dtype=torch.int64)
    for start, stop, full in merged[:-1]:
        places = (places[:, None] * full + torch.arange(start, stop)).flatten()
    start, stop, full = merged[-1]
    return places * full + start, stop - start


def _fill(out: Tensor, starts: Tensor, samples: Tensor, key_words: tuple[int, int], transform: Callable) -> None:
    """Fill out [r, length]: row i holds the elements at places starts[i] .. starts[i] + length of sample samples[i].

    starts is on the CPU, so that its phases are known without waiting for a device; samples are where out is.
    transform(words, values) turns four word tensors [n, c] into values [n, c, 4] of out's dtype.
    """
    if out.numel() == 0:
        return
    phases = starts % 4   # where in its first block a run begins
    distinct = torch.unique(phases).tolist() if len(starts) > 1 else [int(phases)]
    if len(distinct) == 1:
        _fill_rows(out, starts // 4, samples, distinct[0], key_words, transform)
        return
    for phase in distinct:
        rows = (phases == phase).nonzero().flatten()
        part = torch.empty(len(rows), out.shape[1], dtype=out.dtype, device=out.device)
        here = rows.to(out.device)
        _fill_rows(part, starts[rows] // 4, samples[here], phase, key_words, transform)
        out[here] = part


def _fill_rows(out: Tensor, first: Tensor, samples: Tensor, phase: int, key_words: tuple[int, int], transform: Callable) -> None:
    """_fill for rows that all begin at word `phase` of their block first[i]."""
    length = out.shape[1]
    for rows, columns, words in _blocks(first.to(out.device), samples, (phase + length + 3) // 4, key_words):
        values = torch.empty(*words[0].shape, 4, dtype=out.dtype, device=out.device)
        transform(words, values)
        values = values.flatten(1)                                            # [n, c, 4] -> [n, 4c]
        low, high = 4 * columns.start - phase, 4 * columns.stop - phase       # columns of out that these blocks cover
        out[rows, max(0, low):min(high, length)] = values[:, max(0, -low):values.shape[1] - max(0, high - length)]


def _blocks(first: Tensor, samples: Tensor, count: int, key_words: tuple[int, int]) -> Iterator[tuple[slice, slice, tuple]]:
    """Random words of blocks first[i] .. first[i] + count of each row i, a chunk at a time: (rows, columns, four [n, c])."""
    on_cpu = first.device.type == "cpu"
    chunk = _CHUNK_CPU if on_cpu else _CHUNK_DEVICE
    height, width = max(1, chunk // count), min(count, chunk)
    for top in range(0, len(first), height):
        rows = slice(top, min(top + height, len(first)))
        sample = samples[rows, None]
        for left in range(0, count, width):
            columns = slice(left, min(left + width, count))
            block = first[rows, None] + torch.arange(columns.start, columns.stop, device=first.device)
            if on_cpu:
                words = np.empty((4, *block.shape), dtype=np.int64)
                words[0], words[1] = (block & WORD).numpy(), (block >> 32).numpy()
                words[2], words[3] = (sample & WORD).numpy(), ((sample >> 32) & WORD).numpy()
                words = tuple(torch.from_numpy(word) for word in _philox_numpy(*words, *key_words))
            else:
                words = philox4x32(block & WORD, block >> 32, sample & WORD, (sample >> 32) & WORD, *key_words)
            yield rows, columns, words
