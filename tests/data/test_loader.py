"""The loader: what it delivers, in which order, and how it stops, seeks and fails."""
from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from megalm.data.blend import Source, build_dataset
from megalm.data.errors import DataError
from megalm.data.loader import IGNORED, Loader
from tests.data.helpers import numbered, write

EOD = 99
OPTIONS = {"global_batch": 8, "micro_batch": 2, "dp": 2, "dp_rank": 1, "needs_tokens": True, "eod": None, "mask_eod": False}


@pytest.fixture
def dataset(tmp_path):
    return build_dataset([Source(str(numbered(tmp_path / "a", [50] * 10)))], 12, 40, 1, None)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "megalm-loader"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert loader_threads() == []


class Broken:
    """A data set whose sample 16 can't be read."""

    num_samples, seq_length = 40, 12

    def tokens(self, index, out):
        if index == 16:
            raise OSError(5, "Input/output error")
        out[:] = index


def test_micro_batches(dataset):
    with Loader(dataset, **OPTIONS) as loader:
        assert list(loader.starts) == [0, 8, 16, 24, 32]
        for first in loader.starts:
            batches = loader.batch(first)
            assert [batch.samples.tolist() for batch in batches] == [[first + 2, first + 3], [first + 6, first + 7]]
            for batch in batches:
                expected = torch.from_numpy(np.stack([dataset.tokens(i) for i in batch.samples.tolist()]))  # [b, s + 1]
                assert torch.equal(batch.tokens, expected[:, :-1]) and torch.equal(batch.labels, expected[:, 1:])
                assert batch.tokens.dtype == batch.labels.dtype == batch.samples.dtype == torch.int64
                assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


@pytest.mark.parametrize("micro_batch, dp", [(8, 1), (1, 8), (2, 2), (4, 1)])
def test_a_step_sees_the_same_samples_under_every_layout(dataset, micro_batch, dp):
    seen = {}
    for rank in range(dp):
        with Loader(dataset, **{**OPTIONS, "micro_batch": micro_batch, "dp": dp, "dp_rank": rank}) as loader:
            for batch in loader.batch(24):
                seen.update(zip(batch.samples.tolist(), batch.tokens.tolist(), strict=True))
    assert seen == {i: dataset.tokens(i)[:-1].tolist() for i in range(24, 32)}


@pytest.mark.parametrize("prefetch", [0, 1, 2, 10])
def test_any_batch_in_any_order(dataset, prefetch):
    with Loader(dataset, **OPTIONS, prefetch=prefetch) as loader:
        for first in (0, 8, 16, 32, 0, 8, 8, 24, 32, 5, 13, 21):
            assert loader.batch(first)[0].samples[0] == first + 2
        for first in (-1, 40):
            with pytest.raises(IndexError, match=f"a batch that begins at sample {first} of a data set of 40"):
                loader.batch(first)


def test_reads_ahead_and_no_further():
    reads = []

    class Counting(Broken):
        def tokens(self, index, out):
            reads.append(index)

    with Loader(Counting(), **{**OPTIONS, "dp": 1, "dp_rank": 0}, prefetch=2) as loader:
        loader.batch(0)
        deadline = time.monotonic() + 5
        while len(reads) < 4 * 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(reads) == 4 * 8  # the first batch, two in the queue, and the one that waits for room


def test_a_stage_that_needs_no_tokens(dataset):
    loader = Loader(dataset, **{**OPTIONS, "needs_tokens": False})
    [first, second] = loader.batch(0)
    assert first.tokens is None and first.labels is None and second.samples.tolist() == [6, 7]
    assert loader_threads() == []


