"""Mixtures: shares to within a sample at every prefix, nothing out of range, epochs counted, and what the order depends on."""
from __future__ import annotations

import numpy as np
import pytest

from megalm.data.blend import LIMIT, Blend, Source, build_dataset, integer_weights, schedule
from megalm.data.errors import DataError
from tests.data.helpers import numbered


def worst_deviation(chosen: np.ndarray, weights) -> float:
    """The largest |samples given - share| of any data set after any prefix."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    given = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    return np.abs(given - np.arange(1, len(chosen) + 1)[:, None] * shares).max()


@pytest.mark.parametrize("weights", [
    [1], [0.7, 0.3], [0.5, 0.25, 0.25], [1, 1, 1], [3, 1, 1, 1, 1, 1, 1, 1], [0.9, 0.05, 0.03, 0.02], [1e-3, 1], [1 / 3, 2 / 3],
    [12345678, 87654321, 5555],
])
def test_shares_hold_at_every_prefix(weights):
    blend = Blend(weights, 5000)
    chosen = np.array([blend.locate(i)[0] for i in range(5000)])
    assert worst_deviation(chosen, weights) < 1 + 5000 / LIMIT


@pytest.mark.parametrize("seed", range(5))
def test_shares_hold_for_many_random_data_sets(seed):
    random = np.random.default_rng(seed)
    weights = random.lognormal(0, 2, [5, 20, 100, 300, 1000][seed]).tolist()
    blend = Blend(weights, 10_000)
    chosen = np.array([blend.locate(i)[0] for i in range(10_000)])
    assert worst_deviation(chosen, integer_weights(weights)) < 1
    assert np.abs(np.bincount(chosen, minlength=len(weights)) / 10_000 - np.array(weights) / sum(weights)).max() < 1e-3


def test_giving_to_the_one_furthest_behind_would_not_hold_the_bound():
    """Why the schedule isn't the simple greedy: here that one is 1.13 samples off, and ours less than one."""
    weights = [915, 585, 261, 130, 74, 39, 18, 7, 5]
    shares, given, greedy = np.array(weights) / sum(weights), np.zeros(9), []
    for n in range(1, 401):
        greedy.append(int(np.argmax(shares * n - given)))
        given[greedy[-1]] += 1
    assert worst_deviation(np.array(greedy), weights) > 1.1
    assert worst_deviation(schedule(weights, 10_000), weights) < 1


def test_every_data_set_counts_its_own_samples_without_gaps():
    blend = Blend([0.6, 0.3, 0.1], 1234)
    places = [blend.locate(i) for i in range(1234)]
    for k in range(3):
        assert [local for source, local in places if source == k] == list(range(blend.counts()[k]))
    assert blend.counts().sum() == 1234


def test_more_samples_only_append():
    for weights in ([0.6, 0.3, 0.1], [1 / 3, 2 / 3], [1234567, 7654321]):
        short, long = Blend(weights, 100), Blend(weights, 3000)
        assert all(short.locate(i) == long.locate(i) for i in range(100))


def test_integer_weights():
    assert integer_weights([0.7, 0.3]) == [7, 3] and integer_weights([5]) == [1] and integer_weights([2, 4, 6]) == [1, 2, 3]
    rounded = integer_weights([1e-9, 1.0])
    assert rounded[0] == 1 and sum(rounded) == pytest.approx(LIMIT, abs=2)
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a positive number"):
            integer_weights([1, bad])


def make_sources(folder):
    """Three data sets whose tokens tell them apart: from 0, 10000 and 20000 on."""
    numbered(folder / "a", [40] * 10)
    numbered(folder / "b", [7] * 30, start=10_000)
    numbered(folder / "c", [100], start=20_000)
    return [Source(str(folder / "a"), 0.5), Source(str(folder / "b"), 0.3), Source(str(folder / "c"), 0.2)]


def test_small_data_sets_never_run_out(tmp_path):
    """A thousand samples from data sets of ten to forty each: every sample can be read, and the epochs add up."""
    dataset = build_dataset(make_sources(tmp_path), 10, 1000, 3, tmp_path / "cache")
    origin = np.array([dataset.tokens(i)[0] // 10_000 for i in range(1000)])
    assert np.bincount(origin).tolist() == [500, 300, 200]
    assert [(share.samples, share.epochs) for share in dataset.shares] == [
        (500, pytest.approx(5000 / 400)), (300, pytest.approx(3000 / 210)), (200, pytest.approx(2000 / 100))]
    assert [share.weight for share in dataset.shares] == pytest.approx([0.5, 0.3, 0.2])
    with pytest.raises(IndexError, match="sample 1000 of 1000"):
        dataset.tokens(1000)
    with pytest.raises(IndexError):
        dataset.tokens(-1)


def test_order_depends_on_seed_alone(tmp_path):
    sources = make_sources(tmp_path)
    first, cached, memory = (build_dataset(sources, 10, 200, 3, cache) for cache in (tmp_path / "x", tmp_path / "x", None))
    other, longer = build_dataset(sources, 10, 200, 4, None), build_dataset(sources, 10, 900, 3, None)
    read = [np.stack([dataset.tokens(i) for i in range(200)]) for dataset in (first, cached, memory, longer, other)]
    assert all((tokens == read[0]).all() for tokens in read[1:4]) and (read[4] != read[0]).any()


def test_bad_sources(tmp_path):
    with pytest.raises(DataError, match="no data set is named"):
        build_dataset([], 10, 10, 1, None)
    source = make_sources(tmp_path)[0]
    with pytest.raises(DataError, match="is named 2 times"):
        build_dataset([source, source], 10, 10, 1, None)
    with pytest.raises(DataError, match="no data set at .*one.*; no data set at .*two"):
        build_dataset([source, Source(str(tmp_path / "one")), Source(str(tmp_path / "two"))], 10, 10, 1, None)


def test_a_data_set_that_gives_nothing(tmp_path):
    sources = make_sources(tmp_path)
    dataset = build_dataset([sources[0], Source(sources[1].path, 1e-4)], 10, 5, 1, None)
    assert [share.samples for share in dataset.shares] == [5, 0]
