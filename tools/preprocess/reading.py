"""Documents from a part of an input file, as bytes of JSON or of text, in chunks of about a megabyte."""
from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from megalm.data.errors import DataError

from .inputs import Source, Span

BLOCK = 1 << 20
COUNTED = 256 << 20  # farther into a file a line is named by its byte
WINDOW = 1 << 31  # of zstd, in bytes: its largest (zstd --long=31)
ROWS = 1024  # of a .parquet at a time


@dataclass
class Chunk:
    """Some documents of one source, still as bytes. `first` is where the first one is: a byte offset, or a row."""

    source: Source
    raw: list[bytes]
    first: int
    before: int | None = None  # lines, once they were counted
    sizes: list[int] | None = None  # of what was let go

    def let_go(self) -> None:
        """Forget the bytes, which may be 1 GB, but not where the documents are; whoever else has the list loses them too."""
        self.sizes = [len(raw or b"") for raw in self.raw]
        self.raw.clear()

    def where(self, place: int) -> str:
        """The file and the line of a document, for a message; lines are counted only now, and only near the beginning."""
        if self.source.kind == "parquet":
            return f"{self.source.name}, row {self.first + place + 1}"
        if self.source.kind == "txt":
            return self.source.name
        if self.first > COUNTED:
            sizes = [len(line) for line in self.raw[:place]] if self.sizes is None else self.sizes[:place]
            return f"{self.source.name}, the line at byte {self.first + sum(sizes) + place}"
        if self.before is None:
            with open_stream(self.source) as stream:
                self.before, left = 0, self.first
                while left > 0 and (block := stream.read(min(BLOCK, left))):
                    self.before += block.count(b"\n")
                    left -= len(block)
        return f"{self.source.name}, line {self.before + place + 1}"


def open_stream(source: Source, file=None):
    """The bytes of a source, decompressed; `file`: what to read the compressed ones with, instead of the file of that name."""
    if source.compression == "gz":
        return gzip.GzipFile(fileobj=file, mode="rb") if file is not None else gzip.open(source.path, "rb")
    if source.compression == "zst":
        return ZstdStream(source.path, file)
    return open(source.path, "rb", buffering=0)


@contextlib.contextmanager
def naming_damage(source: Source) -> Iterator[None]:
    """Raises DataError for what reading finds wrong with a .gz (a .zst's reader does)."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"input {source.path}: damaged .gz: {error}") from error


class ZstdStream:
    """Reads a .zst file of one or more frames; zstandard's own reader takes a file that is cut short for a whole one."""

    def __init__(self, path: str, file=None):
        """`file`: as open_stream has it. Raises DataError without the zstandard package."""
        try:
            import zstandard
        except ImportError:
            raise DataError(f"input {path}: .zst needs the zstandard package: pip install 'megalm[corpus]'") from None
        self.library, self.path = zstandard, path
        self.file = file or io.FileIO(path)
        self.frame = None
        self.held = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; b"" at the end. Raises DataError for what isn't zstd or is cut short."""
        if size < 0:
            return b"".join(iter(lambda: self.read(BLOCK), b""))
        while not self.held:
            data = self.file.read(BLOCK // 8)
            if not data:
                if self.frame is not None and not self.frame.eof:
                    raise DataError(f"input {self.path}: damaged .zst: it is cut short")
                return b""
            self.held = memoryview(b"".join(self._decompress(data)))
        out, self.held = bytes(self.held[:size]), self.held[size:]
        return out

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self.frame is None or self.frame.eof:
                self.frame = self.library.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
            try:
                yield self.frame.decompress(data)
            except self.library.ZstdError as error:
                raise DataError(f"input {self.path}: damaged .zst: {error}") from error
            data = self.frame.unused_data if self.frame.eof else b""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()


def open_parquet(path: str):
    """A pyarrow ParquetFile. Raises DataError for one that can't be read, or without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"input {path}: .parquet needs the pyarrow package: pip install 'megalm[corpus]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"input {path} can't be read as parquet: {str(error).splitlines()[0]}") from error


def read_chunks(source: Source, span: Span, field: str, most: int | None = None) -> Iterator[Chunk]:
    """The documents of a part of a source, in order. Raises DataError for a file that is damaged or has no such column.

    `most`: of a .txt only so many bytes, without a letter that they would cut.
    """
    if source.kind == "parquet":
        yield from parquet_rows(source, span, field)
        return
    with naming_damage(source), open_stream(source) as stream:
        if source.kind == "txt":
            yield Chunk(source, [stream.read() if most is None else whole_letters(stream.read(most + 1), most)], 0)
        else:
            for first, lines in whole_lines(stream, span.start, None if source.compression else span.end):
                yield Chunk(source, lines, first)


def whole_letters(data: bytes, most: int) -> bytes:
    """At most so many bytes, where there are more without those of a letter that has its end behind them."""
    if len(data) <= most:
        return data
    while most and data[most] & 0xC0 == 0x80:
        most -= 1
    return data[:most]


def whole_lines(stream, start: int, end: int | None) -> Iterator[tuple[int, list[bytes]]]:
    """(offset of the first, lines without their ends) of the lines that begin in [start, end), in lists of about BLOCK bytes."""
    position = start
    if start:
        stream.seek(start - 1)
        position = skip_line(stream)
    held: list[bytes] = []  # the pieces of a line that isn't whole yet
    while end is None or position < end:
        block = stream.read(BLOCK)
        cut = block.rfind(b"\n") + 1
        if block and not cut:
            held.append(block)
            continue
        text = b"".join((*held, block[:cut])) if held else block[:cut]
        held = [block[cut:]]
        if not text:
            return
        lines, size, last = text.split(b"\n"), len(text), not block
        if text.endswith(b"\n"):
            lines.pop()
        del text, block  # a line may have 1 GB
        if end is not None and position + size > end:
            lines = begin_before(lines, end - position)
        yield position, lines
        position += size
        if last:
            return


def skip_line(stream) -> int:
    """Read past the next end of a line, leaving the stream right behind it (or at the end of the file); returns where that is."""
    while block := stream.read(BLOCK):
        if (cut := block.find(b"\n")) >= 0:
            return stream.seek(cut + 1 - len(block), io.SEEK_CUR)
    return stream.tell()


def begin_before(lines: list[bytes], limit: int) -> list[bytes]:
    """The lines of a text, each with its end of one byte, that begin before an offset."""
    offset = 0
    for count, line in enumerate(lines):
        if offset >= limit:
            return lines[:count]
        offset += len(line) + 1
    return lines


def parquet_rows(source: Source, span: Span, field: str) -> Iterator[Chunk]:
    """The rows of a range of row groups; the column holds strings or bytes. A null is None in the list."""
    import pyarrow

    file = open_parquet(source.path)
    if field not in file.schema_arrow.names:
        raise DataError(f"input {source.path}: no column {field!r}; it has {', '.join(map(repr, file.schema_arrow.names[:8]))}")
    kind = file.schema_arrow.field(field).type
    if not any(check(kind) for check in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_binary,
                                         pyarrow.types.is_large_binary)):
        raise DataError(f"input {source.path}: the column {field!r} is of type {kind} and not of strings")
    row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    try:
        for batch in file.iter_batches(ROWS, row_groups=range(span.start, span.end), columns=[field]):
            yield Chunk(source, batch.column(0).cast(pyarrow.large_binary()).to_pylist(), row)
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"input {source.path} can't be read as parquet: {str(error).splitlines()[0]}") from error
