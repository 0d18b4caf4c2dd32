"""Write a data set with its documents in another order, a function of the seed and of their number alone.

The order is computed and not kept. Reads are random; where the .bin is larger than --memory, two passes of sequential reads
and writes by way of temporary files beside the output give the same bytes.
"""
from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader
from megalm.data.permutation import Permutation
from megalm.data.rewrite import Part, everything, ranges, sequences_of, spans
from megalm.tools._progress import Progress
from megalm.tools.data._common import described, inherited, open_all, parents_of, published, refuse_outputs, writing

MOST_BUCKETS = 256  # files open at once
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size(text: str) -> int:
    """The type of an option that is a size in bytes: 4G, 500M, 1000."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in "KMGT" else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500M or 4G")
    return int(number) * UNITS[unit]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="PREFIX", help="the data set")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="the shuffled data set")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the order (1234)")
    parser.add_argument("--memory", type=size, default=size("4G"), metavar="SIZE",
                        help="a larger .bin is shuffled in two passes, by way of files of this size or less (4G)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")


def shuffled(shuffle: Permutation, low: int = 0, high: int | None = None) -> Iterator[np.ndarray]:
    """The documents at the places [low, high) of the new order."""
    for piece in everything((shuffle.count if high is None else high) - low):
        yield shuffle.item_at(piece + low)


class Buckets:
    """The documents in files, each of which holds a stretch of the new order in the old one."""

    def __init__(self, reader: IndexedReader, shuffle: Permutation, folder: Path, number: int):
        self.reader, self.shuffle, self.folder = reader, shuffle, folder
        self.width = -(-shuffle.count // number)  # places of a bucket
        self.number = -(-shuffle.count // self.width)

    def fill(self, moved: Callable[[int], None]) -> None:
        """The first pass: every document is appended to its file, in the order in which the .bin has them."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(self.folder / str(k), "wb")) for k in range(self.number)]
            for documents in everything(self.shuffle.count):
                buckets = self.shuffle.place_of(documents) // self.width
                order = np.argsort(buckets, kind="stable")
                edges = np.searchsorted(buckets[order], np.arange(self.number + 1))
                for k in range(self.number):
                    chosen = documents[order[edges[k]:edges[k + 1]]]
                    starts, lengths = spans(self.reader, sequences_of(self.reader, chosen))
                    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                        files[k].write(self.reader.flat[start:start + length].data)
                    moved(int(lengths.sum()) * self.reader.dtype.itemsize)

    def pieces(self) -> Iterator[np.ndarray]:
        """The second pass: the tokens in the new order; each file is removed when it has been read."""
        for k in range(self.number):
            low, high = k * self.width, min(self.shuffle.count, (k + 1) * self.width)
            documents = np.concatenate(list(shuffled(self.shuffle, low, high)))
            path = self.folder / str(k)
            tokens = np.fromfile(path, self.reader.dtype)
            path.unlink()
            lengths = self._lengths(documents)
            arrived = np.argsort(documents)
            ends = np.empty(len(documents), np.int64)
            ends[arrived] = np.cumsum(lengths[arrived])
            for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
                yield tokens[start:end]

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document, int64."""
        first = self.reader.document_indices[documents]
        sequences = self.reader.document_indices[documents + 1] - first
        sums = np.cumsum(np.append(0, self.reader.lengths[ranges(first, sequences)].astype(np.int64)))
        ends = np.cumsum(sequences)
        return sums[ends] - sums[ends - sequences]


def work(arguments: argparse.Namespace) -> int:
    """The command. Raises DataError for what is wrong; then nothing is written."""
    reader, = open_all([arguments.input])
    refuse_outputs([arguments.output], [arguments.input], arguments.overwrite)
    shuffle, total = Permutation(reader.num_documents, arguments.seed), reader.flat.nbytes
    part = Part(reader, lambda: shuffled(shuffle))
    parents = parents_of([reader])
    buckets = -(-total // arguments.memory)
    if buckets > MOST_BUCKETS:
        least = -(-total // MOST_BUCKETS)
        raise DataError(f"--memory is too little for {total / 1e9:,.1f} GB: at least {least:,} bytes are needed")
    with Progress("shuffle", total * min(2, max(1, buckets)), arguments.quiet) as progress, \
            writing([arguments.output]) as (output,):
        if buckets <= 1:
            output.write([part], progress.add)
        else:
            folder = output.bin.path.parent
            with tempfile.TemporaryDirectory(prefix=output.bin.path.name + ".", suffix=".partial", dir=folder) as place:
                in_buckets = Buckets(reader, shuffle, Path(place), buckets)
                in_buckets.fill(progress.add)
                for piece in in_buckets.pieces():
                    output.bin.file.write(piece.data)
                    progress.add(piece.nbytes)
            output.write_index([part])
        if parents is not None:
            output.describe(inherited(parents, output.counts([part]), made_by="shuffle", seed=arguments.seed))
    if not arguments.quiet:
        print(f"{arguments.output}: {described(published(arguments.output))}, shuffled with seed {arguments.seed}")
    return 0
