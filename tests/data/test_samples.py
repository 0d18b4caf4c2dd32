"""Packing: against a plain Python stream, over epochs, with samples longer than the data set; and what the order depends on."""
from __future__ import annotations

import numpy as np
import pytest

from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader, IndexedWriter
from megalm.data.samples import DOCUMENTS, SAMPLES, PackedSamples, build_index, epochs_needed, permutation, samples_in
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


def stream_samples(documents: list[list[int]], seq_length: int, epochs: int, seed: int) -> list[list[int]]:
    """The definition, without arithmetic: lay the epochs end to end, cut, file each sample under the epoch of its last token."""
    filled = [document for document in documents if document]
    stream, epoch_of = [], []
    for epoch in range(epochs):
        for place in permutation(len(filled), seed, epoch, DOCUMENTS):
            stream += filled[place]
            epoch_of += [epoch] * len(filled[place])
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


def test_order_depends_on_seed_and_epoch():
    lengths = np.full(1000, 10)
    index = build_index(lengths, 10, 2, seed=1)
    assert (index["documents"] == build_index(lengths, 10, 2, seed=1)["documents"]).all()
    assert (index["documents"] != build_index(lengths, 10, 2, seed=2)["documents"]).mean() > 0.9
    assert (index["offsets"] < lengths[index["documents"][index["places"]]]).all()  # each starts inside its document
    first, second = index["documents"][:1000], index["documents"][1000:]
    assert sorted(first) == sorted(second) == list(range(1000)) and (first != second).mean() > 0.9


def test_permutation_is_pinned():
    """The order in which a run sees its data must not change with a release: these values are part of the format."""
    assert permutation(8, 1234, 0, DOCUMENTS).tolist() == [3, 5, 2, 1, 7, 4, 6, 0]
    assert permutation(8, 1234, 1, SAMPLES).tolist() == [0, 7, 2, 3, 4, 5, 6, 1]
    assert permutation(8, 2**40 + 1234, 0, DOCUMENTS).tolist() != permutation(8, 1234, 0, DOCUMENTS).tolist()


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
