"""Mixtures of data sets: nothing out of range, epochs counted, and what the order depends on."""
from __future__ import annotations

import numpy as np
import pytest

from megalm.data.blend import Share, Source, build_dataset, told
from megalm.data.errors import DataError
from tests.data.helpers import numbered


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


def test_all_data_sets_share_one_memory(tmp_path, monkeypatch):
    """What is remembered doesn't grow with their number, and what is forgotten is looked up again."""
    sources = make_sources(tmp_path)
    right = build_dataset(sources, 10, 200, 3, None)
    monkeypatch.setattr("megalm.data.samples.BLOCKS", 2)
    dataset = build_dataset(sources, 10, 200, 3, None)
    assert all((dataset.tokens(i) == right.tokens(i)).all() for i in range(200))
    [memory] = {part._block.func for part in dataset.parts}
    assert memory.cache_info().currsize == 2


def test_bad_sources(tmp_path):
    with pytest.raises(DataError, match="no data set is named"):
        build_dataset([], 10, 10, 1, None)
    source = make_sources(tmp_path)[0]
    with pytest.raises(DataError, match="is named 2 times"):
        build_dataset([source, source], 10, 10, 1, None)
    with pytest.raises(DataError, match="is named 2 times"):
        build_dataset([source, Source(f"{tmp_path}/./a")], 10, 10, 1, None)
    with pytest.raises(DataError, match="no data set at .*one.*; no data set at .*two"):
        build_dataset([source, Source(str(tmp_path / "one")), Source(str(tmp_path / "two"))], 10, 10, 1, None)


def test_a_data_set_that_gives_nothing(tmp_path):
    sources = make_sources(tmp_path)
    dataset = build_dataset([sources[0], Source(sources[1].path, 1e-4)], 10, 5, 1, None)
    assert [share.samples for share in dataset.shares] == [5, 0]


def test_what_is_told_of_many():
    shares = [Share(f"d{k}", 1 / 30, 10 * k, k / 7) for k in range(30)]
    assert told(shares[:20]) == [str(share) for share in shares[:20]]
    lines = told(shares)
    assert len(lines) == 20 and lines[0].startswith("d29 gives 290 samples (3.3% of the blend), 4.14 epochs")
    assert lines[-1] == "11 other data sets give 550 samples, 0.00 to 1.43 epochs each"


def test_what_a_part_of_the_run_takes(tmp_path):
    dataset = build_dataset(make_sources(tmp_path), 10, 1000, 3, None)
    assert dataset.taken(1000) == list(dataset.shares)
    half = dataset.taken(500)
    assert [(share.samples, share.epochs) for share in half] == [
        (250, pytest.approx(2500 / 400)), (150, pytest.approx(1500 / 210)), (100, pytest.approx(1000 / 100))]
    origin = np.array([dataset.locate(i)[0] for i in range(333)])
    assert [share.samples for share in dataset.taken(333)] == np.bincount(origin).tolist()
