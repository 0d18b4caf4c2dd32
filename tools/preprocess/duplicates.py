"""Documents that came before, whole or nearly: marked by the workers, decided where the parts come together, in their order.

What stays is written down as it is decided, so that a run that goes on knows it.
"""
from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator, Sequence

import numpy as np

from megalm.data.errors import DataError
from megalm.data.rewrite import ranges

from .cleaning import Cleaning

PERMUTATIONS, ROWS, SEED = 128, 8, 1  # of MinHash; of a band: two texts of similarity s share a band with 1 - (1 - s^8)^16
SHINGLE = 5  # words
HEAD = 1 << 22  # characters of a longer text that stand for it: words are many objects
PAIRS = 1 << 14  # of signatures that are compared at a time
# A word, or one letter of a script that puts no space between words.
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def exact_marks(texts: Sequence[str]) -> np.ndarray:
    """A hash of 16 bytes of each text, uint64 [texts * 2]."""
    return np.frombuffer(b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts), "<u8")


def shingles(text: str) -> list[str]:
    """Its runs of five words, without case; of a shorter text, all of it; of one longer than HEAD its head alone."""
    words = WORD.findall(text[:HEAD].lower())
    return [" ".join(words[i:i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))] if words else []


def near_marks(texts: Sequence[str]) -> np.ndarray:
    """The MinHash signature of each text, uint32 [texts * PERMUTATIONS]."""
    from rensa import RMinHash

    rows = RMinHash.from_token_sets([shingles(text) for text in texts], num_perm=PERMUTATIONS, seed=SEED)
    return np.array([row.digest() for row in rows], "<u4").reshape(-1)


class SortedRuns:
    """Keys, uint64, each with a value of a dtype, in sorted arrays of which each is at least twice as long as the next."""

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Take in some of both [n]; a key may come more than once."""
        run = (keys, values.astype(self.dtype))
        while self.runs and len(self.runs[-1][0]) < 2 * len(run[0]):
            run = tuple(map(np.concatenate, zip(self.runs.pop(), run, strict=True)))
        order = np.argsort(run[0], kind="stable")
        self.runs.append((run[0][order], run[1][order]))

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each time that one of the keys is there: its place among those asked for, and the value."""
        places, values = [np.zeros(0, np.int64)], [np.zeros(0, self.dtype)]
        for ours, theirs in self.runs:
            low = np.searchsorted(ours, keys)
            counts = np.searchsorted(ours, keys, "right") - low
            places.append(np.repeat(np.arange(len(keys)), counts))
            values.append(theirs[ranges(low, counts)])
        return np.concatenate(places), np.concatenate(values)


