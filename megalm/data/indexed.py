"""Token files in Megatron-LM's indexed format, byte for byte: PREFIX.bin (tokens, no header) and PREFIX.idx.

The .idx, little-endian and unaligned: magic (9 bytes), version u64 = 1, dtype code u8, sequences S u64, document indices
D u64 (documents + 1), then int32[S] lengths in tokens, int64[S] byte offsets into the .bin, int64[D] document indices
(document d is the sequences [indices[d], indices[d + 1])). Written by megatron/core/datasets/indexed_dataset.py.
"""
from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .errors import DataError
from .publish import PartialFile, sync_folder

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOAT_CODES = (6, 7)
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # entries of the .idx that are worked on at a time
Pieces = Callable[[], Iterator[np.ndarray]]


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron-LM chooses for a vocabulary: uint16 below 65500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def file_paths(prefix: str | Path) -> tuple[Path, Path]:
    """data/wiki -> (data/wiki.bin, data/wiki.idx); a dot in the prefix is part of the name."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedReader:
    """A memory-mapped token file. Nothing is read but the pages that are used; the .idx is checked as a whole.

    Attributes: dtype of the tokens; lengths int32 [S], tokens per sequence; pointers int64 [S], bytes into the .bin;
    document_indices int64 [D]; flat, all tokens of the .bin in file order; total_tokens, the sum of lengths; modes int8 [S],
    what each sequence is in a multimodal data set, else None.
    """

    def __init__(self, prefix: str | Path, *, multimodal: bool = False):
        """Raises DataError if a file is missing, the two don't describe a valid data set, or it is multimodal and may not be."""
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = file_paths(prefix)
        self._require_files()
        raw = _map(self.idx_path)
        self.dtype, sequences, documents = self._read_header(raw)
        offset = HEADER.size
        self.lengths = np.frombuffer(raw, "<i4", sequences, offset)
        self.pointers = np.frombuffer(raw, "<i8", sequences, offset + 4 * sequences)
        self.document_indices = np.frombuffer(raw, "<i8", documents, offset + 12 * sequences)
        rest = offset + 12 * sequences + 8 * documents
        self.modes = np.frombuffer(raw, np.int8, sequences, rest) if raw.size > rest else None
        if self.modes is not None and not multimodal:
            raise DataError(f"{self.idx_path}: a multimodal data set ({sequences} sequence modes follow): only text is supported")
        self._check_documents()
        self.total_tokens = self._check_sequences()
        self.flat = _map(self.bin_path).view(self.dtype)

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """The number of documents; each is zero or more sequences."""
        return len(self.document_indices) - 1

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of one sequence: a read-only view [lengths[index]] into the mapped .bin."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {self.prefix}, which has {len(self)}")
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.flat[start:start + int(self.lengths[index])]

    def document_spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where these documents, int64 [n], lie in `flat`: (first token, number of tokens), both int64 [n].

        True where the sequences of a document follow each other in the .bin: `check_documents` sees to that.
        """
        item = self.dtype.itemsize
        if self._one_each:
            return self.pointers[documents] // item, self.lengths[documents].astype(np.int64)
        first, after = self.document_indices[documents], self.document_indices[documents + 1]
        filled = after > first
        starts, lengths = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
        starts[filled] = self.pointers[first[filled]] // item
        last = after[filled] - 1
        lengths[filled] = self.pointers[last] // item + self.lengths[last] - starts[filled]
        return starts, lengths

    def check_documents(self) -> None:
        """Raises DataError if the sequences of a document don't follow each other in the .bin."""
        if self._one_each:
            return
        indices = self.document_indices
        for low in range(0, len(self) - 1, CHUNK):
            high = min(low + CHUNK, len(self) - 1)
            ends = self.pointers[low:high] + self.lengths[low:high].astype(np.int64) * self.dtype.itemsize
            apart = ends != self.pointers[low + 1:high + 1]
            apart[indices[indices.searchsorted(low + 1):indices.searchsorted(high, "right")] - low - 1] = False
            if apart.any():
                raise DataError(f"{self.idx_path}: the sequences of a document don't follow each other in the .bin")

    def _require_files(self) -> None:
        bin_there, idx_there = self.bin_path.is_file(), self.idx_path.is_file()
        if bin_there and idx_there:
            return
        if bin_there:
            raise DataError(f"{self.bin_path} has no {self.idx_path.name} beside it: it was not finished; make it again")
        if idx_there:
            raise DataError(f"{self.idx_path} has no {self.bin_path.name} beside it")
        for suffix in (".bin", ".idx"):
            if self.prefix.endswith(suffix) and Path(self.prefix).is_file():
                raise DataError(f"{self.prefix}: a data set is named without {suffix}: {self.prefix[:-len(suffix)]}")
        raise DataError(f"no data set at {self.prefix}: neither {self.bin_path} nor {self.idx_path} exists")

    def _read_header(self, raw: np.ndarray) -> tuple[np.dtype, int, int]:
        """(dtype of the tokens, S, D) of an .idx whose size agrees with them."""
        path, size = self.idx_path, raw.size
        start = raw[:9].tobytes()
        if start.startswith(LEGACY_MAGIC):
            raise DataError(f"{path}: the old TNTIDX format, which isn't memory-mapped; make the data set again from its text")
        if not MAGIC.startswith(start):
            raise DataError(f"{path}: not an index file: it starts with {start!r} and not with {MAGIC!r}")
        if size < HEADER.size:
            raise DataError(f"{path}: truncated: {size} bytes, and the header alone has {HEADER.size}")
        _, version, code, sequences, documents = HEADER.unpack(raw[:HEADER.size].tobytes())
        if version != VERSION:
            raise DataError(f"{path}: version {version} of the format; only {VERSION} is known")
        if code in FLOAT_CODES:
            raise DataError(f"{path}: dtype code {code} is a floating-point type; tokens are integers")
        if code not in DTYPES:
            raise DataError(f"{path}: unknown dtype code {code}; known are {sorted(DTYPES)}")
        expected = HEADER.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):  # the second with a mode for each sequence
            what = "truncated" if size < expected else "too long"
            raise DataError(f"{path}: {what}: {size} bytes, and {sequences} sequences and {documents} document indices "
                            f"take {expected}")
        return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents

    def _check_documents(self) -> None:
        indices, path = self.document_indices, self.idx_path
        if len(indices) == 0 or indices[0] != 0 or indices[-1] != len(self):
            ends = f"{indices[0]} to {indices[-1]}" if len(indices) else "none at all"
            raise DataError(f"{path}: the document indices must go from 0 to the {len(self)} sequences: {ends}")
        self._one_each = len(indices) == len(self) + 1  # a sequence a document, as most data sets are
        for low in range(0, len(indices) - 1, CHUNK):
            part = indices[low:low + CHUNK + 1]
            self._one_each = self._one_each and bool((part == np.arange(low, low + len(part))).all())
            if np.any(part[1:] < part[:-1]):
                bad = low + int(np.argmax(part[1:] < part[:-1]))
                raise DataError(f"{path}: document {bad} ends at sequence {indices[bad + 1]}, before its start {indices[bad]}")

    def _check_sequences(self) -> int:
        """The sum of lengths, after every sequence was found to lie inside the .bin."""
        size, item, total, end = self.bin_path.stat().st_size, self.dtype.itemsize, 0, 0
        for low in range(0, len(self), CHUNK):
            lengths = self.lengths[low:low + CHUNK].astype(np.int64)
            pointers = self.pointers[low:low + CHUNK]
            # by subtraction: a planted pointer near 2^63 would overflow a sum and pass
            bad = (lengths < 0) | (pointers < 0) | (pointers % item != 0) | (pointers > size - lengths * item)
            if bad.any():
                self._report(low + int(np.argmax(bad)), size)
            total += int(lengths.sum())
            end = max(end, int((pointers + lengths * item).max()))
        if end != size:
            raise DataError(f"{self.bin_path} has {size} bytes and {self.idx_path.name} describes {end}: "
                            "they don't belong together, or one was cut")
        return total

    def _report(self, index: int, size: int) -> None:
        length, pointer, item = int(self.lengths[index]), int(self.pointers[index]), self.dtype.itemsize
        where = f"{self.idx_path}: sequence {index}"
        if length < 0:
            raise DataError(f"{where} has a negative length, {length}")
        if pointer < 0 or pointer % item:
            raise DataError(f"{where} starts at byte {pointer}, which is no multiple of {item} from 0 on")
        raise DataError(f"{where} points past the end of {self.bin_path.name}: "
                        f"bytes {pointer} to {pointer + length * item} of {size}")


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx. Used as a context: both appear, whole, when it is left without an exception.

    Until then they are PREFIX.bin.partial and PREFIX.idx.partial; the .idx is renamed last, and a reader refuses a .bin
    that has none. Memory is 12 bytes a document; the tokens go straight to the disk.
    """

    def __init__(self, prefix: str | Path, dtype, *, overwrite: bool = False):
        """Raises DataError for a dtype the format doesn't know, or if either file exists and `overwrite` is False."""
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise DataError(f"tokens can't be stored as {self.dtype}; known are {', '.join(map(str, CODES))}")
        self.bin_path, self.idx_path = file_paths(prefix)
        refuse_existing(prefix, overwrite)
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._bin = PartialFile(self.bin_path)
        self._lengths = array("i")
        self._counts = array("q")
        self.total_tokens = 0

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document: its token ids [n], and the lengths of its sequences (one of n by default, none for [])."""
        tokens = np.asarray(tokens)
        lengths = [len(tokens)] if lengths is None else lengths
        if sum(lengths) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens in sequences of {sum(lengths)} together")
        self.append(tokens, lengths, [len(lengths)])

    def append(self, tokens: np.ndarray, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Append many documents at once: tokens [n] of all, the lengths of the sequences, the number of sequences per document.

        Raises DataError if a token id doesn't fit the dtype.
        """
        lengths, counts = np.asarray(lengths, np.int32), np.asarray(counts, np.int64)
        self._bin.file.write(self._convert(np.asarray(tokens)).tobytes())
        self._counts.frombytes(counts.tobytes())
        self._lengths.frombytes(lengths.tobytes())
        self.total_tokens += len(tokens)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._counts)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._bin.discard()
            return
        try:
            idx = PartialFile(self.idx_path)
        except BaseException:
            self._bin.discard()
            raise
        try:
            arrays = [np.frombuffer(values, values.typecode) for values in (self._lengths, self._counts)]
            for chunk in index_bytes(self.dtype, *map(len, arrays), *map(in_pieces, arrays)):
                idx.file.write(chunk)
            publish_pair(self._bin, idx)
        except BaseException:
            self._bin.discard()
            idx.discard()
            raise

    def _convert(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.dtype != self.dtype and len(tokens):
            limits = np.iinfo(self.dtype)
            for token in (int(tokens.min()), int(tokens.max())):
                if not limits.min <= token <= limits.max:
                    raise DataError(f"{self.bin_path}: token id {token} doesn't fit {self.dtype} ({limits.min} to {limits.max})")
        return tokens.astype(self.dtype.newbyteorder("<"), copy=False)


def in_pieces(values: np.ndarray) -> Pieces:
    """An array, as index_bytes takes it."""
    return lambda: (values[low:low + CHUNK] for low in range(0, len(values), CHUNK))


def index_bytes(dtype: np.dtype, sequences: int, documents: int, lengths: Pieces, counts: Pieces,
                modes: Pieces | None = None) -> Iterator[bytes]:
    """The .idx, piece by piece: `lengths` gives the tokens of each sequence, `counts` the sequences of each document, `modes`
    what each sequence is in a multimodal data set; each is called once or twice."""
    yield HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype).newbyteorder("=")], sequences, documents + 1)
    for piece in lengths():
        yield piece.astype("<i4").tobytes()
    end = 0
    for piece in lengths():
        sizes = piece.astype(np.int64) * np.dtype(dtype).itemsize
        ends = end + np.cumsum(sizes)
        yield (ends - sizes).astype("<i8").tobytes()
        end = int(ends[-1]) if len(ends) else end
    yield np.zeros(1, "<i8").tobytes()
    end = 0
    for piece in counts():
        ends = end + np.cumsum(piece, dtype=np.int64)
        yield ends.astype("<i8").tobytes()
        end = int(ends[-1]) if len(ends) else end
    for piece in modes() if modes is not None else ():
        yield piece.astype(np.int8).tobytes()


def publish_pair(bin_file: PartialFile, idx_file: PartialFile) -> None:
    """Bring both to the disk and rename them into place, the .idx last: a reader refuses a .bin that has none."""
    idx_file.sync()
    bin_file.sync()
    idx_file.path.unlink(missing_ok=True)  # overwriting: at no moment may the old .idx stand beside the new .bin
    bin_file.publish()
    idx_file.publish()
    sync_folder(bin_file.path.parent)


def refuse_existing(prefix: str | Path, overwrite: bool) -> None:
    """Raises DataError if a file of the data set exists and may not be replaced."""
    for path in file_paths(prefix):
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists already; it is replaced only with --force")


def _map(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only uint8 array, mapped; an empty file can't be mapped and gives an empty array."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)
