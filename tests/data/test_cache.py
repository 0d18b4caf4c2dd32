"""The index cache: hits, every kind of damage, a key that changes with its inputs, publication, and the choice of the folder."""
from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from megalm.data.cache import cache_folder, cached
from megalm.data.errors import DataError
from megalm.data.samples import PackedSamples
from tests.data.helpers import numbered

ARRAYS = {"a": np.arange(1000, dtype=np.int32), "b": np.arange(6.0).reshape(2, 3), "none": np.zeros((0, 2), np.uint32)}


class Builds:
    """A builder that counts its calls."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return ARRAYS


def same(arrays):
    return arrays.keys() == ARRAYS.keys() and all(
        arrays[k].dtype == ARRAYS[k].dtype and np.array_equal(arrays[k], ARRAYS[k]) for k in ARRAYS)


def only_file(folder):
    [path] = folder.iterdir()
    return path


def test_built_once_and_mapped(tmp_path):
    build = Builds()
    assert same(cached(tmp_path, "x", {"k": 1}, build)) and build.count == 1
    arrays = cached(tmp_path, "x", {"k": 1}, build)
    assert same(arrays) and build.count == 1
    assert not arrays["a"].flags.writeable and not arrays["a"].flags.owndata
    assert all(array.ctypes.data % 8 == 0 for array in arrays.values())
    assert only_file(tmp_path).stat().st_mode & 0o044 == 0o044  # others may read it


def test_without_a_folder(tmp_path):
    assert same(cached(None, "x", {}, Builds()))


def test_another_description_is_another_file(tmp_path):
    build = Builds()
    cached(tmp_path, "x", {"k": 1}, build)
    cached(tmp_path, "x", {"k": 2}, build)
    assert build.count == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_file_of_another_key_is_no_hit(tmp_path):
    build = Builds()
    cached(tmp_path, "x", {"k": 1}, build)
    first = only_file(tmp_path)
    cached(tmp_path, "x", {"k": 2}, build)
    second = next(path for path in tmp_path.iterdir() if path != first)
    os.replace(first, second)
    cached(tmp_path, "x", {"k": 2}, build)
    assert build.count == 3


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:5], lambda raw: raw[:100], lambda raw: raw[:-1], lambda raw: raw[:-64],
    lambda raw: raw + b"\0", lambda raw: b"X" + raw[1:], lambda raw: bytes(len(raw)),
    lambda raw: raw[:8] + b"\xff" * 8 + raw[16:],  # a header longer than the file
    lambda raw: raw.replace(b'"dtype"', b'"dtypo"'),
    lambda raw: raw[:-2100] + bytes([raw[-2100] ^ 1]) + raw[-2099:],  # one bit of an array
])
def test_damage_is_built_again(tmp_path, damage, caplog):
    build = Builds()
    cached(tmp_path, "x", {}, build)
    path = only_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(cached(tmp_path, "x", {}, build)) and build.count == 2
    assert path.read_bytes() == whole and "it is built again" in caplog.text


def test_a_failed_write_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megalm.data.publish.os.fsync", full)
    with pytest.raises(DataError, match="sample index can't be written: No space left on device"):
        cached(tmp_path, "x", {}, Builds())
    assert list(tmp_path.iterdir()) == []


def test_the_file_appears_whole(tmp_path, monkeypatch):
    """Until the rename there is no file of the final name."""
    real, seen = os.replace, []

    def replace(source, target):
        seen.append((target.exists(), os.path.getsize(source)))
        real(source, target)

    monkeypatch.setattr("megalm.data.publish.os.replace", replace)
    cached(tmp_path, "x", {}, Builds())
    assert seen == [(False, only_file(tmp_path).stat().st_size)]


def test_sample_index_follows_the_data(tmp_path):
    """Other lengths, another seed or more epochs: another index. The same lengths elsewhere, or samples of another length: the
    same one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    numbered(tmp_path / "a", [30, 40])
    for change in [(4, 10, 1), (4, 10, 2), (5, 10, 1), (4, 30, 1), (4, 11, 1)]:  # epochs: 1, 1, 1, 2, 1
        PackedSamples(tmp_path / "a", *change, cache)
    assert len(list(cache.iterdir())) == 3
    os.rename(tmp_path / "a.bin", tmp_path / "old.bin")
    os.rename(tmp_path / "a.idx", tmp_path / "old.idx")
    numbered(tmp_path / "a", [40, 30])
    PackedSamples(tmp_path / "a", 4, 10, 1, cache)
    assert len(list(cache.iterdir())) == 4
    (tmp_path / "copy").mkdir()
    numbered(tmp_path / "copy" / "a", [40, 30])
    PackedSamples(tmp_path / "copy" / "a", 4, 10, 1, cache)
    assert len(list(cache.iterdir())) == 4


def test_cache_folder(tmp_path):
    (tmp_path / "data").mkdir()
    assert cache_folder(None, [tmp_path / "data" / "a"], tmp_path / "run") == tmp_path / "data" / "index_cache"
    assert cache_folder(tmp_path / "named" / "deep", [tmp_path / "data" / "a"], tmp_path / "run") == tmp_path / "named" / "deep"
    (tmp_path / "file").write_text("")  # stands for a place that can't be written, also for root
    assert cache_folder(None, [tmp_path / "file" / "a"], tmp_path / "run") == tmp_path / "run" / "index_cache"
    with pytest.raises(DataError, match="data.cache: the sample index can't be written to .*file"):
        cache_folder(tmp_path / "file", [], tmp_path / "run")
