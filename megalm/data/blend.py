"""Several data sets mixed by weight: which one gives sample i, and which of its own samples that is."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .errors import DataError
from .proportions import Blend
from .samples import PackedSamples, block_memory

MOST_TOLD = 20


@dataclass(frozen=True)
class Source:
    """A data set and its weight; anything with these two attributes serves as well."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Share:
    """What a run takes from one data set: samples, and how many times it goes through the data."""

    path: str
    weight: float  # of all weights' sum, 0 to 1
    samples: int
    epochs: float

    def __str__(self) -> str:
        return f"{self.path} gives {self.samples:,} samples ({self.weight:.1%} of the blend), {self.epochs:.2f} epochs"


def told(shares: Sequence[Share]) -> list[str]:
    """A line each; of more than MOST_TOLD data sets those that are gone through most often, and the others in one line."""
    ordered = sorted(shares, key=lambda share: -share.epochs)
    shown, rest = (shares, []) if len(shares) <= MOST_TOLD else (ordered[:MOST_TOLD - 1], ordered[MOST_TOLD - 1:])
    lines = [str(share) for share in shown]
    if rest:
        lines.append(f"{len(rest):,} other data sets give {sum(share.samples for share in rest):,} samples, "
                     f"{rest[-1].epochs:.2f} to {rest[0].epochs:.2f} epochs each")
    return lines


class Dataset:
    """num_samples samples from weighted data sets, in the order in which training consumes them."""

    def __init__(self, parts: Sequence[PackedSamples], blend: Blend, shares: Sequence[Share]):
        self.parts, self.blend, self.shares = tuple(parts), blend, tuple(shares)
        self.num_samples, self.seq_length = blend.num_samples, parts[0].seq_length

    def __len__(self) -> int:
        return self.num_samples

    def tokens(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """The token ids of sample `index`, int64 [seq_length + 1], written to `out` if given. Raises IndexError as `locate`."""
        part, local = self.locate(index)
        return self.parts[part].tokens(local, out)

    def document_starts(self, index: int) -> np.ndarray:
        """Where in sample `index` its documents begin, int32 [documents], as PackedSamples has it; no token is read."""
        part, local = self.locate(index)
        return self.parts[part].document_starts(local)

    def taken(self, num_samples: int) -> list[Share]:
        """What the first num_samples samples take from each data set."""
        counts = self.blend.counts(num_samples).tolist()
        return [replace(share, samples=count, epochs=part.epochs_of(count))
                for share, part, count in zip(self.shares, self.parts, counts, strict=True)]

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, sample of that data set) of sample `index`. Raises IndexError outside [0, num_samples)."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return self.blend.locate(index)


def build_dataset(sources: Sequence, seq_length: int, num_samples: int, seed: int, cache_dir: str | Path | None) -> Dataset:
    """Open the data sets (each with .path, a prefix, and .weight) and mix num_samples samples of seq_length + 1 tokens.

    Each data set's sample index is mapped from cache_dir, or built and published there first (None: kept in memory): call
    it once per file system in one process, then in all. The result is a function of the data, the weights, seq_length and
    seed; a larger num_samples only appends. Raises DataError, for all unreadable data sets at once.
    """
    if not sources:
        raise DataError("no data set is named: data needs at least one {\"path\": ...}")
    paths = [str(source.path) for source in sources]
    named = Counter(Path(path).resolve() for path in paths)  # m/a and m/./a are one
    for path in paths:
        if (times := named[Path(path).resolve()]) > 1:
            raise DataError(f"{path} is named {times} times; name it once, with the sum of its weights")
    blend = Blend([source.weight for source in sources], num_samples)
    folder = None if cache_dir is None else Path(cache_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    parts, problems, blocks = [], [], block_memory()
    for path, count in zip(paths, blend.counts().tolist(), strict=True):
        try:
            parts.append(PackedSamples(path, seq_length, count, seed, folder, blocks))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    total = sum(source.weight for source in sources)
    shares = [Share(part.prefix, source.weight / total, part.num_samples, part.epochs)
              for part, source in zip(parts, sources, strict=True)]
    return Dataset(parts, blend, shares)
