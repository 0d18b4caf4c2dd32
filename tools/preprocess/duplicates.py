"""Documents that came before, whole or nearly: marked by the workers, decided where the parts come together, in their order.

What stays is written down as it is decided, so that a run that goes on knows it.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from megalm.data.errors import DataError

from .cleaning import Cleaning

PERMUTATIONS, ROWS, SEED = 128, 8, 1  # of MinHash; of a band: two texts of similarity s share a band with 1 - (1 - s^8)^16
SHINGLE = 5  # words
# A word, or one letter of a script that puts no space between words.
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def exact_marks(texts: Sequence[str]) -> np.ndarray:
    """A hash of 16 bytes of each text, uint64 [texts * 2]."""
    return np.frombuffer(b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts), "<u8")


def shingles(text: str) -> list[str]:
    """Its runs of five words, without case; of a shorter text, all of it."""
    words = WORD.findall(text.lower())
    return [" ".join(words[i:i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))] if words else []


def near_marks(texts: Sequence[str]) -> np.ndarray:
    """The MinHash signature of each text, uint32 [texts * PERMUTATIONS]."""
    from rensa import RMinHash

    rows = RMinHash.from_token_sets([shingles(text) for text in texts], num_perm=PERMUTATIONS, seed=SEED)
    return np.array([row.digest() for row in rows], "<u4").reshape(-1)


class ExactDuplicates:
    """Texts that are the same, letter by letter, after the other cleaning."""

    name, why, dtype, width = "exact", "duplicates", "<u8", 2

    def __init__(self):
        self.seen: set[bytes] = set()

    def go_on(self, file) -> None:
        """`file` holds what stayed until now, and takes what stays."""
        self.file = file
        self.seen.update(row.tobytes() for row in stored(file, self))

    def first(self, marks: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Of the candidates, bool [documents], those that weren't there before; marks [documents, width]."""
        kept = candidates.copy()
        for place in np.flatnonzero(candidates):
            key = marks[place].tobytes()
            kept[place] = key not in self.seen
            self.seen.add(key)
        append(self.file, marks[kept])
        return kept


class NearDuplicates:
    """Texts whose signatures agree in a share of their places, looked for among those that agree in a band of eight."""

    name, why, dtype, width = "near", "near duplicates", "<u4", PERMUTATIONS

    def __init__(self, least: float):
        self.least = least
        self.rows = np.zeros((1024, PERMUTATIONS), self.dtype)
        self.count = 0
        self.bands: dict[bytes, list[int]] = {}

    def go_on(self, file) -> None:
        """As ExactDuplicates'."""
        self.file = file
        for row in stored(file, self):
            self._add(row, list(self._keys(row)))

    def first(self, marks: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """As ExactDuplicates'. A text without a word is no duplicate."""
        kept = candidates.copy()
        for place in np.flatnonzero(candidates):
            row = marks[place]
            if (row == np.iinfo(row.dtype).max).all():
                continue
            keys = list(self._keys(row))
            alike = sorted({other for key in keys for other in self.bands.get(key, ())})
            if alike and (self.rows[alike] == row).mean(axis=1).max() >= self.least:
                kept[place] = False
            else:
                self._add(row, keys)
        append(self.file, marks[kept])
        return kept

    @staticmethod
    def _keys(row: np.ndarray):
        for band in range(0, PERMUTATIONS, ROWS):
            yield band.to_bytes(1, "little") + hashlib.blake2b(row[band:band + ROWS].tobytes(), digest_size=8).digest()

    def _add(self, row: np.ndarray, keys: list[bytes]) -> None:
        if self.count == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.rows[self.count] = row
        for key in keys:
            self.bands.setdefault(key, []).append(self.count)
        self.count += 1


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


def stored(file, kind):
    """The rows of a file that a stopped run has left, one at a time."""
    file.seek(0)
    size = np.dtype(kind.dtype).itemsize * kind.width
    while block := file.read(size << 12):
        yield from np.frombuffer(block, kind.dtype).reshape(-1, kind.width)


def append(file, rows: np.ndarray) -> None:
    rest = memoryview(rows.tobytes())
    while rest:
        rest = rest[file.write(rest):]
