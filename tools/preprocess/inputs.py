"""What is to be read: the files behind names, globs and folders, and the pieces of them that are worked on at a time."""
from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megalm.data.errors import DataError

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".text": "txt", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
HASHED = 64 << 20  # bytes of a plain .jsonl that have one hash; a shorter file's is its SHA-256
MAGNIFICATION = 4  # what a compressed file is taken to hold


@dataclass(frozen=True)
class Source:
    """One input file as it was when the run began."""

    path: str
    kind: str  # jsonl, txt, parquet
    compression: str | None
    size: int  # bytes on disk
    changed: int  # mtime, ns
    stream: str | None = None  # what it was before it was stored: standard input, a pipe

    @property
    def name(self) -> str:
        """For messages."""
        return self.stream or self.path

    @property
    def by_bytes(self) -> bool:
        """Can a part of it be read from the middle of the file?"""
        return self.kind == "jsonl" and self.compression is None

    @property
    def streamed(self) -> bool:
        """Is it lines that can be read only from the beginning on?"""
        return self.kind == "jsonl" and self.compression is not None

    def check(self) -> None:
        """Raises DataError if the file isn't what it was."""
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            raise DataError(f"input {self.path} is gone") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.changed):
            raise DataError(f"input {self.path} changed while it was read")


@dataclass(frozen=True)
class Span:
    """A part of a source: lines that begin in bytes [start, end) of a plain .jsonl, row groups of a .parquet, else all of it."""

    source: int
    start: int
    end: int
    weight: int  # bytes of input, for the share that is done


Unit = tuple[Span, ...]


def split_name(name: str) -> tuple[str | None, str | None]:
    """(kind, compression) that the suffixes of a name say; kind None: not known."""
    path = Path(name)
    compression = COMPRESSIONS.get(path.suffix)
    return KINDS.get(Path(path.stem).suffix if compression else path.suffix), compression


def is_stream(name: str) -> bool:
    """Is it standard input, a pipe or another thing that can be read only once?"""
    return name == "-" or (os.path.exists(name) and not stat.S_ISREG(os.stat(name).st_mode) and not os.path.isdir(name))


def in_folder(path: Path) -> bool:
    """Is a file, by its path in a folder of inputs, taken for one?"""
    kind, compression = split_name(path.name)
    plain = Path(path.stem if compression else path.name)
    return kind is not None and plain.suffix != ".json" and not any(part.endswith(".work") for part in path.parts[:-1])


def expand(name: str, own: Collection[Path] = ()) -> list[str]:
    """The files of a name: itself, what a glob finds, or all known files below a folder; sorted. Raises DataError for nothing.

    What is no corpus isn't found, but may be named: the program's `own` outputs, what other runs have made, and in folders
    every .json, which may be a tokenizer or a report as well.
    """
    taken = {path.resolve() for path in own}
    if os.path.isdir(name):
        found = sorted(str(path) for path in Path(name).rglob("*") if in_folder(path.relative_to(name)) and path.is_file()
                       and path.resolve() not in taken)
        if not found:
            raise DataError(f"input {name} is a folder without .jsonl, .txt or .parquet files")
        return found
    if not os.path.exists(name) and glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path)
                       and not path.endswith(".data.json") and Path(path).resolve() not in taken)
        if not found:
            raise DataError(f"input {name} fits no file")
        return found
    return [name]


def find_source(path: str, kind: str | None = None) -> Source:
    """One file. Raises DataError if it is missing or its suffix isn't known and no kind is given."""
    if not os.path.exists(path):
        raise DataError(f"input {path} is missing")
    known, compression = split_name(path)
    kind = kind or known
    if kind is None:
        raise DataError(f"input {path}: the suffix {Path(path).suffix!r} isn't known; use .jsonl (one JSON object a line), .txt "
                        "(one document a file) or .parquet; .jsonl and .txt may be compressed: .gz or .zst")
    if kind == "parquet" and compression:
        raise DataError(f"input {path}: a .parquet file is compressed inside; decompress it once")
    found = os.stat(path)
    return Source(path, kind, compression, found.st_size, found.st_mtime_ns)


