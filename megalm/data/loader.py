"""Micro-batches as tensors, read ahead by a thread: the next steps are ready when the engine asks for them."""
from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch

from .blend import Dataset
from .errors import DataError
from .sampler import sample_indices

IGNORED = -100  # a label that doesn't count


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a rank: b samples of s tokens. Tokens and labels are None on a stage that reads none, and the bounds of
    documents where nobody asked for them."""

    samples: torch.Tensor  # int64 [b], global sample indices
    tokens: torch.Tensor | None  # int64 [b, s]
    labels: torch.Tensor | None  # int64 [b, s], the next token; -100 doesn't count
    document_starts: torch.Tensor | None = None  # int32 [b, s], for each token the place in its sample where its document begins


class Loader:
    """The micro-batches of one data-parallel rank: a function of the data set and of how many samples were consumed before.

    With `mask_eod` the label after an end-of-document token doesn't count: what comes next is the first token of an unrelated
    document. The end-of-document token itself stays a label (Megatron-LM's eod_mask_loss does the same). Samples past the end of
    the data set, which fill up the last step of an evaluation, have no label that counts.

    With `documents` every stage is told where documents begin, by the sample index: that needs no token.
    """

    def __init__(self, dataset: Dataset, *, global_batch: int, micro_batch: int, dp: int, dp_rank: int, needs_tokens: bool,
                 eod: int | None, mask_eod: bool, documents: bool = False, prefetch: int = 2, vocab_size: int | None = None):
        """`prefetch` global batches are kept ready (0: no thread). Token ids must be below `vocab_size`, if given.

        Raises ValueError if the batch can't be divided so, or mask_eod has no token to go by.
        """
        if mask_eod and eod is None:
            raise ValueError("data.mask_eod needs an end-of-document token, and the tokenizer has none: name it as tokenizer.eod")
        self.dataset, self.prefetch, self.vocab_size = dataset, prefetch, vocab_size
        self.eod = eod if mask_eod else None
        self.needs_tokens, self.documents = needs_tokens, documents
        self.global_batch = global_batch
        self._split = {"global_batch": global_batch, "micro_batch": micro_batch, "dp": dp, "dp_rank": dp_rank}
        sample_indices(0, **self._split)  # a wrong rank is an error here, not in the thread
        self._reader: _Reader | None = None

    @property
    def starts(self) -> range:
        """The first sample of each global batch of the whole data set."""
        return range(0, self.dataset.num_samples, self.global_batch)

    def batch(self, first: int) -> list[MicroBatch]:
        """The micro-batches, one per accumulation step, of the global batch that begins at sample `first`. Batches in sequence
        were read ahead; any other may be asked for.

        Raises IndexError past the last sample, DataError for a token outside the vocabulary, and whatever else reading met.
        """
        if not 0 <= first < self.dataset.num_samples:
            raise IndexError(f"a batch that begins at sample {first} of a data set of {self.dataset.num_samples}")
        if not self.needs_tokens or self.prefetch == 0:
            return self.read(first)
        if self._reader is None or self._reader.next_first != first:
            self.close()
            self._reader = _Reader(self, first)
        try:
            return self._reader.take()
        except BaseException:
            self.close()
            raise

    def read(self, first: int) -> list[MicroBatch]:
        """The same, read now and by the caller."""
        indices = sample_indices(first, **self._split)  # [accumulation steps, b]
        return [self._micro_batch(row) for row in indices]

    def close(self) -> None:
        """Stop the thread and wait for it; the loader can be used again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _micro_batch(self, indices: np.ndarray) -> MicroBatch:
        missing = indices >= self.dataset.num_samples
        starts = self._document_starts(indices, missing) if self.documents else None
        if not self.needs_tokens:
            return MicroBatch(torch.from_numpy(indices.copy()), None, None, starts)
        block = np.zeros((len(indices), self.dataset.seq_length + 1), np.int64)  # [b, s + 1]
        for row in np.flatnonzero(~missing):
            self.dataset.tokens(int(indices[row]), out=block[row])
        self._check(block, indices)
        tokens, labels = block[:, :-1].copy(), block[:, 1:].copy()  # [b, s]
        if self.eod is not None:
            labels[tokens == self.eod] = IGNORED
        labels[missing] = IGNORED
        return MicroBatch(torch.from_numpy(indices.copy()), torch.from_numpy(tokens), torch.from_numpy(labels), starts)

    def _document_starts(self, indices: np.ndarray, missing: np.ndarray) -> torch.Tensor:
        """int32 [b, s]; a sample past the end is one document."""
        length = self.dataset.seq_length
        found = np.zeros((len(indices), length), np.int32)
        for row in np.flatnonzero(~missing):
            starts = self.dataset.document_starts(int(indices[row]))
            found[row] = np.repeat(starts, np.diff(starts, append=length))
        return torch.from_numpy(found)

    def _check(self, block: np.ndarray, indices: np.ndarray) -> None:
        """A model doesn't notice a token past its vocabulary on every device; a data set of another tokenizer is caught here."""
        if self.vocab_size is None or (block.max() < self.vocab_size and block.min() >= 0):
            return
        row, column = np.argwhere((block >= self.vocab_size) | (block < 0))[0]
        path = self.dataset.shares[self.dataset.locate(int(indices[row]))[0]].path
        raise DataError(f"{path}: token id {block[row, column]} in sample {indices[row]}, and the vocabulary has "
                        f"{self.vocab_size} entries: the data set was made with another tokenizer")


class _Reader:
    """The thread that reads batches in order from sample `first` on into a bounded queue. An error takes the place of one."""

    def __init__(self, loader: Loader, first: int):
        self.next_first, self._stride = first, loader.global_batch
        self._queue: queue.Queue = queue.Queue(maxsize=loader.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(loader, first), name="megalm-loader", daemon=True)
        self._thread.start()

    def take(self) -> list[MicroBatch]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        self.next_first += self._stride
        return item

    def close(self) -> None:
        self._stop.set()
        while not self._queue.empty():  # a put that waits for room is let through, and the thread sees the flag
            self._queue.get_nowait()
        self._thread.join()

    def _run(self, loader: Loader, first: int) -> None:
        for start in range(first, loader.dataset.num_samples, self._stride):
            try:
                item = loader.read(start)
            except BaseException as error:  # the consumer raises it
                item = error
            if not self._put(item) or isinstance(item, BaseException) or self._stop.is_set():
                return

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