def test_every_stage_is_told_where_documents_begin(tmp_path, monkeypatch):
    """Blended data sets, and a last batch that runs past the end; a stage without tokens reads the index only."""
    prefixes = [numbered(tmp_path / name, lengths, 1000 * index)
                for index, (name, lengths) in enumerate({"a": [5, 3, 11], "b": [40, 1]}.items())]
    dataset = build_dataset([Source(str(path), weight) for path, weight in zip(prefixes, (2.0, 1.0), strict=True)],
                            12, 29, 1, None)
    options = {**OPTIONS, "documents": True}
    with Loader(dataset, **options) as loader:
        ends = {first: loader.batch(first) for first in loader.starts}
    # From here on nobody may read a token.
    monkeypatch.setattr(type(dataset), "tokens", lambda *arguments: pytest.fail("a middle stage read tokens"))
    for first, batches in ends.items():
        for end, middle in zip(batches, Loader(dataset, **{**options, "needs_tokens": False}).batch(first), strict=True):
            assert middle.tokens is None and torch.equal(middle.document_starts, end.document_starts)
            assert end.document_starts.dtype == torch.int32 and end.document_starts.is_contiguous()
            rows = zip(end.samples.tolist(), end.tokens.tolist(), end.document_starts.tolist(), strict=True)
            for sample, tokens, starts in rows:
                if sample >= 29:
                    assert starts == [0] * 12
                    continue
                jumps = [0, *(place for place in range(1, 12) if tokens[place] != tokens[place - 1] + 1)]
                # Documents are numbered on end to end: where one follows its left neighbour, only the index says so.
                assert set(jumps) <= set(starts) == set(np.unique(starts)) and starts == sorted(starts)
                assert set(starts) == set(dataset.document_starts(sample).tolist())
    assert Loader(dataset, **{**OPTIONS, "needs_tokens": False}).batch(0)[0].document_starts is None


def test_an_error_reaches_the_consumer_at_its_step():
    loader = Loader(Broken(), **{**OPTIONS, "dp": 1, "dp_rank": 0}, prefetch=3)
    assert loader.batch(0) and loader.batch(8)
    with pytest.raises(OSError, match="Input/output error"):
        loader.batch(16)
    assert loader_threads() == []
    assert loader.batch(24)  # the loader can still be used
    loader.close()
    loader.close()


def test_labels_after_the_end_of_a_document(tmp_path):
    """The position whose input is the end of document has no label; the one whose label it is keeps it."""
    path = write(tmp_path / "a", [[1, 2, EOD], [3, EOD], [4, 5, 6, 7, EOD]])
    dataset = build_dataset([Source(str(path))], 4, 20, 1, None)
    options = {**OPTIONS, "global_batch": 20, "micro_batch": 20, "dp": 1, "dp_rank": 0, "eod": EOD}
    with Loader(dataset, **options) as plain, Loader(dataset, **{**options, "mask_eod": True}) as masked:
        [whole], [batch] = plain.batch(0), masked.batch(0)
    ended = batch.tokens == EOD
    assert ended.any() and (batch.labels[ended] == IGNORED).all()
    assert torch.equal(batch.labels[~ended], whole.labels[~ended]) and (batch.labels == EOD).any()
    assert torch.equal(batch.tokens, whole.tokens) and (whole.labels != IGNORED).all()
    with pytest.raises(ValueError, match="mask_eod needs an end-of-document token"):
        Loader(dataset, **{**options, "eod": None, "mask_eod": True})


def test_the_last_step_is_filled_up_with_what_does_not_count(dataset):
    with Loader(dataset, **{**OPTIONS, "global_batch": 16, "dp": 1, "dp_rank": 0}) as loader:
        assert list(loader.starts) == [0, 16, 32]
        batches = loader.batch(32)
    assert [batch.samples[0].item() for batch in batches] == list(range(32, 48, 2))
    assert [(batch.labels == IGNORED).all().item() for batch in batches] == [False] * 4 + [True] * 4
    assert all(batch.tokens.shape == (2, 12) for batch in batches)


def test_token_outside_the_vocabulary(tmp_path):
    path = write(tmp_path / "a", [[1, 2, 3, 500, 4, 5, 6, 7, 8]])
    dataset = build_dataset([Source(str(path))], 4, 2, 1, None)
    options = {**OPTIONS, "global_batch": 2, "micro_batch": 2, "dp": 1, "dp_rank": 0}
    with Loader(dataset, **options, vocab_size=501) as loader:
        assert loader.batch(0)
    loader = Loader(dataset, **options, vocab_size=500)
    with pytest.raises(DataError, match=r"a: token id 500 in sample [01], and .* has 500 entries: .* another tokenizer"):
        loader.batch(0)
    negative = build_dataset([Source(str(write(tmp_path / "b", [[1, 2, -3, 4, 5, 6]], np.int32)))], 4, 1, 1, None)
    with pytest.raises(DataError, match="token id -3 in sample 0"):
        Loader(negative, **{**options, "global_batch": 1, "micro_batch": 1}, vocab_size=500).batch(0)


def test_batches_that_cannot_be_divided(dataset):
    with pytest.raises(ValueError, match="batch.global = 9 is not divisible by batch.micro x dp = 2 x 2 = 4"):
        Loader(dataset, **{**OPTIONS, "global_batch": 9})
    with pytest.raises(ValueError, match="rank 5 of 2"):
        Loader(dataset, **{**OPTIONS, "dp_rank": 5})
