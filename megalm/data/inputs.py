"""Texts from names, globs and folders of .jsonl and .txt files, also as .gz and .zst, and .parquet; one policy for bad UTF-8."""
from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .documents import JSON_LINES, PLAIN, Batch, check_inputs, read_batches, read_text
from .errors import DataError

ENCODING_ERRORS = ("stop", "replace", "drop")
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
BLOCK = 1 << 17
ROWS = 1024  # of a .parquet at a time


def find_files(names: Sequence[str]) -> list[str]:
    """The files of the names: themselves, what a glob finds, all known ones below a folder, sorted.

    Raises DataError for a name that gives none, a file that is given twice, and one that is missing or of an unknown kind.
    """
    paths = [path for name in names for path in _files_of(name)]
    seen: set[str] = set()
    for path in paths:
        if os.path.realpath(path) in seen:
            raise DataError(f"input {path} is given twice")
        seen.add(os.path.realpath(path))
        if not _is_plain(path) and not Path(path).exists():
            raise DataError(f"input {path} is missing")
    check_inputs(list(filter(_is_plain, paths)))
    return paths


def read_files(paths: Sequence[str], field_name: str) -> Iterator[Batch]:
    """The documents of the files, in order, in batches; `field_name` is the column of a .parquet. Raises DataError for damage."""
    for path in paths:
        if _is_plain(path):
            yield from read_batches([path])
        elif Path(path).suffix == PARQUET:
            yield from _read_parquet(path, field_name)
        else:
            yield from _read_compressed(path)


def text_of(batch: Batch, place: int, field_name: str, encoding_errors: str = "stop") -> str | None:
    """The text of one document. What isn't UTF-8, half a surrogate pair too, is an error ("stop"), gives None ("drop"), or has
    U+FFFD for every maximal bad part ("replace": chapter 3.9 of the Unicode Standard). Raises DataError as `read_text`."""
    try:
        return read_text(batch, place, field_name)
    except DataError as error:
        if not isinstance(error.__cause__, UnicodeError) or encoding_errors == "stop":
            raise
    return None if encoding_errors == "drop" else _mended(batch, place, field_name)


def _files_of(name: str) -> list[str]:
    if os.path.isdir(name):
        found = sorted(str(path) for path in Path(name).rglob("*") if path.is_file() and _is_known(path))
        if not found:
            raise DataError(f"input {name} is a folder without .jsonl, .txt or .parquet files")
        return found
    if not os.path.exists(name) and glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise DataError(f"input {name} fits no file")
        return found
    return [name]


def _is_known(path: Path) -> bool:
    return path.suffix == PARQUET or (Path(path.stem) if path.suffix in COMPRESSED else path).suffix in JSON_LINES + PLAIN


def _is_plain(path: str) -> bool:
    return not _is_known(Path(path)) or Path(path).suffix in JSON_LINES + PLAIN


class _Zstd(io.RawIOBase):
    """A .zst file of one or more frames; zstandard's own reader takes a file that is cut short for a whole one."""

    def __init__(self, path: str):
        """Raises DataError without the zstandard package."""
        try:
            import zstandard
        except ImportError:
            raise DataError(f"input {path}: .zst needs the zstandard package: pip install 'megalm[corpus]'") from None
        self._library, self._file = zstandard, io.FileIO(path)
        self._frame, self._packed, self._held = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._held:
            self._packed = self._packed or self._file.read(BLOCK)
            if not self._packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it is cut short")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._held = self._frame.decompress(self._packed)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_parquet(path: str, field_name: str) -> Iterator[Batch]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"input {path}: .parquet needs the pyarrow package: pip install 'megalm[corpus]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, before = file.schema_arrow.names, 0
            if field_name not in names:
                raise DataError(f"input {path}: no column {field_name!r}; it has {', '.join(map(repr, names[:8]))}")
            for part in file.iter_batches(ROWS, columns=[field_name]):
                batch = Batch(path, json_lines=False)
                for row, document in enumerate(part.column(0).cast(pyarrow.large_binary()).to_pylist(), start=before + 1):
                    if document is None:
                        raise DataError(f"input {path}, row {row}: null and not a string")
                    batch.add(row, document)
                before += part.num_rows
                yield batch
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"input {path} can't be read as parquet: {str(error).splitlines()[0]}") from error


def _read_compressed(path: str) -> Iterator[Batch]:
    json_lines = Path(Path(path).stem).suffix in JSON_LINES
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else io.BufferedReader(_Zstd(path), BLOCK) as file:
            batch = Batch(path, json_lines)
            for number, document in enumerate(file if json_lines else [file.read()], start=1):
                if json_lines and document.isspace():
                    continue
                batch.add(number, document)
                if batch.full:
                    yield batch
                    batch = Batch(path, json_lines)
            if batch.documents:
                yield batch
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"input {path}: damaged {Path(path).suffix}: {error}") from error


def _mended(batch: Batch, place: int, field_name: str) -> str:
    text = batch.documents[place].decode("utf-8-sig", "replace")
    whole = Batch(batch.path, batch.json_lines, [text.encode()], [batch.lines[place]])
    try:
        return read_text(whole, 0, field_name)
    except DataError as error:
        if not isinstance(error.__cause__, UnicodeEncodeError):
            raise
    return json.loads(text)[field_name].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