def find_sources(names: Sequence[str], store: Callable[[str], Source], own: Collection[Path] = ()) -> list[Source]:
    """All inputs, in the order of the names; `store` makes a file of a stream, `own` are outputs.

    Raises DataError for a name that gives none, and for a file that is given twice.
    """
    paths = [path for name in names for path in ([name] if is_stream(name) else expand(name, own))]
    seen: set[str] = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"input {path} is given twice")
        seen.add(real)
    return [store(path) if is_stream(path) else find_source(path) for path in paths]


def usual_piece(sources: Sequence[Source]) -> int:
    """Bytes of a piece where nobody says: small beside the whole, so that all workers end together, but not many millions."""
    return min(64 << 20, max(16 << 20, sum(source.size for source in sources) // 256))


def spans(number: int, source: Source, unit_bytes: int) -> Iterator[Span]:
    """The parts of one source, in order."""
    if source.kind == "parquet":
        yield from parquet_spans(number, source, unit_bytes)
    elif source.by_bytes:
        for start in range(0, source.size, unit_bytes):
            end = min(source.size, start + unit_bytes)
            yield Span(number, start, end, end - start)
    else:
        yield Span(number, 0, source.size, source.size)


def parquet_spans(number: int, source: Source, unit_bytes: int) -> Iterator[Span]:
    """Row groups, together until they hold enough. Raises DataError for a file that isn't parquet."""
    from .reading import open_parquet

    metadata = open_parquet(source.path).metadata
    start = size = 0
    share = source.size / max(1, metadata.num_row_groups)
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            yield Span(number, start, group + 1, round(share * (group + 1 - start)))
            start, size = group + 1, 0


def make_units(sources: Sequence[Source], unit_bytes: int) -> list[Unit]:
    """All of the input in pieces of about `unit_bytes`, in order: what a worker does at a time, and what a stopped run keeps."""
    units: list[Unit] = []
    held: list[Span] = []
    size = 0
    for number, source in enumerate(sources):
        magnification = MAGNIFICATION if source.compression or source.kind == "parquet" else 1
        for span in spans(number, source, unit_bytes):
            if held and size + span.weight * magnification > unit_bytes:
                units.append(tuple(held))
                held, size = [], 0
            held.append(span)
            size += span.weight * magnification
    return [*units, tuple(held)] if held else units


def stream_of(unit: Unit, sources: Sequence[Source]) -> Source | None:
    """The compressed .jsonl that a unit is, if it is one: it is done in as many parts as its text is long."""
    source = sources[unit[0].source]
    return source if len(unit) == 1 and source.streamed else None


def expected_parts(unit: Unit, sources: Sequence[Source], unit_bytes: int) -> int:
    """The parts of a unit: one, or of a compressed file, whose text nobody has seen, about so many."""
    if stream_of(unit, sources) is None:
        return 1
    return -(-unit[0].weight * MAGNIFICATION // unit_bytes)


def describe(sources: Sequence[Source]) -> list[dict]:
    """For the record of a run: what must be the same when it goes on."""
    return [asdict(source) for source in sources]


def span_hashes(source: Source, span: Span) -> Iterator[bytes]:
    """SHA-256 of each HASHED bytes of a plain .jsonl that begin in a part of it, which may end before them, so that it doesn't
    matter how the file is cut; of all of another file, with its first part."""
    if source.by_bytes:
        for low in range(-(-span.start // HASHED) * HASHED, span.end, HASHED):
            yield range_hash(source, low, min(source.size, low + HASHED))
    elif span.start == 0:
        yield range_hash(source, 0, source.size)


def range_hash(source: Source, low: int, high: int) -> bytes:
    """SHA-256 of the bytes [low, high) of a file."""
    digest = hashlib.sha256()
    with open(source.path, "rb", buffering=0) as file:
        file.seek(low)
        while low < high and (block := file.read(min(1 << 20, high - low))):
            digest.update(block)
            low += len(block)
    return digest.digest()


def file_hash(pieces: Sequence[bytes]) -> str:
    """The hash of a source from the hashes of its pieces: the file's own SHA-256 where there is one piece."""
    if len(pieces) == 1:
        return f"sha256:{pieces[0].hex()}"
    return f"sha256-of-{HASHED}-byte-pieces:{hashlib.sha256(b''.join(pieces)).hexdigest()}"
