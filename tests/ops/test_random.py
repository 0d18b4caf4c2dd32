"""The keyed generator against its published vectors, a scalar definition, and the layout-freedom that parity rests on."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch

from megalm.ops import random
from megalm.ops.random import WORD, DropoutKey, dropout_words, keep_mask, normal, philox4x32, seed_of, threshold

# The three philox4x32-10 lines of kat_vectors in the Random123 distribution: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KEY = DropoutKey(seed=1234, step=7, layer=3, op=random.MLP_OUTPUT)


def words(line: str) -> list[int]:
    return [int(word, 16) for word in line.split()]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_philox_reproduces_published_vectors(counter, key, expected):
    assert list(philox4x32(*words(counter), *words(key))) == words(expected)
    tensors = philox4x32(*(torch.full((5,), word) for word in words(counter)), *words(key))
    assert [word.tolist() for word in tensors] == [[word] * 5 for word in words(expected)]


def test_philox_on_tensors_broadcasts_and_equals_philox_on_ints():
    block, sample = torch.arange(6)[None] + WORD - 3, torch.arange(2)[:, None] + 2**40 + WORD - 1
    counter = (block & WORD, block >> 32, sample & WORD, sample >> 32)
    result = philox4x32(*counter, 99, WORD)
    for row, column in itertools.product(range(2), range(6)):
        place, number = int(block[0, column]), int(sample[row, 0])
        scalar = philox4x32(place & WORD, place >> 32, number & WORD, number >> 32, 99, WORD)
        assert tuple(int(word[row, column]) for word in result) == scalar


def scalar_bit(key: DropoutKey, sample: int, place: int, probability: float) -> bool:
    """The definition, one element at a time."""
    k0, k1 = philox4x32(key.step & WORD, key.step >> 32, key.layer, key.op, key.seed & WORD, key.seed >> 32)[:2]
    block = place // 4
    return philox4x32(block & WORD, block >> 32, sample & WORD, sample >> 32, k0, k1)[place % 4] >= round(probability * 2**32)


EXTENTS = [
    [(0, 3, 3), (0, 8, 8)],
    [(1, 3, 4), (0, 8, 8)],
    [(0, 3, 3), (0, 5, 5)],
    [(2, 5, 7), (0, 5, 5)],
    [(1, 4, 7), (2, 5, 6)],
    [(0, 2, 2), (1, 3, 4), (0, 3, 3)],
    [(1, 2, 3), (0, 4, 4), (3, 7, 11)],
    [(5, 9, 12)],
    [(2, 2, 4), (0, 4, 4)],
]


@pytest.mark.parametrize("extents", EXTENTS)
def test_mask_is_the_scalar_definition(extents):
    samples = torch.tensor([5, 2**33 + 1])
    mask = keep_mask(KEY, samples, extents, 0.3)
    assert mask.dtype == torch.bool and mask.shape == (2, *(stop - start for start, stop, _ in extents))
    for row, sample in enumerate(samples.tolist()):
        for index in itertools.product(*(range(start, stop) for start, stop, _ in extents)):
            place = 0
            for position, (_, _, full) in zip(index, extents, strict=True):
                place = place * full + position
            local = tuple(position - start for position, (start, _, _) in zip(index, extents, strict=True))
            assert bool(mask[(row, *local)]) == scalar_bit(KEY, sample, place, 0.3)


def test_a_slice_of_the_mask_is_the_mask_of_the_slice():
    full = keep_mask(KEY, torch.arange(4), [(0, 9, 9), (0, 12, 12), (0, 33, 33)], 0.2)
    part = keep_mask(KEY, torch.tensor([2, 1]), [(4, 9, 9), (3, 10, 12), (7, 32, 33)], 0.2)
    assert torch.equal(part, full[[2, 1], 4:9, 3:10, 7:32])


def test_large_masks_are_drawn_in_chunks_without_a_seam(monkeypatch):
    extents = [(1, 6, 6), (0, 1001, 1001)]
    whole = keep_mask(KEY, torch.arange(3), extents, 0.5)
    monkeypatch.setattr(random, "_CHUNK_CPU", 100)
    assert torch.equal(keep_mask(KEY, torch.arange(3), extents, 0.5), whole)


@pytest.mark.parametrize("other", [
    KEY._replace(seed=1235), KEY._replace(seed=1234 + 2**32), KEY._replace(step=8), KEY._replace(step=7 + 2**32),
    KEY._replace(layer=4), KEY._replace(op=random.ATTENTION_OUTPUT),
])
def test_every_part_of_the_key_changes_the_mask(other):
    extents, samples = [(0, 4096, 4096)], torch.arange(1)
    same = (keep_mask(KEY, samples, extents, 0.5) == keep_mask(other, samples, extents, 0.5)).float().mean()
    assert abs(same - 0.5) < 0.05
    assert seed_of(other) != seed_of(KEY) and 0 <= seed_of(other) < 2**63


def test_the_generic_rounds_of_other_devices_give_the_same_words():
    tensors = [torch.arange(50) * 977 & WORD for _ in range(4)]

    class Elsewhere(torch.Tensor):   # not the numpy path: device.type is asked
        device = torch.device("meta")

    generic = philox4x32(*(tensor.as_subclass(Elsewhere) for tensor in tensors), 12, 34)
    for got, expected in zip(generic, philox4x32(*tensors, 12, 34), strict=True):
        assert torch.equal(got.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_the_share_kept_is_right(probability):
    mask = keep_mask(KEY, torch.arange(8), [(0, 25_000, 25_000)], probability)
    n = mask.numel()
    assert abs(mask.float().mean() - (1 - probability)) <= 5 * math.sqrt(probability * (1 - probability) / n)
    assert threshold(probability) == round(probability * 2**32)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 5, 4\)"):
        keep_mask(KEY, torch.arange(1), [(3, 5, 4)], 0.1)
    for probability in (-0.1, 1.0):
        with pytest.raises(ValueError, match="probability"):
            keep_mask(KEY, torch.arange(1), [(0, 4, 4)], probability)
    with pytest.raises(ValueError, match=r"embedding.*\[2, 9\)"):
        normal(1, "embedding", (8, 4), 0, 2, 9, 1.0)


def test_mask_under_torch_compile_is_one_opaque_call():
    traced = KEY._replace(step=torch.tensor(KEY.step), layer=torch.tensor(KEY.layer))
    torch.library.opcheck(torch.ops.megalm.keep_mask, (torch.arange(3), *traced, [0, 3, 3, 1, 5, 8], 0.25, torch.device("cpu")))

    def masked(samples, step):
        return keep_mask(KEY._replace(step=step), samples, [(0, 3, 3), (1, 5, 8)], 0.25)

    compiled = torch.compile(masked, backend="eager", fullgraph=True)
    for step in (0, 1, 2):
        assert torch.equal(compiled(torch.arange(3), step), masked(torch.arange(3), step))


SHAPES = [((6, 8), 0), ((6, 8), 1), ((5, 7), 0), ((5, 7), 1), ((9,), 0), ((3, 4, 5), 1), ((4, 3, 6), 2)]


@pytest.mark.parametrize("shape, dim", SHAPES)
def test_slices_of_a_normal_are_slices_of_the_whole(shape, dim):
    whole = normal(1, "layers.0.mlp.up.weight", shape, None, 0, 0, 0.02)
    for start, stop in itertools.combinations(range(shape[dim] + 1), 2):
        part = normal(1, "layers.0.mlp.up.weight", shape, dim, start, stop, 0.02)
        assert torch.equal(part, whole.narrow(dim, start, stop - start))


def test_normal_is_box_muller_of_the_words():
    values = normal(3, "a", (2, 6), None, 0, 0, 0.5, dtype=torch.float64).flatten()
    digest = hashlib.sha256(b"megalm.normal:3:a").digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    for place in range(12):
        lanes = philox4x32(place // 4, 0, 0, 0, *key)
        lane = place % 4 // 2 * 2
        radius, angle = math.sqrt(-2 * math.log((lanes[lane] + 1) / 2**32)), 2 * math.pi * lanes[lane + 1] / 2**32
        expected = 0.5 * radius * (math.cos(angle) if place % 2 == 0 else math.sin(angle))
        assert math.isclose(values[place], expected, rel_tol=1e-12)


def test_normal_has_the_moments_and_quantiles_of_a_normal():
    values = normal(1, "embedding.word.weight", (500, 1000), None, 0, 0, 2.0, dtype=torch.float64).flatten() / 2.0
    n = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for quantile in (-3.0, -1.0, 0.0, 0.5, 2.0):
        share = 0.5 * (1 + math.erf(quantile / math.sqrt(2)))
        assert abs((values < quantile).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    pairs = values.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 / math.sqrt(n / 2)


def test_normals_of_other_names_seeds_and_dtypes():
    base = normal(1, "a", (64, 64), None, 0, 0, 1.0)
    for other in (normal(2, "a", (64, 64), None, 0, 0, 1.0), normal(1, "b", (64, 64), None, 0, 0, 1.0)):
        assert abs((base * other).mean()) < 5 / 64
    exact = normal(1, "a", (64, 64), None, 0, 0, 1.0, dtype=torch.float64)
    assert torch.equal(exact.float(), base)
    assert torch.equal(exact.bfloat16(), normal(1, "a", (64, 64), None, 0, 0, 1.0, dtype=torch.bfloat16))


def test_large_normals_are_drawn_in_chunks_without_a_seam(monkeypatch):
    whole = normal(1, "a", (7, 1001), None, 0, 0, 1.0)
    monkeypatch.setattr(random, "_CHUNK_CPU", 64)
    assert torch.equal(normal(1, "a", (7, 1001), None, 0, 0, 1.0), whole)
    assert torch.equal(normal(1, "a", (7, 1001), 1, 500, 900, 1.0), whole[:, 500:900])


def test_key_words_are_the_documented_ones():
    assert dropout_words(KEY) == tuple(philox4x32(7, 0, 3, 3, 1234, 0)[:2])
