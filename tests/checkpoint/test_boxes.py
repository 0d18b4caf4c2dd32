"""Ranges as boxes, against the same question asked of every element."""
from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch

from megalm.checkpoint import boxes


@dataclass(frozen=True)
class Span:
    full_shape: tuple[int, ...]
    dim: int | None
    low: int
    high: int
    start: int
    count: int


def random_span(rng: random.Random, shape: tuple[int, ...]) -> Span:
    dim = rng.choice([None, *range(len(shape))])
    low, high = 0, shape[0]
    if dim is not None:
        low = rng.randrange(shape[dim])
        high = rng.randint(low + 1, shape[dim])
    size = math.prod(boxes.slab_shape(Span(shape, dim, low, high, 0, 1)))
    start = rng.randrange(size)
    return Span(shape, dim, low, high, start, rng.randint(1, size - start))


def places(span: Span) -> torch.Tensor:
    """The places in the flattened full tensor of the span's elements, in order."""
    full = torch.arange(math.prod(span.full_shape)).view(span.full_shape)
    slab = full if span.dim is None else full.narrow(span.dim, span.low, span.high - span.low)
    return slab.reshape(-1)[span.start: span.start + span.count].clone()


@pytest.mark.parametrize("seed", range(60))
def test_boxes_hold_exactly_the_elements_of_the_span(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))
    span = random_span(rng, shape)
    full = torch.arange(math.prod(shape)).view(shape)
    found = torch.cat([full[tuple(slice(*extent) for extent in box)].reshape(-1) for box in boxes.boxes(span)])
    assert torch.equal(found, places(span))
    assert len(boxes.boxes(span)) <= 2 * len(shape) - 1


@pytest.mark.parametrize("seed", range(60))
def test_a_common_box_is_a_strided_view_of_both(seed):
    rng = random.Random(1000 + seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
    one, other = random_span(rng, shape), random_span(rng, shape)
    mine, theirs = places(one), places(other)
    common = 0
    for a in boxes.boxes(one):
        for b in boxes.boxes(other):
            box = boxes.intersect(a, b)
            if box is not None:
                views = []
                for span, held in ((one, mine), (other, theirs)):
                    sizes, strides, first, length = boxes.strides_in(span, box)
                    views.append(held[first: first + length].as_strided(sizes, strides, first))
                assert torch.equal(*views)
                common += boxes.size(box)
    assert common == len(set(mine.tolist()) & set(theirs.tolist()))


def tiles(shape, dim, edges, cuts) -> list[Span]:
    """Slabs between the edges, each cut into pieces at the same shares of its size."""
    found = []
    for low, high in zip(edges, edges[1:], strict=False):
        size = math.prod(boxes.slab_shape(Span(shape, dim, low, high, 0, 1)))
        ends = [0, *(int(size * cut) for cut in cuts), size]
        found += [Span(shape, dim, low, high, a, b - a) for a, b in zip(ends, ends[1:], strict=False) if b > a]
    return found


def test_a_complete_set_of_spans_is_accepted():
    assert boxes.untiled(tiles((6, 4), 0, [0, 1, 6], [0.3])) is None
    assert boxes.untiled(tiles((6, 4), 1, [0, 2, 4], [0.1, 0.5])) is None
    assert boxes.untiled(tiles((6, 4), None, [0, 6], [0.1, 0.5])) is None


def test_gaps_and_doubles_are_named():
    assert boxes.untiled([]) == "nothing of it is stored"
    assert boxes.untiled(tiles((6, 4), 0, [0, 2, 5], [])) == "5..6 along dim 0 is missing"
    assert boxes.untiled(tiles((6, 4), 0, [2, 6], [])) == "0..2 along dim 0 is missing"
    assert boxes.untiled(tiles((6, 4), 1, [0, 3], []) + tiles((6, 4), 1, [2, 4], [])) == "2..3 along dim 1 is stored twice"
    whole = tiles((6, 4), None, [0, 6], [0.5])
    assert boxes.untiled(whole[:1]) == "elements 12..24 are missing"
    assert boxes.untiled(whole[1:]) == "elements 0..12 are missing"
    assert boxes.untiled([*whole, whole[1]]) == "elements 12..24 are stored twice"
    slabs = tiles((6, 4), 0, [0, 3, 6], [0.5])
    assert boxes.untiled(slabs[:-1]) == "elements 6..12 are missing of 3..6 along dim 0"
    assert "more than one" in boxes.untiled([Span((6, 4), 0, 0, 6, 0, 24), Span((6, 4), None, 0, 6, 0, 24)])


@pytest.mark.parametrize("span, problem", [
    (Span((6, 4), 2, 0, 1, 0, 1), "dim 2 of a tensor of 2 dims"), (Span((6, 4), 0, 3, 3, 0, 1), "range 3..3 of 6"),
    (Span((6, 4), 0, 0, 7, 0, 1), "range 0..7 of 6"), (Span((6, 4), 0, 0, 3, 10, 3), "elements 10..13 of a slab of 12"),
    (Span((6, 4), None, 0, 6, -1, 3), "elements -1..2"), (Span((6, 4), None, 0, 6, 0, 0), "elements 0..0"),
    (Span((0, 4), None, 0, 0, 0, 1), "no elements")])
def test_impossible_spans_have_a_fault(span, problem):
    assert problem in boxes.fault(span)


def test_possible_spans_have_none():
    rng = random.Random(3)
    assert all(boxes.fault(random_span(rng, (5, 3, 2))) is None for _ in range(100))
