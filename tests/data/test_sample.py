"""The sample: the same in every order, exactly the least keys that reach the limit, and even."""
from __future__ import annotations

import random

import pytest

from megalm.data.sample import Sample, key, share_of

TEXTS = [f"text {number} ".encode() * (number % 7 + 1) for number in range(500)]


def sampled(texts, **limits) -> list[str]:
    sample = Sample(7, **limits)
    for text in texts:
        sample.offer(text)
    return list(sample)


@pytest.mark.parametrize("limits", [{}, {"most_bytes": 5000}, {"most_documents": 40}, {"most_bytes": 5000, "most_documents": 40},
                                    {"most_bytes": 1}])
def test_the_order_does_not_matter(limits):
    expected, shuffled = sampled(TEXTS, **limits), list(TEXTS)
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert sampled(shuffled, **limits) == expected


def test_the_least_keys_that_reach_the_limit():
    ordered = sorted(TEXTS, key=lambda text: key(text, 7))
    taken = sampled(TEXTS, most_bytes=5000)
    assert [text.encode() for text in taken] == ordered[:len(taken)]
    assert sum(map(len, taken)) >= 5000 > sum(map(len, taken[:-1]))
    assert sampled(TEXTS, most_documents=40) == [text.decode() for text in ordered[:40]]
    assert len(sampled(TEXTS)) == 500 and len(sampled(TEXTS, most_bytes=10**9)) == 500


def test_memory_is_the_sample():
    sample = Sample(1, most_bytes=5000)
    for text in TEXTS:
        sample.offer(text)
        assert sample.bytes < 5000 + max(map(len, TEXTS))
    assert (sample.offered, sample.offered_bytes) == (500, sum(map(len, TEXTS)))


def test_a_longer_sample_begins_with_a_shorter_one():
    assert sampled(TEXTS, most_bytes=9000)[:20] == sampled(TEXTS, most_documents=20)


def test_shares_are_even_and_independent_of_keys():
    texts = [str(number).encode() for number in range(4000)]
    shares = [share_of(text, 3) for text in texts]
    assert abs(sum(shares) / 4000 - 0.5) < 5 * (1 / 12 / 4000) ** 0.5
    low_keys = [share for text, share in zip(texts, shares, strict=True) if key(text, 3) < 2**127]
    assert abs(sum(low_keys) / len(low_keys) - 0.5) < 5 * (1 / 12 / len(low_keys)) ** 0.5
    assert share_of(b"a", 1) != share_of(b"a", 2)
