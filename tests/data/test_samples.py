"""Packing: against a plain Python stream, over epochs, with samples longer than the data set; and what the order depends on."""
from __future__ import annotations

import itertools

import numpy as np
import pytest

from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader, IndexedWriter
from megalm.data.permutation import Permutation
from megalm.data.samples import DOCUMENTS, SAMPLES, STRIDE, PackedSamples, build_index, epochs_needed, samples_in
from tests.data.helpers import numbered, write

SHAPES = {
    "usual": ([5, 17, 1, 40, 8, 29], 16),
    "empty documents": ([0, 5, 0, 0, 17, 1, 0], 4),
    "one document": ([100], 7),
    "one token": ([1], 3),
    "sample longer than the data set": ([3, 4], 32),
    "exact multiple": ([8, 8, 8], 8),
    "seq_length 1": ([2, 3, 1], 1),
}


def permutation(count: int, seed: int, epoch: int, what: int) -> list[int]:
    return Permutation(count, seed, epoch, what).item_at(np.arange(count)).tolist()


def stream_samples(documents: list[list[int]], seq_length: int, epochs: int, seed: int) -> list[list[int]]:
    """The definition, without arithmetic: lay the epochs end to end, cut, file each sample under the epoch of its last token."""
    stream, epoch_of = [], []
    for epoch in range(epochs):
        for place in permutation(len(documents), seed, epoch, DOCUMENTS):
            stream += documents[place]
            epoch_of += [epoch] * len(documents[place])
    by_epoch = [[] for _ in range(epochs)]
    for start in range(0, len(stream) - seq_length, seq_length):
        by_epoch[epoch_of[start + seq_length]].append(stream[start:start + seq_length + 1])
    return [group[place] for epoch, group in enumerate(by_epoch) for place in permutation(len(group), seed, epoch, SAMPLES)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_against_the_plain_stream(tmp_path, shape, epochs):
    lengths, seq_length = SHAPES[shape]
    reader = IndexedReader(numbered(tmp_path / "a", lengths))
    documents = [reader.tokens(i).tolist() for i in range(len(reader))]
    expected = stream_samples(documents, seq_length, epochs, seed=5)
    assert samples_in(epochs, sum(lengths), seq_length) == len(expected)
    if not expected:
        return
    samples = PackedSamples(tmp_path / "a", seq_length, len(expected), 5, None)
    assert [samples.tokens(i).tolist() for i in range(len(expected))] == expected
    assert samples.tokens(0).dtype == np.int64


def test_an_epoch_gives_every_token_once(tmp_path):
    """Inputs and labels: each token but the stream's first is a label exactly once an epoch."""
    numbered(tmp_path / "a", [5, 17, 1, 40, 8, 30])  # 101 tokens: 10 samples of 10, and the 1 that begins the stream
    samples = PackedSamples(tmp_path / "a", 10, 10, 1, None)
    labels = np.concatenate([samples.tokens(i)[1:] for i in range(10)])
    assert len(np.unique(labels)) == 100 and samples.epochs == pytest.approx(100 / 101)


def test_least_epochs():
    for total in range(1, 30):
        for seq_length in range(1, 12):
            for count in range(1, 12):
                epochs = epochs_needed(total, seq_length, count)
                assert samples_in(epochs, total, seq_length) >= count > samples_in(epochs - 1, total, seq_length)


def test_more_samples_only_append(tmp_path):
    numbered(tmp_path / "a", [5, 17, 1, 40, 8, 29])
    short = PackedSamples(tmp_path / "a", 16, 4, 9, None)
    long = PackedSamples(tmp_path / "a", 16, 300, 9, None)
    assert all((short.tokens(i) == long.tokens(i)).all() for i in range(4))


@pytest.mark.parametrize("count", [1, STRIDE - 1, STRIDE, STRIDE + 1, 1000])
def test_marks_are_the_tokens_before_a_block(count):
    lengths = np.random.default_rng(count).integers(0, 30, count)
    marks = build_index(count, lengths.__getitem__, 3, seed=1)["marks"]
    assert marks.shape == (3, -(-count // STRIDE)) and marks.dtype == np.int64
    for epoch in range(3):
        before = np.cumsum([0, *lengths[permutation(count, 1, epoch, DOCUMENTS)]])
        assert (marks[epoch] == before[:-1:STRIDE]).all()


def test_order_depends_on_seed_and_epoch():
    keys = itertools.product((1, 2, 2**40 + 1), (0, 1), (DOCUMENTS, SAMPLES))
    orders = [permutation(1000, *key) for key in keys]
    for i, order in enumerate(orders):
        assert all(np.mean(np.array(order) != other) > 0.9 for other in orders[:i])


def test_an_epoch_is_spread_evenly(tmp_path):
    """What a run reads first is of the whole data set: over 40 seeds, which of 20 stretches of the data the first tenth of the
    samples begins in, by chi-squared (19 degrees of freedom, 6 standard deviations)."""
    numbered(tmp_path / "a", [50] * 400)
    counts = np.zeros(20)
    for seed in range(40):
        samples = PackedSamples(tmp_path / "a", 20, 99, seed, None)
        counts += np.bincount([samples.tokens(i)[0] // 1000 for i in range(99)], minlength=20)
    assert ((counts - 198) ** 2 / 198).sum() < 19 + 6 * (2 * 19) ** 0.5


def test_both_shuffles_happen(tmp_path):
    """Samples of long documents aren't read in order, and documents shorter than a sample don't keep their neighbours."""
    numbered(tmp_path / "long", [1000])
    long = PackedSamples(tmp_path / "long", 10, 99, 1, None)
    starts = np.array([long.tokens(i)[0] for i in range(99)])
    assert (np.diff(starts) == 10).mean() < 0.2
    numbered(tmp_path / "short", [5] * 200)
    short = PackedSamples(tmp_path / "short", 10, 99, 1, None)
    jumps = np.concatenate([np.diff(short.tokens(i)) for i in range(99)])
    assert (jumps != 1).mean() > 0.15


def test_documents_of_several_sequences_stay_whole(tmp_path):
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        for first in range(0, 300, 30):
            writer.add_document(np.arange(first, first + 30), [10, 20])
    samples = PackedSamples(tmp_path / "a", 10, 29, 1, None)
    tokens = np.stack([samples.tokens(i) for i in range(29)])
    breaks = tokens[:, :-1][tokens[:, 1:] != tokens[:, :-1] + 1]
    assert len(breaks) and (breaks % 30 == 29).all()


def breaks(tokens: np.ndarray) -> list[int]:
    """Where a sample of numbered documents jumps, by its tokens alone."""
    return [0, *(np.flatnonzero(np.diff(tokens) != 1) + 1).tolist()]


def test_document_starts_are_where_the_tokens_say(tmp_path):
    """Documents of every length, empty ones too, over two epochs; each has its own numbers, not following its neighbour's."""
    lengths, first = [1, 7, 0, 30, 2, 100, 1, 0, 12, 5], 0
    documents = []
    for length in lengths:
        documents.append(np.arange(first, first + length))
        first += length + 1
    samples = PackedSamples(write(tmp_path / "a", documents, np.int32), 20, 15, 3, None)
    expected = [breaks(samples.tokens(i)[:-1]) for i in range(15)]
    samples.reader = None  # no token can be read any more
    found = [samples.document_starts(i) for i in range(15)]
    assert [starts.tolist() for starts in found] == expected and max(map(len, found)) > 4
    assert all(starts.dtype == np.int32 for starts in found)
    with pytest.raises(IndexError, match="sample 15 of .* built for 15"):
        samples.document_starts(15)


def test_a_document_that_follows_itself_is_another_one(tmp_path):
    """The only document of a data set, epoch after epoch: its own start is a boundary, though nothing but the index says so."""
    samples = PackedSamples(write(tmp_path / "a", [[5] * 6]), 10, 9, 1, None)
    for i in range(9):
        starts = samples.document_starts(i).tolist()
        assert 1 <= starts[1] <= 6 and starts == [0, *range(starts[1], 10, 6)]


def test_out_of_range_and_empty(tmp_path):
    samples = PackedSamples(numbered(tmp_path / "a", [10, 10]), 4, 3, 1, None)
    with pytest.raises(IndexError, match="sample 3 of .* built for 3"):
        samples.tokens(3)
    with pytest.raises(DataError, match="holds no tokens: 2 documents, all empty"):
        PackedSamples(write(tmp_path / "b", [[], []]), 4, 3, 1, None)
    with pytest.raises(ValueError, match="seq_length is 0"):
        PackedSamples(tmp_path / "a", 0, 3, 1, None)