class ExactDuplicates:
    """Texts that are the same, letter by letter, after the other cleaning. 16 bytes of memory for each that stays."""

    name, why, dtype, width = "exact", "duplicates", "<u8", 2

    def __init__(self):
        self.seen = SortedRuns(self.dtype)  # the halves of the marks

    def go_on(self, file) -> None:
        """`file` holds what stayed until now, and takes what stays."""
        self.file = file
        for rows in stored(file, self):
            self.seen.add(rows[:, 0], rows[:, 1])

    def first(self, marks: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Of the candidates, bool [documents], those that weren't there before; marks [documents, width]."""
        places = np.flatnonzero(candidates)
        asked, halves = self.seen.find(marks[places, 0])
        before = np.zeros(len(places), bool)
        before[asked[halves == marks[places[asked], 1]]] = True
        places = places[~before]
        _, firsts = np.unique(marks[places], axis=0, return_index=True)
        kept = np.zeros_like(candidates)
        kept[places[firsts]] = True
        self.seen.add(marks[kept, 0], marks[kept, 1])
        append(self.file, marks[kept])
        return kept


class NearDuplicates:
    """Texts whose signatures agree in a share of their places, looked for among those that agree in a band of eight.

    Memory for each text that stays: 12 bytes a band, 192 together, and 40 more while a band's runs become one. Its signature, 512
    bytes, stays in the file.
    """

    name, why, dtype, width = "near", "near duplicates", "<u4", PERMUTATIONS

    def __init__(self, least: float):
        self.least, self.count = least, 0
        self.bands = [SortedRuns("<u4") for _ in range(PERMUTATIONS // ROWS)]  # the numbers of texts

    def go_on(self, file) -> None:
        """As ExactDuplicates'."""
        self.file = file
        for rows in stored(file, self):
            self._add(rows)

    def first(self, marks: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """As ExactDuplicates'. A text without a word is no duplicate."""
        places = np.flatnonzero(candidates & with_words(marks))
        rows = np.ascontiguousarray(marks[places])
        keys = band_keys(rows)
        near = self._near_earlier(rows, keys)
        self._near_each_other(rows, keys, near)
        kept = candidates.copy()
        kept[places[near]] = False
        append(self.file, marks[kept])
        self._add(marks[kept])
        return kept

    def _near_earlier(self, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Which rows are near one that stays from before, bool [rows]."""
        near = np.zeros(len(rows), bool)
        if not self.count:
            return near
        with mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            earlier = np.frombuffer(memory, self.dtype).reshape(-1, self.width)
            for band, runs in enumerate(self.bands):
                left = np.flatnonzero(~near)
                asked, numbers = runs.find(keys[left, band])
                for low in range(0, len(asked), PAIRS):
                    ours, theirs = left[asked[low:low + PAIRS]], numbers[low:low + PAIRS]
                    near[ours[(rows[ours] == earlier[theirs]).mean(axis=1) >= self.least]] = True
            del earlier  # before the memory that it is a view of
        return near

    def _near_each_other(self, rows: np.ndarray, keys: np.ndarray, near: np.ndarray) -> None:
        """Note in `near` the rows that are near one before them that stays, of these rows."""
        shared = np.zeros(keys.shape, bool)
        for band in range(keys.shape[1]):
            _, group, sizes = np.unique(keys[:, band], return_inverse=True, return_counts=True)
            shared[:, band] = sizes[group] > 1
        staying: dict[tuple[int, int], list[int]] = {}
        for place in np.flatnonzero(shared.any(axis=1) & ~near):
            own = [(band, int(keys[place, band])) for band in np.flatnonzero(shared[place]).tolist()]
            alike = sorted({other for key in own for other in staying.get(key, ())})
            if alike and (rows[alike] == rows[place]).mean(axis=1).max() >= self.least:
                near[place] = True
            else:
                for key in own:
                    staying.setdefault(key, []).append(place)

    def _add(self, rows: np.ndarray) -> None:
        numbers = self.count + np.flatnonzero(with_words(rows))
        for runs, keys in zip(self.bands, band_keys(rows[numbers - self.count]).T, strict=True):
            runs.add(keys, numbers)
        self.count += len(rows)


def with_words(rows: np.ndarray) -> np.ndarray:
    """Which signatures are of texts with at least one word, bool [rows]."""
    return (rows != np.iinfo(rows.dtype).max).any(axis=1)


def band_keys(rows: np.ndarray) -> np.ndarray:
    """A number for the content of each band, uint64 [rows, bands]; equal for others by chance alone, which is looked after."""
    bands = rows.reshape(len(rows), PERMUTATIONS // ROWS, ROWS).astype(np.uint64)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for row in range(ROWS):
        keys = (keys ^ bands[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
        keys ^= keys >> np.uint64(32)
    return keys


def wanted(cleaning: Cleaning) -> list[ExactDuplicates | NearDuplicates]:
    """What is asked for. Raises DataError without the library."""
    found: list[ExactDuplicates | NearDuplicates] = [ExactDuplicates()] if cleaning.deduplicate else []
    if cleaning.near_duplicates is not None:
        try:
            import rensa  # noqa: F401
        except ImportError:
            raise DataError("--near-duplicates needs the rensa package: pip install 'megalm[corpus]'") from None
        found.append(NearDuplicates(cleaning.near_duplicates))
    return found


def stored(file, kind) -> Iterator[np.ndarray]:
    """The rows of a file that a stopped run has left, some at a time."""
    file.seek(0)
    size = np.dtype(kind.dtype).itemsize * kind.width
    while block := file.read(size << 16):
        yield np.frombuffer(block, kind.dtype).reshape(-1, kind.width)


def append(file, rows: np.ndarray) -> None:
    """Append an array to an unbuffered file. Raises OSError for a full disk."""
    rest = memoryview(rows.tobytes())
    while rest:
        rest = rest[file.write(rest):]
