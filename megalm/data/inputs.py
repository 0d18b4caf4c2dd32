"""Texts from names, globs and folders of .jsonl and .txt files, also gzipped, with one policy for what isn't UTF-8."""
from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .documents import JSON_LINES, PLAIN, Batch, check_inputs, read_batches, read_text
from .errors import DataError

ENCODING_ERRORS = ("stop", "replace", "drop")
GZIP = ".gz"


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
        if _is_gzip(path) and not Path(path).exists():
            raise DataError(f"input {path} is missing")
    check_inputs([path for path in paths if not _is_gzip(path)])
    return paths


def read_files(paths: Sequence[str]) -> Iterator[Batch]:
    """The documents of the files, in order, in batches. Raises DataError for a damaged .gz."""
    for path in paths:
        yield from _read_gzip(path) if _is_gzip(path) else read_batches([path])


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
            raise DataError(f"input {name} is a folder without .jsonl or .txt files")
        return found
    if not os.path.exists(name) and glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise DataError(f"input {name} fits no file")
        return found
    return [name]


def _is_known(path: Path) -> bool:
    return (Path(path.stem) if path.suffix == GZIP else path).suffix in JSON_LINES + PLAIN


def _is_gzip(path: str) -> bool:
    return Path(path).suffix == GZIP and _is_known(Path(path))


def _read_gzip(path: str) -> Iterator[Batch]:
    json_lines = Path(Path(path).stem).suffix in JSON_LINES
    try:
        with gzip.open(path, "rb") as file:
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
        raise DataError(f"input {path}: damaged .gz: {error}") from error


def _mended(batch: Batch, place: int, field_name: str) -> str:
    text = batch.documents[place].decode("utf-8-sig", "replace")
    whole = Batch(batch.path, batch.json_lines, [text.encode()], [batch.lines[place]])
    try:
        return read_text(whole, 0, field_name)
    except DataError as error:
        if not isinstance(error.__cause__, UnicodeEncodeError):
            raise
    return json.loads(text)[field_name].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
